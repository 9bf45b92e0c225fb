"""Margins of held-out rows as the loss sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from dpo_ray.config.losses import Loss
from dpo_ray.errors import DataError
from dpo_ray.evaluation.held_out import held_out_pairs
from dpo_ray.pairs import REFERENCE, SCORES, TOKENIZED, steers
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location

Sides = tuple[list[float], list[float]]


def loss(**options: Any) -> Loss:
    return TypeAdapter(Loss).validate_python(options)


def artifact(folder: Path, kind: str, shards: list[pa.Table]) -> Artifact:
    location = Location.of(folder) / kind
    files = [write_shard(location / f"{i}.parquet", table, {}) for i, table in enumerate(shards)]
    return publish(location, kind, identity={}, inputs={}, files=files)


def scores(folder: Path, rows: dict[str, Sides]) -> Artifact:
    """One shard of a policy's token log-probs by pair_id."""
    values = [{"pair_id": i, "chosen_logprobs": c, "rejected_logprobs": r} for i, (c, r) in rows.items()]
    return artifact(folder, "policy_scores", [pa.Table.from_pylist(values, schema=SCORES)])


def reference(folder: Path, rows: dict[str, Sides], split: str = "eval") -> Artifact:
    """A shard a row of reference token log-probs by pair_id, and a last shard with a row of the training side."""
    shards = [
        {
            "pair_id": pair_id,
            "prompt_id": f"prompt of {pair_id}",
            "split": split,
            "prompt_ids": [1],
            "chosen_ids": [2] * len(chosen),
            "rejected_ids": [3] * len(rejected),
            "chosen_ref_logprobs": chosen,
            "rejected_ref_logprobs": rejected,
        }
        for pair_id, (chosen, rejected) in rows.items()
    ]
    shards.append({**shards[0], "pair_id": "training", "prompt_id": "t", "split": "train"})
    return artifact(folder, "reference", [pa.Table.from_pylist([row], schema=REFERENCE) for row in shards])


POLICY: dict[str, Sides] = {"a": ([-1.0, -2.0], [-4.0]), "b": ([-1.0], [-0.5, -0.5, -2.0])}


BASE: dict[str, Sides] = {"a": ([-2.0, -2.0], [-3.0]), "b": ([-0.5], [-1.0, -1.0, -1.0])}


def held_out_margins(*given: Any) -> Any:
    return held_out_pairs(*given).margins


def test_the_chosen_answers_have_their_log_probs_under_both_and_all_have_their_lengths(tmp_path: Path):
    found = held_out_pairs(loss(type="sigmoid"), scores(tmp_path, POLICY), reference(tmp_path, BASE))
    assert found.chosen_ref_logps is not None
    assert (found.chosen_logps.tolist(), found.chosen_ref_logps.tolist()) == ([-3.0, -1.0], [-4.0, -0.5])
    assert (found.chosen_tokens.tolist(), found.rejected_tokens.tolist()) == ([2, 1], [1, 3])
    alone = held_out_pairs(loss(type="simpo"), scores(tmp_path, POLICY), reference(tmp_path, BASE))
    assert alone.chosen_ref_logps is None


def test_margins_of_dpo_are_differences_of_summed_log_ratios(tmp_path: Path):
    margins = held_out_margins(loss(type="sigmoid", beta=0.7), scores(tmp_path, POLICY), reference(tmp_path, BASE))
    # a: (−3 + 4) − (−4 + 3) = 2; b: (−1 + .5) − (−3 + 3) = −.5. Beta has no part in it.
    assert margins.tolist() == [2.0, -0.5]


def test_margins_of_other_losses_are_those_that_the_loss_sees(tmp_path: Path):
    made, base = scores(tmp_path, POLICY), reference(tmp_path, BASE)
    # By token: a: 1/2 − (−1/1); b: −.5/1 − 0/3.
    assert held_out_margins(loss(type="sigmoid_norm"), made, base).tolist() == pytest.approx([1.5, -0.5])
    # Means of the policy alone: a: −1.5 + 4; b: −1 + 1.
    assert held_out_margins(loss(type="simpo"), made, base).tolist() == pytest.approx([2.5, 0.0])
    # Tokens behind the shared length weigh nothing: a: (−1 + 2) + 1; b: −.5 − (−.5 + 1).
    options = loss(type="sigmoid", ld_alpha=0.0)
    assert held_out_margins(options, made, base).tolist() == pytest.approx([2.0, -1.0])


