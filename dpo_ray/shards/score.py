"""Tokenized pairs → log-probs of their completions, a shard at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from dpo_ray.config import Model, Quantization
from dpo_ray.config.losses import Loss
from dpo_ray.data.pairing import mismatched, mismatched_rows
from dpo_ray.data.quarantine import quarantine_table
from dpo_ray.errors import DataError
from dpo_ray.evaluation.held_out import HeldOutRows, score_table
from dpo_ray.model.version import own_forward
from dpo_ray.pairs import MISMATCHED, SCORES, TokenizedPair, tokenized_pair
from dpo_ray.shards.isolation import Attempts, FailedRow, isolate
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard

if TYPE_CHECKING:
    from dpo_ray.model.pair_scorer import PairScorer

REFERENCE_COLUMNS = ("chosen_ref_logprobs", "rejected_ref_logprobs")

Engine = Literal["vllm", "torch"]


def identity(
    weights: str,
    tokenizer: str,
    dtype: str,
    engine: Engine,
    engine_version: str,
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """What changes the reference scores, beside the rows. Neither beta nor any other training option is in it.

    Args:
        weights, tokenizer: hashes of the model's weights, and of the tokenizer that made the rows' ids.
        quantization: of the weights, where they are scored with as a training holds them.
    """
    return {
        "weights": weights,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "engine": engine,
        "engine_version": engine_version,
        **({"quantization": quantization} if quantization is not None else {}),
    }


def policy_identity(policy: str, dtype: str, loss: Loss, drawn: HeldOutRows) -> dict[str, Any]:
    """What changes a policy's scores, beside the rows. policy: fingerprint of its artifact."""
    return {
        "dtype": dtype,
        "engine_version": own_forward(),
        "policy": policy,
        "loss": loss.model_dump(mode="json"),
        "rows": asdict(drawn),
        "columns": SCORES.names,
    }


class ScoreShard:
    """Tokenized pairs → the same rows with their completion log-probs.

    columns: names of the two columns that are added. With `attempts`, rows that the engine cannot score are
    quarantined; without, they are an error.
    """

    def __init__(self, scorer: PairScorer, columns: tuple[str, str]):
        self.scorer = scorer
        self.columns = columns

    def __call__(self, source: Shard, attempts: Attempts | None = None) -> ShardOutput:
        table = read_whole_shard(Location(source.file))
        counters = Counter(read=table.num_rows)
        scores, failed = _scores(self.scorer, [tokenized_pair(row) for row in table.to_pylist()], attempts)
        quarantine = _quarantined(table, failed, source, counters)
        table = table.take(pa.array(sorted(scores), pa.int64()))
        for side, name in enumerate(self.columns):
            values = [scores[place][side] for place in sorted(scores)]
            table = table.append_column(name, pa.array(values, pa.list_(pa.float32())))
        return ShardOutput(table, counters, quarantine)


class MismatchShard:
    """Reference-scored pairs → the same rows with a mismatched completion each, and its reference log-probs.

    A mismatched completion is the one of another row, see pairing.mismatched_rows: its chosen side for rows at even
    places of the shard and its rejected side at odd ones, so that both kinds occur; of an unpaired row the side that
    it has. Rows without one have null in both columns.
    """

    def __init__(self, scorer: PairScorer):
        self.scorer = scorer

    def __call__(self, source: Shard, attempts: Attempts | None = None) -> ShardOutput:
        table = read_whole_shard(Location(source.file))
        rows = table.to_pylist()
        others = mismatched_rows(table["prompt_id"].to_pylist(), table["split"].to_pylist())
        ids: list[list[int] | None] = []
        masks: list[list[bool] | None] = []
        for place, other in enumerate(others):
            sides = ("chosen", "rejected") if place % 2 == 0 else ("rejected", "chosen")
            side = None if other is None else sides[0] if rows[other][f"{sides[0]}_ids"] else sides[1]
            ids.append(None if other is None else rows[other][f"{side}_ids"])
            masks.append(None if other is None else rows[other].get(f"{side}_mask"))
        for name, values in (("mismatched_ids", ids), ("mismatched_mask", masks)):
            table = table.append_column(name, pa.array(values, MISMATCHED.field(name).type))
        pairs = mismatched([tokenized_pair(row) for row in table.to_pylist()])
        places = [place for place, completion in enumerate(ids) if completion is not None]
        scores, failed = _scores(self.scorer, pairs, attempts)
        failed = [row.model_copy(update={"place": places[row.place]}) for row in failed]
        logprobs: list[list[float] | None] = [None] * table.num_rows
        for n, (scored, _) in scores.items():
            logprobs[places[n]] = scored
        column = pa.array(logprobs, MISMATCHED.field("mismatched_ref_logprobs").type)
        table = table.append_column("mismatched_ref_logprobs", column)
        counters = Counter(read=table.num_rows)
        quarantine = _quarantined(table, failed, source, counters)
        kept = sorted(set(range(table.num_rows)) - {row.place for row in failed})
        return ShardOutput(table.take(pa.array(kept, pa.int64())), counters, quarantine)


