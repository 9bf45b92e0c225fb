"""Two models' answers to the same prompts: where the tuned one wins, and which are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_ray.config import Sampling
from dpo_ray.evaluation.comparison import MOST_CHARACTERS, Answered, shown_samples, wins_by_length
from tests.reports import HOSTILE


def test_the_win_rate_is_told_by_which_answer_is_longer_and_by_thirds_of_the_opponents_lengths():
    wins = np.array([1.0, 1.0, 0.0, 0.5, 0.0, 1.0])
    other = np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    tuned = np.array([11.0, 21.0, 29.0, 40.0, 40.0, 70.0])
    found = {name: (one.value, one.n) for name, one in wins_by_length(wins, other, tuned).items()}
    assert found == {
        "tuned longer": (1.0, 3),
        "tuned shorter": (0.0, 2),
        "as long": (0.5, 1),
        "opponent up to 27 tokens": (1.0, 2),
        "opponent 27 to 43 tokens": (0.25, 2),
        "opponent over 43 tokens": (0.5, 2),
    }


def test_of_an_empty_bucket_nothing_is_told():
    one = np.array([5.0, 5.0])
    assert set(wins_by_length(np.array([1.0, 0.0]), one, one + 1)) == {"tuned longer", "opponent up to 5 tokens"}


def answered(rewards: list[float], prompt: list[dict[str, Any]], texts: tuple[str, str] = ("a", "b")) -> Answered:
    completions = [{"text": text, "num_tokens": n + 1, "finished": n == 0} for n, text in enumerate(texts)]
    return Answered({"prompt_id": "p", "prompt": prompt, "completions": completions}, rewards, [0.0])


ASKED = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("rewards", "in_pairs", "outcome", "told"),
    [
        ([0.2, 0.7], False, "won", [0.2, 0.7]),
        ([0.7, 0.2], False, "lost", [0.7, 0.2]),
        ([0.7, 0.7], False, "tied", [0.7, 0.7]),
        ([0.9, 0.6], True, "won", [None, 0.6]),  # a share of comparisons, and not to be held against the other one
        ([0.0, 0.5], True, "tied", [None, 0.5]),
    ],
)
def test_an_answer_is_won_or_lost_by_what_the_judge_gave_to_the_two(
    rewards: list[float], in_pairs: bool, outcome: str, told: list[Any]
):
    [found] = shown_samples([answered(rewards, ASKED)], {"p": "math"}, Sampling(samples=1), in_pairs=in_pairs, most=9)
    assert (found["outcome"], found["rewards"], found["source"]) == (outcome, told, "math")
    assert (found["before"], found["after"], found["tokens"]) == ("a", "b […]", [1, 2])


def test_so_many_are_shown_the_first_ones_with_texts_of_a_bounded_length():
    dialogue = [{"role": "user", "content": "y" * 9000}, {"role": "assistant", "content": HOSTILE}, *ASKED]
    every = [answered([0.0, 1.0], dialogue, ("x" * 5000, " short "))] * 5
    found = shown_samples(every, {}, Sampling(samples=1), in_pairs=False, most=3)
    assert len(found) == 3
    assert found[0]["prompt"] == "Why?" and found[0]["earlier"].startswith("user: yyy")
    assert all(len(text) < MOST_CHARACTERS + 50 for text in (found[0]["earlier"], found[0]["before"]))
    assert found[0]["before"].endswith("[… 3,000 more characters]") and found[0]["after"] == "short […]"