def test_a_loss_without_a_reference_needs_no_reference_columns(tmp_path: Path):
    rows = [
        {"pair_id": i, "prompt_id": i, "split": "eval", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
        for i in POLICY
    ]
    tokenized = artifact(tmp_path, "tokenized", [pa.Table.from_pylist(rows, schema=TOKENIZED)])
    assert held_out_margins(loss(type="simpo"), scores(tmp_path, POLICY), tokenized).tolist() == [2.5, 0.0]


def test_unpaired_rows_are_compared_in_couples_by_the_order_of_their_ids(tmp_path: Path):
    # Log-ratios: desirable d1 = 1, d2 = 3, d3 = 9; undesirable u1 = −2, u2 = 5. The shards have another order.
    policy: dict[str, Sides] = {
        "u2": ([], [-1.0]), "d3": ([-1.0], []), "d1": ([-1.0], []), "u1": ([], [-3.0]), "d2": ([-1.0, -1.0], []),
    }  # fmt: skip
    base: dict[str, Sides] = {
        "d3": ([-10.0], []), "u1": ([], [-1.0]), "d2": ([-2.0, -3.0], []), "d1": ([-2.0], []), "u2": ([], [-6.0]),
    }  # fmt: skip
    margins = held_out_margins(loss(type="kto"), scores(tmp_path, policy), reference(tmp_path, base))
    # d1 with u1: 1 − (−2); d2 with u2: 3 − 5; d3 has no counterpart.
    assert margins.tolist() == [3.0, -2.0]


def test_where_some_rows_are_pairs_only_these_count(tmp_path: Path):
    policy = {**POLICY, "d": ([-1.0], []), "u": ([], [-1.0])}
    base = {**BASE, "d": ([-2.0], []), "u": ([], [-2.0])}
    assert held_out_margins(loss(type="kto"), scores(tmp_path, policy), reference(tmp_path, base)).tolist() == [2, -0.5]


def test_single_answers_of_one_kind_alone_have_no_margin(tmp_path: Path):
    one_kind: dict[str, Sides] = {"d": ([-1.0], []), "e": ([-1.0], [])}
    assert len(held_out_margins(loss(type="kto"), scores(tmp_path, one_kind), reference(tmp_path, one_kind))) == 0


def test_pairs_that_training_was_steered_by_do_not_count(tmp_path: Path):
    rows = {name: ([-1.0 - n], [-2.0]) for n, name in enumerate("abcdefgh")}
    judges = [name for name in rows if not steers(f"prompt of {name}", 0.5)]
    assert 0 < len(judges) < len(rows)
    found = held_out_margins(loss(type="sigmoid"), scores(tmp_path, rows), reference(tmp_path, dict(rows)), 0.5)
    assert len(found) == len(judges)
    whole = held_out_margins(loss(type="sigmoid"), scores(tmp_path, rows), reference(tmp_path, dict(rows)))
    assert len(whole) == len(rows)


def test_nothing_held_out_has_no_margin(tmp_path: Path):
    assert len(held_out_margins(loss(type="sigmoid"), scores(tmp_path, {}), reference(tmp_path, BASE, "train"))) == 0


def test_a_held_out_row_without_scores_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"1 held-out pairs .* have no scores in .*: b\. Remove"):
        held_out_margins(loss(type="sigmoid"), scores(tmp_path, {"a": POLICY["a"]}), reference(tmp_path, BASE))


def test_margins_that_are_not_finite_are_an_error_that_names_the_rows(tmp_path: Path):
    damaged = {**POLICY, "b": ([float("nan")], POLICY["b"][1])}
    with pytest.raises(DataError, match=r"1 held-out pairs have margins that are not finite, the first: b\."):
        held_out_margins(loss(type="sigmoid"), scores(tmp_path, damaged), reference(tmp_path, BASE))
