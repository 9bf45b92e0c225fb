"""Which held-out rows a policy is measured on, and their margins as the loss sees them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from dpo_ray.config.losses import Loss
from dpo_ray.errors import DataError
from dpo_ray.evaluation.held_out import HeldOut, HeldOutRows, held_out_pairs, score_table
from dpo_ray.pairs import TOKENIZED, steers
from tests.indexed import artifact_of

Sides = tuple[list[float], list[float]]


def loss(**options: Any) -> Loss:
    return TypeAdapter(Loss).validate_python(options)


Scored = dict[str, Sides]
"""By pair_id."""


def measured(
    folder: Path, options: Loss, policy: Scored, base: Scored | None, of: HeldOutRows = HeldOutRows()
) -> HeldOut:
    """A policy's token log-probs of chosen and rejected by pair_id, beside those of the reference, in two shards."""
    rows = [
        {
            "pair_id": pair_id,
            "prompt_id": f"prompt of {pair_id}",
            "split": "eval",
            **({f"{side}_ref_logprobs": base[pair_id][n] for n, side in enumerate(SIDES)} if base else {}),
        }
        for pair_id in policy
    ]
    tables = []
    for part in (rows[::2], rows[1::2]):
        kept = [part[n] for n in of.of(pa.Table.from_pylist(part, schema=SPLIT), Counter())] if part else []
        tables.append(score_table(options, kept, [policy[row["pair_id"]] for row in kept]))
    return held_out_pairs(artifact_of(folder, tables, "policy_scores"))


SIDES = ("chosen", "rejected")
SPLIT = pa.schema([TOKENIZED.field(name) for name in ("pair_id", "prompt_id", "split")])

POLICY: dict[str, Sides] = {"a": ([-1.0, -2.0], [-4.0]), "b": ([-1.0], [-0.5, -0.5, -2.0])}


BASE: dict[str, Sides] = {"a": ([-2.0, -2.0], [-3.0]), "b": ([-0.5], [-1.0, -1.0, -1.0])}


def margins(*given: Any) -> list[float]:
    return measured(*given).margins.tolist()


def test_of_a_tie_nothing_is_measured_and_it_is_counted():
    rows = pa.table(
        {
            "pair_id": ["a", "b", "c", "d"],
            "split": ["eval", "eval", "train", "eval"],
            "preference": [0.5, 0.9, 0.5, None],
        }
    )
    counters: Counter[str] = Counter()
    assert HeldOutRows().of(rows, counters).tolist() == [1, 3]
    assert counters == {"other_split": 1, "no_preference": 1}


def test_held_out_pairs_know_their_source(tmp_path: Path):
    rows = [{"pair_id": name, "source": source} for name, source in (("a", "math"), ("b", None))]
    scores = score_table(loss(type="simpo"), rows, [POLICY[row["pair_id"]] for row in rows])
    assert held_out_pairs(artifact_of(tmp_path, [scores], "policy_scores")).sources.tolist() == ["math", None]


def test_the_chosen_answers_have_their_log_probs_under_both_and_all_have_their_lengths(tmp_path: Path):
    found = measured(tmp_path, loss(type="sigmoid"), POLICY, BASE)
    assert found.chosen_ref_logps is not None
    assert (found.chosen_logps.tolist(), found.chosen_ref_logps.tolist()) == ([-3.0, -1.0], [-4.0, -0.5])
    assert (found.chosen_tokens.tolist(), found.rejected_tokens.tolist()) == ([2, 1], [1, 3])
    # By how much chosen is likelier. Policy: −3 + 4, −1 + 3; reference: −4 + 3, −.5 + 3.
    assert found.ref_gaps is not None
    assert (found.gaps.tolist(), found.ref_gaps.tolist()) == ([1.0, 2.0], [-1.0, 2.5])
    alone = measured(tmp_path, loss(type="simpo"), POLICY, BASE)
    assert alone.chosen_ref_logps is None and alone.ref_gaps is None and alone.gaps.tolist() == [1.0, 2.0]


def test_margins_of_dpo_are_differences_of_summed_log_ratios(tmp_path: Path):
    # a: (−3 + 4) − (−4 + 3) = 2; b: (−1 + .5) − (−3 + 3) = −.5. Beta has no part in it.
    assert margins(tmp_path, loss(type="sigmoid", beta=0.7), POLICY, BASE) == [2.0, -0.5]


def test_margins_of_other_losses_are_those_that_the_loss_sees(tmp_path: Path):
    # By token: a: 1/2 − (−1/1); b: −.5/1 − 0/3.
    assert margins(tmp_path, loss(type="sigmoid_norm"), POLICY, BASE) == pytest.approx([1.5, -0.5])
    # Means of the policy alone: a: −1.5 + 4; b: −1 + 1.
    assert margins(tmp_path, loss(type="simpo"), POLICY, BASE) == pytest.approx([2.5, 0.0])
    # Tokens behind the shared length weigh nothing: a: (−1 + 2) + 1; b: −.5 − (−.5 + 1).
    assert margins(tmp_path, loss(type="sigmoid", ld_alpha=0.0), POLICY, BASE) == pytest.approx([2.0, -1.0])


