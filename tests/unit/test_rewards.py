"""The demo reward, loading rewards by name, and what becomes of those that fail."""

from __future__ import annotations

import functools
import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_ray.errors import ConfigError, RewardError
from dpo_ray.rewards import brief_answer, load_reward, score_completions, split_sentences, topic_overlap

QUESTION = "Why do cats purr when they are petted?"
GOOD = "Cats purr when petted because they feel content and safe."


def test_a_complete_brief_answer_on_the_topic_is_the_best_there_is():
    assert brief_answer(QUESTION, GOOD, True) == 1.0


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((GOOD, True), (GOOD, False)),
        ((GOOD, True), (GOOD.rstrip("."), True)),
        ((GOOD.rstrip("."), True), ("Cats purr when petted because they feel content and", False)),
        ((GOOD, True), (f"{GOOD} They also purr in pain. Kittens purr too. Some cats never purr.", True)),
        ((GOOD, True), ("Cats purr. Cats purr. Cats purr when petted. Cats purr.", True)),
        ((GOOD, True), ("The capital of France is Paris, a large city.", True)),
        ((GOOD, True), ("Yes.", True)),
        ((GOOD, True), ("", True)),
        (("The capital of France is Paris, a large city.", True), ("word word word word word word word word.", True)),
        ((f"{GOOD} They like it.", True), (" ".join([GOOD.rstrip(".") + ","] * 7) + " they do.", True)),
    ],
    ids=[
        "unfinished",
        "no full stop",
        "both",
        "too many sentences",
        "repetition",
        "off topic",
        "too short",
        "empty",
        "off topic and repetition",
        "one endless sentence",
    ],
)
def test_a_person_would_order_them_so(better: tuple[str, bool], worse: tuple[str, bool]):
    assert brief_answer(QUESTION, *better) > brief_answer(QUESTION, *worse)


def test_a_second_sentence_costs_nothing():
    assert brief_answer(QUESTION, f"{GOOD} They like it.", True) == 1.0


def test_four_sentences_halve_the_score():
    # 4 sentences, 2/4; everything else at its best: complete, 15 distinct words, on topic.
    text = f"{GOOD} Kittens do it early. Lions roar instead. Nobody knows it all."
    assert brief_answer(QUESTION, text, True) == pytest.approx(0.5, abs=1e-12)


def test_words_over_sixty_cost_in_proportion():
    # 80 distinct words in one sentence: 60/80.
    text = "cats purr petted " + " ".join(f"word{i}" for i in range(77)) + "."
    assert brief_answer(QUESTION, text, True) == pytest.approx(0.75, abs=1e-12)


def test_repeated_three_word_sequences_cost_their_share():
    # a b c a b c d e: sequences abc bca cab abc bcd cde, 5 of 6 fresh; the prompt asks for no content word.
    text = "alpha beta gamma alpha beta gamma delta kappa."
    assert brief_answer("Why?", text, True) == pytest.approx(5 / 6, abs=1e-12)


def test_an_unfinished_answer_without_full_stop_scores_nothing():
    assert brief_answer(QUESTION, GOOD.rstrip("."), False) == 0.0


def test_an_answer_off_the_topic_keeps_four_tenths():
    assert brief_answer(QUESTION, "Paris lies on a wide river in France.", True) == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "words"), [("Cats purr when petted.", 4), ("Petted cats purr.", 3), ("Cats purr.", 0)]
)
def test_an_answer_of_a_few_words_is_worth_its_share_of_eight(text: str, words: int):
    assert brief_answer(QUESTION, text, True) == pytest.approx(words / 8, abs=1e-12)


@pytest.mark.parametrize("ending", [".", "!", "?", '."', ".)", "!”"])
def test_a_sentence_may_end_inside_quotes_or_brackets(ending: str):
    assert brief_answer(QUESTION, GOOD.rstrip(".") + ending, True) == 1.0


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("One sentence.", ["One sentence."]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It costs 3.5 dollars. Buy it.", ["It costs 3.5 dollars.", "Buy it."]),
        ("Dr. Smith met Mrs. Jones.", ["Dr. Smith met Mrs. Jones."]),
        ("Use nuts, e.g. almonds. They help.", ["Use nuts, e.g. almonds.", "They help."]),
        ("The U.S. economy grew.", ["The U.S. economy grew."]),
        ("J. R. R. Tolkien wrote it.", ["J. R. R. Tolkien wrote it."]),
        ("First line\nSecond line", ["First line", "Second line"]),
        ("- Eggs\n- Milk\n\n- Bread", ["- Eggs", "- Milk", "- Bread"]),
        ("1. Eat well.\n2. Sleep.", ["1. Eat well.", "2. Sleep."]),
        ("No. It does not. Never.", ["No.", "It does not.", "Never."]),
        ("Visit example.com today.", ["Visit example.com today."]),
    ],
)
def test_text_is_split_where_its_sentences_end(text: str, sentences: list[str]):
    assert split_sentences(text) == sentences