def _scores(
    scorer: PairScorer, pairs: Sequence[TokenizedPair], attempts: Attempts | None
) -> tuple[dict[int, tuple[list[float], list[float]]], list[FailedRow]]:
    """Log-probs of chosen and of rejected by place, and the places that have none."""

    def score(first: int, count: int) -> list[tuple[list[float], list[float]]]:
        return list(zip(*scorer.score(pairs[first : first + count]), strict=True))

    def score_finite(first: int, count: int) -> list[tuple[list[float], list[float]]]:
        scored = score(first, count)
        wrong = [n for n, (a, b) in enumerate(scored, start=first) if not all(map(math.isfinite, (*a, *b)))]
        if wrong:
            raise DataError(
                f"The log-probs of {len(wrong)} of {count} rows are not finite, the first: {pairs[wrong[0]].pair_id}. "
                "The weights may be damaged, or model.dtype too narrow: try float32."
            )
        return scored

    if attempts is None:
        return dict(enumerate(score(0, len(pairs)))), []
    return isolate(len(pairs), score_finite, attempts)


def _quarantined(table: pa.Table, failed: list[FailedRow], source: Shard, counters: Counter[str]) -> pa.Table | None:
    """The quarantine's rows, counted by their reasons; None where nothing failed."""
    counters.update(row.reason for row in failed)
    bad = [
        {
            "source": source.file,
            "row": row.place,
            "reason": row.reason,
            "raw": json.dumps({"pair_id": table["pair_id"][row.place].as_py(), "message": row.message}),
        }
        for row in failed
    ]
    return quarantine_table(bad)


class TorchScoreShard(ScoreShard):
    """The reference stage with the trainer's forward."""

    def __init__(self, model: Model):
        super().__init__(_own_scorer(model), REFERENCE_COLUMNS)


class TorchMismatchShard(MismatchShard):
    """The mismatched stage with the trainer's forward."""

    def __init__(self, model: Model):
        super().__init__(_own_scorer(model))


class PolicyScoreShard:
    """What a policy gives to held-out pairs, as the loss sees it: SCORES."""

    def __init__(self, model: Model, loss: Loss, rows: HeldOutRows):
        self.scorer = _own_scorer(model)
        self.loss = loss
        self.rows = rows

    def __call__(self, source: Shard) -> ShardOutput:
        table = read_whole_shard(Location(source.file))
        counters = Counter(read=table.num_rows)
        table = table.take(pa.array(self.rows.of(table, counters)))
        rows = table.to_pylist()
        scored = zip(*self.scorer.score([tokenized_pair(row) for row in rows]), strict=True)
        return ShardOutput(score_table(self.loss, rows, list(scored)), counters)


def _own_scorer(model: Model) -> PairScorer:
    # Not above: who only names these classes does without torch.
    from dpo_ray.model.pair_scorer import TorchScorer

    return TorchScorer(model)