def test_a_loss_without_a_reference_needs_no_reference_columns(tmp_path: Path):
    assert margins(tmp_path, loss(type="simpo"), POLICY, None) == [2.5, 0.0]


def test_unpaired_rows_are_compared_in_couples_by_the_order_of_their_ids(tmp_path: Path):
    # Log-ratios: desirable d1 = 1, d2 = 3, d3 = 9; undesirable u1 = −2, u2 = 5. The shards have another order.
    policy: dict[str, Sides] = {
        "u2": ([], [-1.0]), "d3": ([-1.0], []), "d1": ([-1.0], []), "u1": ([], [-3.0]), "d2": ([-1.0, -1.0], []),
    }  # fmt: skip
    base: dict[str, Sides] = {
        "d3": ([-10.0], []), "u1": ([], [-1.0]), "d2": ([-2.0, -3.0], []), "d1": ([-2.0], []), "u2": ([], [-6.0]),
    }  # fmt: skip
    # d1 with u1: 1 − (−2); d2 with u2: 3 − 5; d3 has no counterpart.
    assert margins(tmp_path, loss(type="kto"), policy, base) == [3.0, -2.0]


def test_where_some_rows_are_pairs_only_these_count(tmp_path: Path):
    policy = {**POLICY, "d": ([-1.0], []), "u": ([], [-1.0])}
    base = {**BASE, "d": ([-2.0], []), "u": ([], [-2.0])}
    assert margins(tmp_path, loss(type="kto"), policy, base) == [2, -0.5]


def test_single_answers_of_one_kind_alone_have_no_margin(tmp_path: Path):
    one_kind: dict[str, Sides] = {"d": ([-1.0], []), "e": ([-1.0], [])}
    assert margins(tmp_path, loss(type="kto"), one_kind, one_kind) == []


def test_a_margin_does_not_depend_on_what_it_is_computed_with(tmp_path: Path):
    random = np.random.default_rng(0)

    def logprobs(length: int) -> list[float]:
        return random.normal(-2, 1, size=length).tolist()

    sides = {f"{n:02}": (logprobs(1 + n // 2), logprobs(1 + n % 60)) for n in range(99)}
    base = {name: (logprobs(len(chosen)), logprobs(len(rejected))) for name, (chosen, rejected) in sides.items()}
    whole = margins(tmp_path / "whole", loss(type="sigmoid"), sides, base)
    alone = [margins(tmp_path / name, loss(type="sigmoid"), {name: sides[name]}, base)[0] for name in sides]
    assert whole == alone


def test_equal_models_have_margins_of_exactly_0(tmp_path: Path):
    assert margins(tmp_path, loss(type="sigmoid"), POLICY, POLICY) == [0.0, 0.0]


def test_pairs_that_training_was_steered_by_do_not_count(tmp_path: Path):
    policy = {name: ([-1.0 - n], [-2.0]) for n, name in enumerate("abcdefgh")}
    judges = [name for name in policy if not steers(f"prompt of {name}", 0.5)]
    assert 0 < len(judges) < len(policy)
    assert len(margins(tmp_path, loss(type="sigmoid"), policy, policy, HeldOutRows(0.5))) == len(judges)
    assert len(margins(tmp_path, loss(type="sigmoid"), policy, policy)) == len(policy)


def rows(count: int) -> pa.Table:
    """Held-out rows, but for every fifth."""
    return pa.Table.from_pylist(
        [{"pair_id": f"{n}", "prompt_id": f"{n // 2}", "split": "eval" if n % 5 else "train"} for n in range(count)],
        schema=SPLIT,
    )


def test_of_many_pairs_about_as_many_as_are_asked_for_are_drawn_from_all_of_them():
    there = 8000
    wanted = HeldOutRows.at_most(1000, there)
    counters: Counter[str] = Counter()
    found = wanted.of(rows(10_000), counters)
    assert abs(len(found) - 1000) < 5 * math.sqrt(1000)
    assert counters == {"other_split": 2000, "not_drawn": there - len(found)}
    assert np.histogram(found, bins=10, range=(0, 10_000))[0].min() > 50
    assert wanted.of(rows(10_000), Counter()).tolist() == found.tolist() and (found % 5 != 0).all()
    # Fewer of them are some of these.
    assert set(HeldOutRows.at_most(100, there).of(rows(10_000), Counter())) < set(found)


@pytest.mark.parametrize(("most", "there"), [(10, 10), (10, 3), (10, 0)])
def test_of_few_pairs_all_are_measured(most: int, there: int):
    assert HeldOutRows.at_most(most, there) == HeldOutRows(1.0, 1.0)


def test_nothing_held_out_has_no_margin(tmp_path: Path):
    assert margins(tmp_path, loss(type="sigmoid"), {}, {}) == []


def test_margins_that_are_not_finite_are_an_error_that_names_the_rows(tmp_path: Path):
    damaged = {**POLICY, "b": ([float("nan")], POLICY["b"][1])}
    with pytest.raises(DataError, match=r"1 held-out pairs have margins that are not finite, the first: b\."):
        margins(tmp_path, loss(type="sigmoid"), damaged, BASE)
