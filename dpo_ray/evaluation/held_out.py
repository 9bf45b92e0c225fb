"""What the held-out pairs tell: which of them are measured, a policy's scores of them, and what these add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config.losses import Loss
from dpo_ray.errors import DataError
from dpo_ray.pairs import SCORES, TIE, drawn, steers
from dpo_ray.storage.artifact import Artifact, read_shard

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HeldOutRows:
    """Which rows a policy is measured on."""

    eval_fraction: float = 1.0
    """train.eval_fraction: where training was steered by some of the prompts, only the pairs of the others count."""
    share: float = 1.0
    """Of those pairs, how many are drawn."""

    @classmethod
    def at_most(cls, max_pairs: int, num_pairs: int, eval_fraction: float = 1.0) -> HeldOutRows:
        """So many of the pairs, about, drawn at random, or all if there are fewer.

        num_pairs: held-out pairs of the prompts that count.
        """
        return cls(eval_fraction, min(1.0, max_pairs / num_pairs) if num_pairs else 1.0)

    def of(self, table: pa.Table, counters: Counter[str]) -> np.ndarray:
        """[n] row numbers of a shard, ascending; what is passed over is counted. Of ties neither answer is right."""
        rows = np.flatnonzero(pc.equal(table["split"], "eval").to_numpy())
        counters["other_split"] = table.num_rows - len(rows)
        if "preference" in table.column_names and table["preference"].null_count < table.num_rows:
            apart = rows[table["preference"].fill_null(1.0).to_numpy()[rows] != TIE]
            counters["no_preference"], rows = len(rows) - len(apart), apart
        if self.eval_fraction < 1:
            prompts = table["prompt_id"].take(pa.array(rows)).to_pylist()
            judges = rows[np.array([not steers(prompt, self.eval_fraction) for prompt in prompts], dtype=bool)]
            counters["steering"], rows = len(rows) - len(judges), judges
        if self.share < 1:
            pairs = table["pair_id"].take(pa.array(rows)).to_pylist()
            wanted = rows[np.array([drawn(pair, self.share) for pair in pairs], dtype=bool)]
            counters["not_drawn"], rows = len(rows) - len(wanted), wanted
        return rows


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs."""

    margins: np.ndarray
    """[n] as the loss sees them, without its scale beta, in nats."""
    chosen_logps: np.ndarray
    """[n] summed log-probs of the chosen completions under the policy, in nats."""
    chosen_ref_logps: np.ndarray | None
    """[n] the same under the reference; None for a loss without one."""
    gaps: np.ndarray
    """[n] by how much the chosen completion is likelier than the rejected one under the policy: the difference of
    their summed log-probs, in nats."""
    ref_gaps: np.ndarray | None
    """[n] the same under the reference; None for a loss without one."""
    chosen_tokens: np.ndarray
    """[n]"""
    rejected_tokens: np.ndarray
    """[n]"""
    sources: np.ndarray
    """[n] the source of a mixture that each pair is of, None of none; of a couple of two sources it is None too."""


def held_out_pairs(scores: Artifact) -> HeldOut:
    """The held-out pairs that a policy was measured on, in the order of their pair_id.

    Unpaired rows have no margin of their own: where no row has both sides, the i-th desirable and the i-th
    undesirable row make a couple, and its margin is the difference of their rewards; n is then the smaller of the two
    counts. Where some rows are pairs, only these count.

    Args:
        scores: what score_policy made.

    Raises DataError on margins that are not finite.
    """
    tables = [SCORES.empty_table(), *(read_shard(shard) for shard in scores.shards())]
    table = pa.concat_tables([table.replace_schema_metadata() for table in tables]).sort_by("pair_id")
    good, bad = _couples(table)
    column = {name: table[name].to_numpy() for name in SCORES.names if name not in {"pair_id", "source"}}
    sources = np.array(table["source"].to_pylist(), dtype=object)
    margins = column["chosen_reward"][good] - column["rejected_reward"][bad]
    wrong = np.flatnonzero(~np.isfinite(margins))
    if len(wrong):
        ids = table["pair_id"]
        named = [" with ".join({str(ids[side[n]]): None for side in (good, bad)}) for n in wrong[:5]]
        raise DataError(
            f"{len(wrong)} held-out pairs have margins that are not finite, the first: {', '.join(named)}. The "
            "policy's weights are damaged: look at the loss in metrics.jsonl, and train with a lower learning rate."
        )
    with_reference = table["chosen_ref_logps"].null_count < table.num_rows
    return HeldOut(
        margins=margins,
        chosen_logps=column["chosen_logps"][good],
        chosen_ref_logps=column["chosen_ref_logps"][good] if with_reference else None,
        gaps=column["chosen_logps"][good] - column["rejected_logps"][bad],
        ref_gaps=column["chosen_ref_logps"][good] - column["rejected_ref_logps"][bad] if with_reference else None,
        chosen_tokens=column["chosen_tokens"][good],
        rejected_tokens=column["rejected_tokens"][bad],
        sources=np.array([a if a == b else None for a, b in zip(sources[good], sources[bad], strict=True)], object),
    )


