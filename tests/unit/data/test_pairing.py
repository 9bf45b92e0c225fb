"""Scored candidates → pairs, and rows → mismatched rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import CandidatePairing, Pairing
from dpo_ray.data.pairing import Candidate, make_pairs, mismatched_rows
from dpo_ray.errors import DataError
from dpo_ray.pairs import Message

PROMPT = [Message(role="user", content="Why?")]


def pairs_of(
    candidates: list[Candidate], prompt: list[Message] = PROMPT, **rules: Any
) -> tuple[list[tuple[str, str]], Counter[str]]:
    couples, passed_over = make_pairs(prompt, candidates, CandidatePairing(**rules))
    assert all(couple.pair(prompt).prompt == tuple(prompt) for couple in couples)
    return [(c.chosen.text, c.rejected.text) for c in couples], passed_over


def paired(scored: dict[str, float], **rules: Any) -> tuple[list[tuple[str, str]], Counter[str]]:
    return pairs_of([Candidate(*of_one) for of_one in scored.items()], **rules)


def test_the_best_is_chosen_over_the_worst():
    assert paired({"b": 0.5, "a": 0.1, "c": 0.9}) == ([("c", "a")], Counter())


def test_each_completion_is_in_one_pair_at_most():
    pairs, _ = paired({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.8, "e": 0.9}, pairs_per_prompt=5)
    assert pairs == [("e", "a"), ("d", "b")]


def test_a_pair_too_near_ends_the_prompt():
    # .9 - .1 = .8 is a pair; .5 - .45 = .05 < .1 is none, counted once.
    scored = {"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.45, "e": 0.48, "f": 0.46}
    assert paired(scored, pairs_per_prompt=3) == ([("a", "b")], {"small_gap": 1})
    assert paired({"a": 0.5, "b": 0.5, "c": 0.5}) == ([], {"tie": 1})


@pytest.mark.parametrize(("gap", "count"), [(0.5, 1), (0.5001, 0)])
def test_a_gap_of_just_the_minimum_is_enough(gap: float, count: int):
    assert len(paired({"a": 0.75, "b": 0.25}, min_score_gap=gap)[0]) == count


@pytest.mark.parametrize("tenths", range(10))
def test_scores_of_one_decimal_differ_by_a_tenth(tenths: int):
    assert len(paired({"a": (tenths + 1) / 10, "b": tenths / 10}, min_score_gap=0.1)[0]) == 1


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # Scores 1 to 5: e is the best. Of the others the hashes of prompt and text give the order.
        ("best_worst", [("e", "a"), ("d", "b")]),
        ("top_k", [("e", "a"), ("d", "a"), ("c", "a")]),
        ("all", [("e", "a"), ("e", "b"), ("d", "a")]),
    ],
)
def test_a_strategy_says_who_is_set_against_whom(strategy: str, expected: list[tuple[str, str]]):
    scored = {text: float(n) for n, text in enumerate("abcde", start=1)}
    assert paired(scored, strategy=strategy, pairs_per_prompt=3)[0] == expected


def test_best_random_draws_by_the_prompt_and_goes_on_after_one_that_is_too_near():
    scored = {text: float(n) for n, text in enumerate("abcde", start=1)}
    drawn = {paired(scored, strategy="best_random", prompt=ask(str(n)))[0][0] for n in range(40)}
    assert drawn == {("e", other) for other in "abcd"}
    every, passed_over = paired(scored, strategy="best_random", pairs_per_prompt=9, min_score_gap=2.0)
    assert sorted(every) == [("e", "a"), ("e", "b"), ("e", "c")] and passed_over == {"small_gap": 1}


def ask(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_completions_equal_but_for_outer_space_count_once_with_the_first_score():
    candidates = [Candidate("a", 0.9), Candidate(" a\n", 0.0), Candidate("b", 0.5)]
    assert pairs_of(candidates, pairs_per_prompt=3) == ([("a", "b")], {"duplicate": 1})


def test_empty_completions_are_never_a_side_of_a_pair():
    pairs, passed_over = paired({"": 0.0, "a": 0.9, " ": 1.0, "b": 0.1})
    assert pairs == [("a", "b")]
    assert passed_over == {"empty_response": 2}


@pytest.mark.parametrize("completions", [[], ["a"], ["a", "a "], ["a", ""]])
def test_fewer_than_two_distinct_completions_make_no_pair(completions: list[str]):
    pairs, passed_over = pairs_of([Candidate(text, score) for text, score in zip(completions, (1.0, 0.0))])  # noqa: B905
    assert pairs == []
    assert passed_over["too_few_distinct"] == 1


def test_an_answer_that_says_the_prompt_again_is_an_echo():
    prompt = ask("Name the  largest city of France.")
    scored = {"name the largest city of France. It is Paris.": 1.0, "Paris.": 0.5, "Lyon.": 0.0}
    assert paired(scored, prompt=prompt) == ([("Paris.", "Lyon.")], {"echo": 1})
    assert paired(scored, prompt=prompt, drop_echoes=False)[1] == {}
    # What is as short as this may be an answer.
    assert paired({"Hello there!": 1.0, "Go away": 0.0}, prompt=ask("Hello"))[1] == {}


def test_an_answer_that_was_cut_is_kept_or_rejected_only_or_dropped():
    candidates = [Candidate("best", 1.0, finished=False), Candidate("good", 0.5), Candidate("bad", 0.0, finished=False)]
    assert pairs_of(candidates) == ([("best", "bad")], {})
    assert pairs_of(candidates, truncated="only_rejected") == ([], {"truncated": 1})
    every = pairs_of(candidates, truncated="only_rejected", strategy="top_k", pairs_per_prompt=3)
    assert every == ([("good", "bad")], {"truncated": 1})
    assert pairs_of(candidates, truncated="drop") == ([], {"truncated": 2, "too_few_distinct": 1})


def test_lengths_too_far_apart_make_no_pair():
    scored = {"x" * 30: 1.0, "y" * 10: 0.0}
    assert paired(scored, max_length_ratio=3.0) == ([("x" * 30, "y" * 10)], {})
    assert paired(scored, max_length_ratio=2.9) == ([], {"length_ratio": 1})


def test_answers_that_are_nearly_the_same_make_no_pair():
    # 4 of 5 words in order on both sides: 2·4/10 = .8.
    scored = {"It is a large town": 1.0, "It is a small town": 0.0}
    assert paired(scored, max_similarity=0.79) == ([], {"near_identical": 1})
    assert len(paired(scored, max_similarity=0.81)[0]) == 1


def test_what_the_model_prefers_already_makes_no_pair():
    candidates = [Candidate("a", 1.0, logprob=-3.0, model="m"), Candidate("b", 0.0, logprob=-5.0, model="m")]
    assert len(pairs_of(candidates, max_logprob_margin=2.0)[0]) == 1
    assert pairs_of(candidates, max_logprob_margin=1.9) == ([], {"already_likely": 1})
    other = [candidates[0], Candidate("b", 0.0, logprob=-5.0, model="n")]
    assert len(pairs_of(other, max_logprob_margin=1.9)[0]) == 1
    with pytest.raises(DataError, match=r"max_logprob_margin=1\.9 needs the log-probs"):
        pairs_of([candidates[0], Candidate("b", 0.0, model="m")], max_logprob_margin=1.9)


@given(st.permutations([("a", 0.9), ("b", 0.9), ("c", 0.1), ("d", 0.1), ("e", 0.5)]))
def test_the_order_of_the_samples_does_not_matter(samples: list[tuple[str, float]]):
    assert paired(dict(samples), pairs_per_prompt=2)[0] == [("a", "d"), ("b", "c")]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_a_number_never_makes_a_preference(score: float):
    for candidates in itertools.permutations([Candidate("a", 0.5), Candidate("b", score)]):
        with pytest.raises(DataError, match="finite"):
            pairs_of(list(candidates))


SAMPLES = st.builds(
    Candidate,
    text=st.sampled_from(["", " ", "a", "a ", "b", "Why? b", "one two three", "one two four", "x" * 40]),
    score=st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0]),
    finished=st.booleans(),
    logprob=st.floats(-50, 0),
    model=st.sampled_from(["m", "n"]),
)
RULES = st.builds(
    CandidatePairing,
    strategy=st.sampled_from(["best_worst", "best_random", "all", "top_k"]),
    min_score_gap=st.sampled_from([0.01, 0.1, 0.5]),
    pairs_per_prompt=st.integers(1, 9),
    max_similarity=st.sampled_from([None, 0.5]),
    max_length_ratio=st.sampled_from([None, 5.0]),
    drop_echoes=st.booleans(),
    truncated=st.sampled_from(["keep", "only_rejected", "drop"]),
    max_logprob_margin=st.sampled_from([None, 10.0]),
)


@given(st.lists(SAMPLES, max_size=7), RULES, st.randoms(use_true_random=False))
def test_whatever_the_rules_no_pair_breaks_them(candidates: list[Candidate], rules: CandidatePairing, random: Any):
    couples, passed_over = make_pairs(PROMPT, candidates, rules)
    assert len(couples) <= rules.pairs_per_prompt
    assert len({(c.chosen.text, c.rejected.text) for c in couples}) == len(couples)
    for chosen, rejected in couples:
        assert chosen.text != rejected.text and chosen.text.strip() and rejected.text.strip()
        gap = chosen.score - rejected.score
        assert gap > rules.min_score_gap or math.isclose(gap, rules.min_score_gap)
        assert chosen.finished or rules.truncated == "keep"
        assert rejected.finished or rules.truncated != "drop"
        if rules.max_length_ratio:
            lengths = sorted((len(chosen.text), len(rejected.text)))
            assert lengths[1] <= rules.max_length_ratio * lengths[0]
    # Every candidate is a distinct side, or counted.
    unfit = sum(passed_over[reason] for reason in ("empty_response", "duplicate", "echo"))
    unfit += passed_over["truncated"] if rules.truncated == "drop" else 0
    distinct = {c.text.strip() for c in candidates if c.text.strip() and (c.finished or rules.truncated != "drop")}
    assert len(candidates) - unfit == len(distinct)
    assert passed_over["too_few_distinct"] == (len(distinct) < 2)
    # The same candidates make the same pairs, in whatever order they come, but for which of two duplicates is first.
    assert make_pairs(PROMPT, candidates, rules) == (couples, passed_over)
    first = {c.text.strip(): c for c in reversed(candidates)}
    shuffled = list(first.values())
    random.shuffle(shuffled)
    if rules.truncated != "drop":
        assert make_pairs(PROMPT, shuffled, rules)[0] == couples


def test_rules_of_ranked_rows_are_those_that_need_only_texts_and_scores():
    couples, _ = make_pairs(PROMPT, [Candidate("a", 1.0), Candidate("b", 0.0)], Pairing())
    assert [(c.chosen.text, c.rejected.text) for c in couples] == [("a", "b")]


def test_a_mismatched_row_is_the_next_one_with_another_prompt_cyclically():
    assert mismatched_rows(["a", "b", "c"], ["train"] * 3) == [1, 2, 0]
    assert mismatched_rows(["a", "a", "b", "a"], ["train"] * 4) == [2, 2, 3, 2]


def test_a_mismatched_row_is_of_the_same_split():
    assert mismatched_rows(["a", "b", "c", "d"], ["train", "eval", "train", "eval"]) == [2, 3, 0, 1]
    assert mismatched_rows(["a", "b", "c"], ["train", "eval", "train"]) == [2, None, 0]


def test_where_there_is_no_other_prompt_there_is_no_mismatched_row():
    assert mismatched_rows(["a", "a"], ["train"] * 2) == [None, None]
    assert mismatched_rows([], []) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["train", "eval"])), max_size=12))
def test_the_mismatched_row_is_the_nearest_that_will_do(rows: list[tuple[str, str]]):
    found = mismatched_rows([prompt for prompt, _ in rows], [split for _, split in rows])
    for i, (prompt, split) in enumerate(rows):
        following = [j % len(rows) for j in range(i + 1, i + len(rows))]
        other = [j for j in following if rows[j][1] == split and rows[j][0] != prompt]
        assert found[i] == (other[0] if other else None)
