"""Engines against the trainer's own forward: the calibration gate, and the choice that reference.engine=auto makes."""

from __future__ import annotations

import math
from typing import Any

from dpo_ray.config import VLLM, Config, Model
from dpo_ray.errors import DataError, ReferenceMismatch
from dpo_ray.evaluation.agreement import calibration
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.model.version import own_forward
from dpo_ray.on_ray.engine_choice import alone, choice, choose, tried
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.pool import torch_pool
from dpo_ray.on_ray.vllm_engine import VLLMScorer, vllm_pool
from dpo_ray.pairs import TokenizedPair, tokenized_pair
from dpo_ray.progress import say
from dpo_ray.shards.score import Engine
from dpo_ray.storage.artifact import Artifact, Contents, make, read_shard
from dpo_ray.storage.location import Location

_Scores = tuple[list[list[float]], list[list[float]]]


def max_pair_tokens(config: Config) -> int:
    """The longest sequence that is scored: a prompt and one completion."""
    return config.data.max_prompt_tokens + config.data.max_completion_tokens


def choose_engine(output: Location, config: Config, tokenized: Artifact) -> Engine:
    """reference.engine; for auto, vLLM where it agrees with the trainer's forward on some of these pairs, else torch.

    The choice is an artifact of model and versions, not of the pairs: later runs and further shards keep to it. It is
    torch too where vLLM cannot score at all.
    """
    if config.reference.engine != "auto":
        return config.reference.engine
    identity = {
        "weights": ModelFolder.of(config.model).weights_hash(),
        "tokenizer": tokenized.manifest.identity["tokenizer"],
        "dtype": config.model.dtype,
        "torch": own_forward(),
        "tolerance": config.reference.tolerance,
        "pairs": config.reference.calibration_pairs,
    }
    return choose(
        output,
        "reference_engine",
        "reference",
        "reference.engine",
        identity,
        lambda: _compare_engines(config, tokenized),
    )


def _compare_engines(config: Config, tokenized: Artifact) -> dict[str, Any]:
    pairs = _sample(tokenized, config.reference.calibration_pairs)
    say("reference", f"reference.engine=auto: scoring {len(pairs)} pairs with vLLM and with the trainer's forward")
    arguments = {"model": config.model, "options": config.vllm, "max_model_len": max_pair_tokens(config)}
    by_vllm: _Scores = tried(vllm_pool(config, _score_by_vllm, {**arguments, "pairs": pairs}), "score this model")
    metrics = _agreement(by_vllm, _scored_by_trainer(config, pairs))
    worst, limit = metrics["sequence"]["max"], config.reference.tolerance
    if not math.isfinite(worst):
        return choice("torch", "there are log-probs that are not finite, vLLM's or the trainer's")
    measured = (
        f"on {len(pairs)} pairs vLLM and the trainer's forward differ by up to {worst:.1e} nats on a completion "
        f"(p50 {metrics['sequence']['p50']:.1e}; reference.tolerance={limit:g})"
    )
    return {**choice("vllm" if worst <= limit else "torch", measured), "calibration": metrics}


def calibrate(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """Score some pairs again with the trainer's own forward; the artifact holds how far the two are apart.

    Raises ReferenceMismatch where a completion differs by more than reference.tolerance.
    """
    engine = reference.manifest.identity["engine"]
    identity = {"pairs": config.reference.calibration_pairs, "engine_version": own_forward()}
    inputs = {"reference": reference.fingerprint}

    def compare(_: Location) -> Contents:
        pairs = _sample(reference, config.reference.calibration_pairs)
        say("calibration", f"scoring {len(pairs)} pairs again with the trainer's forward")
        scored = [p.chosen_ref_logprobs or [] for p in pairs], [p.rejected_ref_logprobs or [] for p in pairs]
        found = _agreement(scored, _scored_by_trainer(config, pairs))
        if not math.isfinite(found["sequence"]["max"]):
            raise ReferenceMismatch(
                f"Of {len(pairs)} pairs, some have log-probs that are not finite, by {engine} or by the trainer's own "
                "forward. The weights may be damaged, or model.dtype too narrow: try float32."
            )
        return Contents(metrics=found)

    artifact, reused = make(output, "calibration", identity, inputs, compare)
    metrics = artifact.manifest.metrics
    worst, limit = metrics["sequence"]["max"], config.reference.tolerance
    say(
        "calibration",
        f"|Δ| per token p50 {metrics['token']['p50']:.1e}, max {metrics['token']['max']:.1e}; per sequence p50 "
        f"{metrics['sequence']['p50']:.1e}, max {worst:.1e} nats (tolerance {limit:g})",
    )
    if not worst <= limit:
        raise ReferenceMismatch(
            f"The reference log-probs (engine {engine}, {config.model.dtype}) and the trainer's own "
            f"forward differ by up to {worst:.3g} nats on one completion, over reference.tolerance={limit:g}; the mean "
            f"difference per token is {metrics['bias_per_token']:.1e}. Training would start from a wrong zero. Set "
            "reference.engine=torch, or model.dtype=float32, or, knowing what it means, a larger reference.tolerance."
        )
    return artifact, reused


def _sample(rows: Artifact, count: int) -> list[TokenizedPair]:
    """Pairs spread evenly over the shards, the first rows of each: the same ones every time."""
    shards = [rows.file(file.name) for file in rows.manifest.files if file.rows]
    if len(shards) > count:
        # The newest shards, which nobody has looked at yet, come last.
        shards = [shards[(len(shards) - 1) * i // max(1, count - 1)] for i in range(count)]
    pairs: list[TokenizedPair] = []
    for i, shard in enumerate(shards):
        wanted = -(-(count - len(pairs)) // (len(shards) - i))
        if wanted <= 0:
            break
        pairs += [tokenized_pair(row) for row in read_shard(shard).slice(0, wanted).to_pylist()]
    if not pairs:
        raise DataError(f"{rows.location} holds no pairs, so there is nothing to train on.")
    return pairs


def _agreement(scored: _Scores, rescored: _Scores) -> dict[str, Any]:
    # A side that an unpaired row lacks agrees by its absence, and must not count as a completion that agrees.
    both = [(a, b) for a, b in zip(scored[0] + scored[1], rescored[0] + rescored[1], strict=True) if a or b]
    return calibration([a for a, _ in both], [b for _, b in both])


def _scored_by_trainer(config: Config, pairs: list[TokenizedPair]) -> _Scores:
    try:
        scores: _Scores = alone(torch_pool(config, _score_by_trainer, {"model": config.model, "pairs": pairs}))
        return scores
    except Exception as error:
        raise_ours(error, "calibration")


def _score_by_vllm(model: Model, options: VLLM, max_model_len: int, pairs: list[TokenizedPair]) -> _Scores:
    return VLLMScorer(model, options, max_model_len).score(pairs)


def _score_by_trainer(model: Model, pairs: list[TokenizedPair]) -> _Scores:
    from dpo_ray.model.pair_scorer import TorchScorer  # in the process that scores, and not in the driver

    return TorchScorer(model).score(pairs)
