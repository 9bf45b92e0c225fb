"""What the held-out pairs tell: scores of policy and reference, joined by the pairs' ids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config.losses import Loss
from dpo_ray.errors import DataError
from dpo_ray.pairs import steers
from dpo_ray.storage.artifact import Artifact, read_shard

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs."""

    margins: np.ndarray
    """[n] as the loss sees them, without its scale beta, in nats."""
    chosen_logps: np.ndarray
    """[n] summed log-probs of the chosen completions under the policy, in nats."""
    chosen_ref_logps: np.ndarray | None
    """[n] the same under the reference; None for a loss without one."""
    chosen_tokens: np.ndarray
    """[n]"""
    rejected_tokens: np.ndarray
    """[n]"""


def held_out_pairs(loss: Loss, scores: Artifact, rows: Artifact, eval_fraction: float = 1.0) -> HeldOut:
    """The held-out pairs, joined by pair_id, in the order of the rows.

    Unpaired rows have no margin of their own: where no row has both sides, the i-th desirable and the i-th
    undesirable row, each in the order of their pair_id, make a couple, and its margin is the difference of their
    rewards; n is then the smaller of the two counts. Where some rows are pairs, only these count.

    Where training was steered by some of the prompts (train.eval_fraction below 1), only the pairs of the others count.

    Args:
        eval_fraction: train.eval_fraction.
        scores: what score_policy made of `rows`.
        rows: what was trained on: the reference artifact; for a loss without a reference the tokenized one.

    Raises DataError on a gap between the two, and on margins that are not finite.
    """
    policy: dict[str, _Sides] = {}
    for shard in scores.shards():
        table = read_shard(shard)
        policy.update(zip(table["pair_id"].to_pylist(), _sides(table, "chosen", "rejected"), strict=True))
    scored: dict[str, _Scored] = {}
    missing = []
    for shard in rows.shards():
        table = read_shard(shard)
        table = table.filter(pc.equal(table["split"], "eval"))
        if eval_fraction < 1:
            table = table.filter(
                pa.array([not steers(i, eval_fraction) for i in table["prompt_id"].to_pylist()], pa.bool_())
            )
        reference: Iterable[_Sides | None] = repeat(None, table.num_rows)
        if loss.needs_reference:
            reference = _sides(table, "chosen_ref", "rejected_ref")
        for pair_id, of_reference in zip(table["pair_id"].to_pylist(), reference, strict=True):
            if pair_id in policy:
                scored[pair_id] = _Scored(policy[pair_id], of_reference)
            else:
                missing.append(pair_id)
    if missing:
        raise DataError(
            f"{len(missing)} held-out pairs of {rows.location} have no scores in {scores.location}, the first: "
            f"{', '.join(missing[:5])}. Remove the latter; it will be computed again."
        )
    couples = _couples(scored)
    margins = _margins(loss, list(couples.values()))
    wrong = [name for name, margin in zip(couples, margins, strict=True) if not math.isfinite(margin)]
    if wrong:
        raise DataError(
            f"{len(wrong)} held-out pairs have margins that are not finite, the first: {', '.join(wrong[:5])}. The "
            "policy's weights are damaged: look at the loss in metrics.jsonl, and train with a lower learning rate."
        )
    return HeldOut(
        margins=margins,
        chosen_logps=np.array([row.policy[0].sum(dtype=float) for row in couples.values()]),
        chosen_ref_logps=np.array([row.reference[0].sum(dtype=float) for row in couples.values() if row.reference])
        if loss.needs_reference
        else None,
        chosen_tokens=np.array([len(row.policy[0]) for row in couples.values()]),
        rejected_tokens=np.array([len(row.policy[1]) for row in couples.values()]),
    )


_Sides = tuple[np.ndarray, np.ndarray]
"""Token log-probs of chosen and of rejected, [tokens] each, in nats."""


class _Scored(NamedTuple):
    """A row's log-probs under the policy and, where the loss asks for it, under the reference."""

    policy: _Sides
    reference: _Sides | None


def _sides(table: pa.Table, chosen: str, rejected: str) -> list[_Sides]:
    columns = [[row.values.to_numpy() for row in table[f"{name}_logprobs"]] for name in (chosen, rejected)]
    return list(zip(*columns, strict=True))


def _couples(rows: dict[str, _Scored]) -> dict[str, _Scored]:
    """Those that have two sides; where there are none, desirable and undesirable rows in couples."""
    has = {pair_id: (len(row.policy[0]) > 0, len(row.policy[1]) > 0) for pair_id, row in rows.items()}
    pairs = {pair_id: row for pair_id, row in rows.items() if all(has[pair_id])}
    if pairs:
        return pairs
    desirable, undesirable = (sorted(pair_id for pair_id in rows if has[pair_id][side]) for side in (0, 1))
    couples = {}
    for good, bad in zip(desirable, undesirable, strict=False):  # the rest of the larger side has no counterpart
        one, other = rows[good], rows[bad]
        reference = (one.reference[0], other.reference[1]) if one.reference and other.reference else None
        couples[f"{good} with {bad}"] = _Scored((one.policy[0], other.policy[1]), reference)
    return couples


def _margins(loss: Loss, rows: list[_Scored]) -> np.ndarray:
    # Not above: a run that takes everything over computes no margin, and does without torch.
    import torch

    from dpo_ray.losses.objective import preference_margins
    from dpo_ray.losses.pair_logps import pair_logps

    margins = [np.empty(0)]
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[first : first + _ROWS_AT_ONCE]
        policy = [side for row in part for side in row.policy]
        reference = [side for row in part if row.reference is not None for side in row.reference]
        logps = pair_logps(
            torch.from_numpy(np.concatenate(policy).astype(np.float64)),
            torch.from_numpy(np.repeat(np.arange(len(policy)), [len(side) for side in policy])),
            len(part),
            ref_token_logprobs=torch.from_numpy(np.concatenate(reference)) if reference else None,
            ld_alpha=loss.token_tail_weight,
        )
        margins.append(preference_margins(loss, logps).numpy())
    return np.concatenate(margins)
