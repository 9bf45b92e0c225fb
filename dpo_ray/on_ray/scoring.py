"""The model stages over tokenized pairs: reference scores, of mismatched completions too, their calibration, and a
policy's scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dpo_ray.artifacts import Artifact, fingerprint, library_versions, load, publish, read_shard
from dpo_ray.config import Config, Model
from dpo_ray.errors import DataError, ReferenceMismatch
from dpo_ray.evaluation import calibration
from dpo_ray.loss_options import Loss
from dpo_ray.losses import pair_logps, preference_margins
from dpo_ray.model import FORWARD
from dpo_ray.model_folders import resolve, weights_hash
from dpo_ray.on_ray.engines import (
    PolicyScoreShard,
    TorchMismatchShard,
    TorchScorer,
    TorchScoreShard,
    VLLMMismatchShard,
    VLLMScoreShard,
    require_vllm,
    torch_pool,
    vllm_pool,
)
from dpo_ray.on_ray.session import connect, raise_ours
from dpo_ray.on_ray.shards import ShardFunction, shard_stage, shard_tasks
from dpo_ray.on_ray.trainer import MODEL_FOLDER
from dpo_ray.pairs import TokenizedPair, tokenized_pair
from dpo_ray.progress import say
from dpo_ray.storage import Location

_ROWS_AT_ONCE = 4096


def score_reference(output: Location, config: Config, tokenized: Artifact) -> tuple[Artifact, bool]:
    """Reference log-probs of every tokenized pair. Neither beta nor any other training option is in its identity."""
    return _score(output, config, "reference", tokenized, VLLMScoreShard, TorchScoreShard)


def score_mismatched(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """The rows of a reference artifact, each with a mismatched completion and its reference log-probs.

    A stage of its own, so that the reference artifact stays the one that every other loss shares.
    """
    return _score(output, config, "mismatched", reference, VLLMMismatchShard, TorchMismatchShard)


def _score(
    output: Location,
    config: Config,
    kind: str,
    rows: Artifact,
    vllm_work: Callable[..., ShardFunction],
    torch_work: Callable[..., ShardFunction],
) -> tuple[Artifact, bool]:
    """A stage in which the model of the configuration, as reference.engine runs it, scores the rows of an artifact."""
    model = config.model
    identity: dict[str, Any] = {
        "weights": weights_hash(resolve(model.path, model.revision)),
        "tokenizer": rows.manifest.identity["tokenizer"],
        "dtype": model.dtype,
        "engine": config.reference.engine,
    }
    if config.reference.engine == "vllm":
        identity["engine_version"] = require_vllm("reference.engine=vllm")
        length = config.data.max_prompt_tokens + config.data.max_completion_tokens
        arguments = {"model": model, "options": config.vllm, "max_model_len": length}
        pool = vllm_pool(config, vllm_work, arguments)
    else:
        identity["engine_version"] = _own_forward()
        pool = torch_pool(config, torch_work, {"model": model})
    return shard_stage(
        output,
        kind,
        identity=identity,
        inputs={rows.manifest.kind: rows.fingerprint},
        tasks=shard_tasks(rows),
        pool=pool,
        unit="pairs",
    )


def _own_forward() -> str:
    return f"torch {library_versions()['torch']}, forward {FORWARD}"


def calibrate(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """Score some pairs again with the trainer's own forward; the artifact holds how far the two are apart.

    Raises ReferenceMismatch where a completion differs by more than reference.tolerance.
    """
    kind = "calibration"
    identity = {"pairs": config.reference.calibration_pairs, "engine_version": _own_forward()}
    inputs = {"reference": reference.fingerprint}
    location = output / "artifacts" / kind / fingerprint(kind, identity, inputs)
    artifact = load(location, kind, location.name)
    reused = artifact is not None
    if artifact is None:
        pairs = _sample(reference, config.reference.calibration_pairs)
        say(kind, f"scoring {len(pairs)} pairs again with the trainer's forward")
        metrics = _calibrate(config, pairs)
        if not math.isfinite(metrics["sequence"]["max"]):
            raise ReferenceMismatch(
                f"Of {len(pairs)} pairs, some have log-probs that are not finite, by {config.reference.engine} or by "
                "the trainer's own forward. The weights may be damaged, or model.dtype too narrow: try float32."
            )
        artifact = publish(location, kind, identity=identity, inputs=inputs, files=[], metrics=metrics)
    metrics = artifact.manifest.metrics
    worst, limit = metrics["sequence"]["max"], config.reference.tolerance
    say(
        kind,
        f"|Δ| per token p50 {metrics['token']['p50']:.1e}, max {metrics['token']['max']:.1e}; per sequence p50 "
        f"{metrics['sequence']['p50']:.1e}, max {worst:.1e} nats (tolerance {limit:g})",
    )
    if not worst <= limit:
        raise ReferenceMismatch(
            f"The reference log-probs (engine {config.reference.engine}, {config.model.dtype}) and the trainer's own "
            f"forward differ by up to {worst:.3g} nats on one completion, over reference.tolerance={limit:g}; the mean "
            f"difference per token is {metrics['bias_per_token']:.1e}. Training would start from a wrong zero. Set "
            "reference.engine=torch, or model.dtype=float32, or, knowing what it means, a larger reference.tolerance."
        )
    return artifact, reused


def score_policy(output: Location, config: Config, policy: Artifact, pairs: Artifact) -> tuple[Artifact, bool]:
    """A trained policy's log-probs of the held-out pairs of a tokenized, reference or mismatched artifact."""
    folder = (policy.location / MODEL_FOLDER).uri
    model = Model(path=folder, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    return shard_stage(
        output,
        "policy_scores",
        identity={"dtype": model.dtype, "engine_version": _own_forward(), "policy": policy.fingerprint},
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


def _sample(reference: Artifact, count: int) -> list[TokenizedPair]:
    """Pairs spread evenly over the shards, the first rows of each: the same ones every time."""
    shards = reference.shards()
    pairs: list[TokenizedPair] = []
    for i, shard in enumerate(shards):
        wanted = -(-(count - len(pairs)) // (len(shards) - i))
        pairs += [tokenized_pair(row) for row in read_shard(shard).slice(0, wanted).to_pylist()]
    if not pairs:
        raise DataError(f"{reference.location} holds no pairs, so there is nothing to train on.")
    return pairs


def _calibrate(config: Config, pairs: list[TokenizedPair]) -> dict[str, Any]:
    train = config.train
    connect(train.cpus_per_worker, 1 if train.use_gpu else 0, why="train.cpus_per_worker, train.use_gpu")
    import ray

    rescore = ray.remote(num_cpus=train.cpus_per_worker, num_gpus=1 if train.use_gpu else 0)(_rescore)
    try:
        chosen, rejected = ray.get(rescore.remote(config.model, pairs))
    except Exception as error:
        raise_ours(error, "calibration")
    scored = [p.chosen_ref_logprobs or [] for p in pairs] + [p.rejected_ref_logprobs or [] for p in pairs]
    # A side that an unpaired row lacks agrees by its absence, and must not count as a completion that agrees.
    both = [(mine, theirs) for mine, theirs in zip(scored, chosen + rejected, strict=True) if mine or theirs]
    return calibration([mine for mine, _ in both], [theirs for _, theirs in both])


def _rescore(model: Model, pairs: list[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
    return TorchScorer(model).score(pairs)
