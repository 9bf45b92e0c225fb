"""The model stages over tokenized pairs: reference scores, of mismatched completions too, and a policy's scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dpo_ray.config import Config, Model
from dpo_ray.config.losses import Loss
from dpo_ray.errors import DataError
from dpo_ray.losses.objective import preference_margins
from dpo_ray.losses.pair_logps import pair_logps
from dpo_ray.model.folders import resolve, weights_hash
from dpo_ray.on_ray.calibrate import choose_engine, max_pair_tokens
from dpo_ray.on_ray.pool import ShardFunction, shard_stage, shard_tasks
from dpo_ray.on_ray.score_shards import (
    PolicyScoreShard,
    TorchMismatchShard,
    TorchScoreShard,
    VLLMMismatchShard,
    VLLMScoreShard,
)
from dpo_ray.on_ray.trainer import MODEL_FOLDER
from dpo_ray.on_ray.vllm_engine import own_forward, require_vllm, torch_pool, vllm_pool
from dpo_ray.storage.artifact import Artifact, read_shard
from dpo_ray.storage.location import Location

_ROWS_AT_ONCE = 4096


def score_reference(output: Location, config: Config, tokenized: Artifact) -> tuple[Artifact, bool]:
    """Reference log-probs of every tokenized pair. Neither beta nor any other training option is in its identity."""
    engine = choose_engine(output, config, tokenized)
    return _score(output, config, "reference", tokenized, engine, VLLMScoreShard, TorchScoreShard)


def score_mismatched(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """The rows of a reference artifact, each with a mismatched completion and its reference log-probs.

    A stage of its own, so that the reference artifact stays the one that every other loss shares.
    """
    engine = config.reference.engine
    if engine == "auto":
        engine = reference.manifest.identity["engine"]
    return _score(output, config, "mismatched", reference, engine, VLLMMismatchShard, TorchMismatchShard)


def _score(
    output: Location,
    config: Config,
    kind: str,
    rows: Artifact,
    engine: str,
    vllm_work: Callable[..., ShardFunction],
    torch_work: Callable[..., ShardFunction],
) -> tuple[Artifact, bool]:
    """A stage in which the model of the configuration, as an engine runs it, scores the rows of an artifact."""
    model = config.model
    identity: dict[str, Any] = {
        "weights": weights_hash(resolve(model.path, model.revision)),
        "tokenizer": rows.manifest.identity["tokenizer"],
        "dtype": model.dtype,
        "engine": engine,
    }
    if engine == "vllm":
        identity["engine_version"] = require_vllm("reference.engine=vllm")
        arguments = {"model": model, "options": config.vllm, "max_model_len": max_pair_tokens(config)}
        pool = vllm_pool(config, vllm_work, arguments)
    else:
        identity["engine_version"] = own_forward()
        pool = torch_pool(config, torch_work, {"model": model})
    return shard_stage(
        output,
        kind,
        identity=identity,
        inputs={rows.manifest.kind: rows.fingerprint},
        tasks=shard_tasks(rows),
        pool=replace(pool, isolates=True),
        unit="pairs",
    )


def score_policy(output: Location, config: Config, policy: Artifact, pairs: Artifact) -> tuple[Artifact, bool]:
    """A trained policy's log-probs of the held-out pairs of a tokenized, reference or mismatched artifact."""
    folder = (policy.location / MODEL_FOLDER).uri
    model = Model(path=folder, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    return shard_stage(
        output,
        "policy_scores",
        identity={"dtype": model.dtype, "engine_version": own_forward(), "policy": policy.fingerprint},
        inputs={"policy": policy.fingerprint, pairs.manifest.kind: pairs.fingerprint},
        tasks=shard_tasks(pairs),
        pool=torch_pool(config, PolicyScoreShard, {"model": model}),
        unit="pairs",
    )


def held_out_margins(loss: Loss, scores: Artifact, pairs: Artifact) -> np.ndarray:
    """Margins [n] of the held-out pairs as the loss sees them, without its scale beta, joined by pair_id.

    Unpaired rows have no margin of their own: where no row has both sides, the i-th desirable and the i-th
    undesirable row, each in the order of their pair_id, make a couple, and its margin is the difference of their
    rewards; n is then the smaller of the two counts. Where some rows are pairs, only these count.

    Args:
        scores: what score_policy made of `pairs`.
        pairs: the reference artifact; for a loss without a reference the tokenized one.

    Raises DataError on a gap between the two, and on margins that are not finite.
    """
    policy: dict[str, _Sides] = {}
    for shard in scores.shards():
        table = read_shard(shard)
        policy.update(zip(table["pair_id"].to_pylist(), _sides(table, "chosen", "rejected"), strict=True))
    rows: dict[str, _Scored] = {}
    missing = []
    for shard in pairs.shards():
        table = read_shard(shard)
        table = table.filter(pc.equal(table["split"], "eval"))
        reference: Iterable[_Sides | None] = repeat(None, table.num_rows)
        if loss.needs_reference:
            reference = _sides(table, "chosen_ref", "rejected_ref")
        for pair_id, of_reference in zip(table["pair_id"].to_pylist(), reference, strict=True):
            if pair_id in policy:
                rows[pair_id] = _Scored(policy[pair_id], of_reference)
            else:
                missing.append(pair_id)
    if missing:
        raise DataError(
            f"{len(missing)} held-out pairs of {pairs.location} have no scores in {scores.location}, the first: "
            f"{', '.join(missing[:5])}. Remove the latter; it will be computed again."
        )
    couples = _couples(rows)
    margins = _margins(loss, list(couples.values()))
    wrong = [name for name, margin in zip(couples, margins, strict=True) if not math.isfinite(margin)]
    if wrong:
        raise DataError(
            f"{len(wrong)} held-out pairs have margins that are not finite, the first: {', '.join(wrong[:5])}. The "
            "policy's weights are damaged: look at the loss in metrics.jsonl, and train with a lower learning rate."
        )
    return margins


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
