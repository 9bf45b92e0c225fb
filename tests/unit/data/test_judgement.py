"""What a row says of its pair beside which answer is the better one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import Pairing
from dpo_ray.data.canonical import canonical_pairs
from dpo_ray.data.judgement import judged
from dpo_ray.data.rules import MEANING, BadRow
from dpo_ray.formats.registry import formats
from dpo_ray.pairs import PreferencePair, pair_row

ROW = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
PAIR = PreferencePair(({"role": "user", "content": "Why?"},), "Because.", "No idea.")


def pair(ties: Literal["drop", "keep"] = "drop", **said: Any) -> PreferencePair:
    [found] = canonical_pairs({**ROW, **said}, "paired", Pairing(), ties)
    return found


def reason(ties: Literal["drop", "keep"] = "drop", **said: Any) -> str:
    with pytest.raises(BadRow) as caught:
        pair(ties, **said)
    return caught.value.reason


def test_a_pair_has_what_its_row_says():
    assert pair(weight=2, margin=0.5) == replace(PAIR, weight=2.0, margin=0.5)
    assert pair(preference=0.75) == replace(PAIR, preference=0.75)
    row = pair_row(pair(weight=2), "train", "math")
    assert [row[name] for name in ("source", "weight", "margin", "preference")] == ["math", 2.0, None, None]


@pytest.mark.parametrize("said", [{}, {"weight": None}, {"weight": 1, "margin": 0, "preference": 1.0}])
def test_what_says_nothing_is_left_out(said: dict[str, Any]):
    assert pair(**said) == PAIR


def test_the_answer_that_is_likelier_the_better_one_is_chosen():
    assert pair(preference=0.25) == replace(PAIR, chosen="No idea.", rejected="Because.", preference=0.75)
    assert pair(preference=0) == replace(PAIR, chosen="No idea.", rejected="Because.")


@given(preference=st.floats(0, 1).filter(lambda p: p != 0.5))
def test_the_same_judgement_of_swapped_sides_is_the_same_pair(preference: float):
    other = {"chosen": "No idea.", "rejected": "Because.", "preference": 1 - preference}
    mine, theirs = pair(preference=preference), pair(**other)
    assert mine.pair_id == theirs.pair_id
    assert (mine.preference or 1) == pytest.approx(theirs.preference or 1)
    assert (mine.preference or 1) > 0.5


def test_ties_are_dropped_unless_they_are_to_be_kept():
    assert reason(preference=0.5) == reason(preference=0.5, rejected="Because.") == "tie"
    kept = pair("keep", preference=0.5)
    assert kept.preference == 0.5 and {kept.chosen, kept.rejected} == {"Because.", "No idea."}
    swapped = pair("keep", preference=0.5, chosen="No idea.", rejected="Because.")
    assert swapped == kept  # a duplicate, and no contradiction


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("weight", value) for value in (0, -1, math.inf, math.nan, "2", True, 10**400)),
        *(("margin", value) for value in (-0.1, math.inf, math.nan, "large", [1])),
        *(("preference", value) for value in (-0.01, 1.01, math.nan, "A", False)),
    ],
)
def test_values_that_are_none_put_the_row_into_quarantine(column: str, value: Any):
    assert reason(**{column: value}) == f"bad_{column}"
    assert f"data.ignore=[{column}]" in MEANING[f"bad_{column}"]  # type: ignore[index]


RANKED = {"prompt": "Why?", "completions": ["a", "b", "c"], "scores": [1.0, 1.0, 0.5]}


def test_ranked_answers_with_equal_scores_are_ties():
    def pairs(ties: Literal["drop", "keep"], **rules: Any) -> list[tuple[Any, ...]]:
        found = canonical_pairs(RANKED, "ranked", Pairing(**rules), ties)
        return [(p.chosen, p.rejected, p.preference) for p in found]

    every = {"strategy": "all", "pairs_per_prompt": 9}
    assert sorted(pairs("drop", **every)) == [("a", "c", None), ("b", "c", None)]
    kept = pairs("keep", **every)
    assert len(kept) == 3 and {frozenset(p[:2]): p[2] for p in kept}[frozenset("ab")] == 0.5
    assert pairs("keep", strategy="all", min_score_gap=0.9, pairs_per_prompt=9) == [(*kept[2][:2], 0.5)]
    even = {**RANKED, "scores": [1, 1, 1]}
    with pytest.raises(BadRow, match="tie"):
        canonical_pairs(even, "ranked", Pairing())
    [one] = canonical_pairs({**even, "weight": 3}, "ranked", Pairing(), "keep")
    assert (one.preference, one.weight) == (0.5, 3.0)


def test_of_a_single_answer_only_its_weight_is_read():
    row = {"prompt": "Why?", "completion": "So.", "label": True, "weight": 2, "margin": "?", "preference": "?"}
    [single] = canonical_pairs(row, "unpaired", Pairing())
    assert (single.weight, single.margin, single.preference) == (2.0, None, None)


def test_a_pair_that_is_a_tie_already_keeps_it():
    tie = replace(PAIR, preference=0.5)
    assert judged(tie, {}, "keep").preference == 0.5
    assert judged(tie, {}, "keep") == judged(PAIR, {"preference": 0.5}, "keep")
    with pytest.raises(BadRow):
        judged(tie, {}, "drop")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arena", {"prompt": "Why?", "response_a": "Because.", "response_b": "No idea.", "winner": "tie"}),
        (
            "helpsteer_preference",
            {"prompt": "Why?", "response_1": "Because.", "response_2": "No idea.", "preference_strength": 0},
        ),
    ],
)
def test_ties_of_a_format_are_ties(name: str, row: dict[str, Any]):
    fields = formats()[name].row(row)
    with pytest.raises(BadRow, match="tie"):
        canonical_pairs(fields, "paired", Pairing())
    [kept] = canonical_pairs(fields, "paired", Pairing(), "keep")
    assert kept.preference == 0.5 and len({kept.chosen, kept.rejected}) == 2


def test_numbers_in_cells_of_csv_are_numbers():
    read = formats()["paired"].row({**ROW, "weight": "2.5", "margin": "0.5", "preference": None})
    assert (read["weight"], read["margin"], read["preference"]) == (2.5, 0.5, None)