def test_a_long_answer_does_not_pass_for_a_brief_one_by_its_line_breaks():
    items = "\n".join(f"- tip {i} for cats that purr when petted" for i in range(8))
    assert brief_answer(QUESTION, items + ".", True) < 0.3


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        # Content words of the question: cats, purr, petted.
        ("Cats purr if petted.", 1.0),
        ("A cat purrs.", 2 / 3),
        ("CATS", 1 / 3),
        ("Dogs bark.", 0.0),
        ("", 0.0),
    ],
)
def test_the_topic_is_the_share_of_the_content_words_that_come_back(completion: str, share: float):
    assert topic_overlap(QUESTION, completion) == pytest.approx(share, abs=1e-12)


def test_a_prompt_without_content_words_asks_for_no_topic():
    assert topic_overlap("Why is it so?", "Anything.") == 1.0


def test_a_reward_is_loaded_by_name():
    assert load_reward("dpo_ray.rewards:brief_answer") is brief_answer


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_anywhere:f", "no_such_module_anywhere"),
        ("dpo_ray.no_such_module:f", "cannot be imported"),
        ("dpo_ray.rewards:no_such_function", "no_such_function"),
        ("dpo_ray.rewards:_STOP_WORDS", "not a function but frozenset"),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(name: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load_reward(name)
    assert said in str(caught.value) and name in str(caught.value)


ROW = {
    "prompt_id": "00ff",
    "prompt": [{"role": "user", "content": "First."}, {"role": "user", "content": f"Why{'?' * 100}"}],
    "completions": [{"text": "{}", "finished": True}, {"text": f"{{{'x' * 100}", "finished": False}],
}


def parses(prompt: str, completion: str, finished: bool) -> float:
    return measured(completion)


def measured(text: str) -> float:
    return float(len(json.loads(text)))


def line_of(code: str) -> int:
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip() == code)


def failure(reward: Any) -> RewardError:
    with pytest.raises(RewardError) as caught:
        score_completions("my_rewards:mine", reward, ROW)
    return caught.value


def test_each_completion_is_scored_by_the_last_turn():
    seen: list[tuple[str, str, bool]] = []

    def reward(prompt: str, completion: str, finished: bool) -> float:
        seen.append((prompt, completion, finished))
        return float(len(seen))

    assert score_completions("any:name", reward, ROW) == [1.0, 2.0]
    question = f"Why{'?' * 100}"
    assert seen == [(question, "{}", True), (question, f"{{{'x' * 100}", False)]


def test_a_reward_that_raises_is_told_with_the_completion_and_the_lines_of_its_code():
    error = failure(parses)
    here = str(Path(__file__))
    inner, outer = line_of("return float(len(json.loads(text)))"), line_of("return measured(completion)")
    assert str(error).startswith("The reward my_rewards:mine failed on completion 2 of the prompt 00ff ('Why???")
    assert f"→ '{{{'x' * 79}')" in str(error) and "?" * 78 not in str(error)
    assert "JSONDecodeError: Expecting property name" in str(error)
    assert f", at {here}:{inner} in measured, called at {here}:{outer} in parses. Mend it" in str(error)
    assert "\n" not in str(error)
    assert isinstance(error.__cause__, json.JSONDecodeError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (RewardError, str(error))


def test_a_message_of_several_lines_stays_one_paragraph():
    def reward(prompt: str, completion: str, finished: bool) -> float:
        raise ValueError("first.\nsecond.\n")

    assert "ValueError: first. second, at " in str(failure(reward))


def test_a_reward_without_code_of_its_own_is_told_all_the_same():
    assert "TypeError" in str(failure(functools.partial(len, "a", "b"))) and " at " not in str(failure(len))


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2)])
def test_any_real_number_is_a_score(value: Any):
    [score, _] = score_completions("any:name", lambda p, c, f: value, ROW)
    assert type(score) is float and score == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "gave None (NoneType)"),
        ("0.5", "gave '0.5' (str)"),
        (torch.tensor(0.5), "gave tensor(0.5000) (Tensor)"),
        (torch.tensor([0.5]), "(Tensor)"),
        (np.array([0.5]), "(ndarray)"),
        (float("nan"), "gave nan (float)"),
        (float("-inf"), "gave -inf (float)"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any, said: str):
    error = failure(lambda p, c, f: value)
    assert said in str(error)
    assert "to completion 1 of the prompt 00ff" in str(error) and "It must give a finite number" in str(error)


MODULES = ["syntax", "name", "file", "end", "library"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def score(p, c, f)\n    return 1.0\n", r"SyntaxError: expected ':'"),
        ("LIMIT = undefined\n", r"NameError: name 'undefined' is not defined, at .*failing_reward_1\.py:1"),
        ("WORDS = open('no_such_words.txt')\n", r"FileNotFoundError: .*no_such_words\.txt', at .*_reward_2\.py:1"),
        ("import sys\nsys.exit(2)\n", r"SystemExit: 2, at .*_reward_3\.py:2"),
        ("import no_such_library\n", r"ModuleNotFoundError: No module .*, at .*_reward_4\.py:1"),
    ],
    ids=MODULES,
)
def test_a_module_that_fails_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, source: str, said: str
):
    module = f"failing_reward_{MODULES.index(request.node.callspec.id)}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = f"The reward {module}:score cannot be imported, for its module fails: .*{said}"
    with pytest.raises(ConfigError, match=expected):
        load_reward(f"{module}:score")