def _couples(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """[n] rows of the chosen completions, and [n] of the rejected ones: the same where rows have two sides."""
    has = [table[f"{side}_tokens"].to_numpy() > 0 for side in ("chosen", "rejected")]
    pairs = np.flatnonzero(has[0] & has[1])
    if len(pairs):
        return pairs, pairs
    desirable, undesirable = np.flatnonzero(has[0]), np.flatnonzero(has[1])
    count = min(len(desirable), len(undesirable))  # the rest of the larger side has no counterpart
    return desirable[:count], undesirable[:count]


def score_table(
    loss: Loss, rows: Sequence[dict[str, Any]], scored: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> pa.Table:
    """What a policy gives to some rows, as SCORES.

    Args:
        rows: of a tokenized, reference or mismatched shard.
        scored: for each the policy's token log-probs of chosen and of rejected, in nats.
    """
    # Not above: who only reads scores does without torch.
    import torch

    from dpo_ray.losses.objective import unscaled_rewards
    from dpo_ray.losses.pair_logps import pair_logps

    found: list[dict[str, Any]] = []
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[begin : begin + _ROWS_AT_ONCE]
        policy = [side for sides in scored[begin : begin + _ROWS_AT_ONCE] for side in sides]
        reference = (
            [row[f"{side}_ref_logprobs"] for row in part for side in ("chosen", "rejected")]
            if (loss.needs_reference)
            else None
        )
        logps = pair_logps(
            _joined(policy),
            torch.from_numpy(np.repeat(np.arange(len(policy)), [len(side) for side in policy])),
            len(part),
            ref_token_logprobs=None if reference is None else _joined(reference),
            ld_alpha=loss.token_tail_weight,
        )
        rewards = [values.tolist() for values in unscaled_rewards(loss, logps)]
        for n, row in enumerate(part):
            chosen, rejected = policy[2 * n], policy[2 * n + 1]
            found.append(
                {
                    "pair_id": row["pair_id"],
                    "chosen_tokens": len(chosen),
                    "rejected_tokens": len(rejected),
                    "chosen_reward": rewards[0][n] if len(chosen) else None,
                    "rejected_reward": rewards[1][n] if len(rejected) else None,
                    "chosen_logps": float(np.sum(chosen, dtype=np.float64)),
                    "rejected_logps": float(np.sum(rejected, dtype=np.float64)),
                    "chosen_ref_logps": None
                    if reference is None
                    else float(np.sum(reference[2 * n], dtype=np.float64)),
                    "rejected_ref_logps": None
                    if reference is None
                    else float(np.sum(reference[2 * n + 1], dtype=np.float64)),
                    "source": row.get("source"),
                }
            )
    return pa.Table.from_pylist(found, schema=SCORES)


def _joined(sides: Sequence[Sequence[float]]) -> Any:
    """[N] float64 tensor of token log-probs. As float32 they were stored, and so policy and reference are alike."""
    import torch

    values = [np.asarray(side, dtype=np.float32) for side in sides]
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *values]).astype(np.float64))
