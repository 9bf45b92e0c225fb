"""The model stages over tokenized pairs: reference scores, their calibration, and a policy's scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpo_ray.artifacts import Artifact, fingerprint, library_versions, load, publish, read_shard
from dpo_ray.config import Config, Model
from dpo_ray.errors import DataError, ReferenceMismatch
from dpo_ray.evaluation import calibration, sum_logprobs
from dpo_ray.model import resolve, weights_hash
from dpo_ray.on_ray.engines import (
    PolicyScoreShard,
    TorchScorer,
    TorchScoreShard,
    VLLMScoreShard,
    require_vllm,
    torch_pool,
    vllm_pool,
)
from dpo_ray.on_ray.session import connect, raise_ours
from dpo_ray.on_ray.shards import shard_stage, shard_tasks
from dpo_ray.on_ray.trainer import MODEL_FOLDER
from dpo_ray.pairs import TokenizedPair, tokenized_pair
from dpo_ray.progress import say
from dpo_ray.storage import Location


def score_reference(output: Location, config: Config, tokenized: Artifact) -> tuple[Artifact, bool]:
    """Reference log-probs of every tokenized pair. Neither beta nor any other training option is in its identity."""
    model = config.model
    identity: dict[str, Any] = {
        "weights": weights_hash(resolve(model.path, model.revision)),
        "tokenizer": tokenized.manifest.identity["tokenizer"],
        "dtype": model.dtype,
        "engine": config.reference.engine,
    }
    if config.reference.engine == "vllm":
        identity["engine_version"] = require_vllm("reference.engine=vllm")
        length = config.data.max_prompt_tokens + config.data.max_completion_tokens
        arguments = {"model": model, "options": config.vllm, "max_model_len": length}
        pool = vllm_pool(config, VLLMScoreShard, arguments)
    else:
        identity["engine_version"] = library_versions()["torch"]
        pool = torch_pool(config, TorchScoreShard, {"model": model})
    return shard_stage(
        output,
        "reference",
        identity=identity,
        inputs={"tokenized": tokenized.fingerprint},
        tasks=shard_tasks(tokenized),
        pool=pool,
        unit="pairs",
    )


def calibrate(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """Score some pairs again with the trainer's own forward; the artifact holds how far the two are apart.

    Raises ReferenceMismatch where a completion differs by more than reference.tolerance.
    """
    kind = "calibration"
    identity = {"pairs": config.reference.calibration_pairs, "torch": library_versions()["torch"]}
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


def score_policy(output: Location, config: Config, policy: Artifact, reference: Artifact) -> tuple[Artifact, bool]:
    """A trained policy's log-probs of the held-out pairs."""
    folder = (policy.location / MODEL_FOLDER).uri
    model = Model(path=folder, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    return shard_stage(
        output,
        "policy_scores",
        identity={"dtype": model.dtype, "torch": library_versions()["torch"], "policy": policy.fingerprint},
        inputs={"policy": policy.fingerprint, "reference": reference.fingerprint},
        tasks=shard_tasks(reference),
        pool=torch_pool(config, PolicyScoreShard, {"model": model}),
        unit="pairs",
    )


def held_out_margins(scores: Artifact, reference: Artifact) -> np.ndarray:
    """Margins [n] of the held-out pairs in nats, without beta, joined by pair_id. Raises DataError on a gap."""
    policy: dict[str, float] = {}
    for shard in scores.shards():
        table = read_shard(shard)
        logps = sum_logprobs(table["chosen_logprobs"]) - sum_logprobs(table["rejected_logprobs"])
        policy.update(zip(table["pair_id"].to_pylist(), logps.tolist(), strict=True))
    margins: dict[str, float] = {}
    missing = []
    for shard in reference.shards():
        table = read_shard(shard)
        logps = sum_logprobs(table["chosen_ref_logprobs"]) - sum_logprobs(table["rejected_ref_logprobs"])
        for pair_id, side, logp in zip(
            table["pair_id"].to_pylist(), table["split"].to_pylist(), logps.tolist(), strict=True
        ):
            if side != "eval":
                continue
            if pair_id in policy:
                margins[pair_id] = policy[pair_id] - logp
            else:
                missing.append(pair_id)
    if missing:
        raise DataError(
            f"{len(missing)} held-out pairs of {reference.location} have no scores in {scores.location}, the first: "
            f"{', '.join(missing[:5])}. Remove the latter; it will be computed again."
        )
    wrong = [pair_id for pair_id, margin in margins.items() if not math.isfinite(margin)]
    if wrong:
        raise DataError(
            f"{len(wrong)} held-out pairs have margins that are not finite, the first: {', '.join(wrong[:5])}. The "
            "policy's weights are damaged: look at the loss in metrics.jsonl, and train with a lower learning rate."
        )
    return np.array(list(margins.values()))


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
    return calibration(scored, chosen + rejected)


def _rescore(model: Model, pairs: list[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
    return TorchScorer(model).score(pairs)
