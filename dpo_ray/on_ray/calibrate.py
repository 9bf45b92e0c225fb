"""The calibration gate: reference log-probs against the trainer's own forward, before the pass and after it.

Before it, the engine that is to make them is tried on some pairs: hours of scoring by an engine that computes another
model would be thrown away. After it, some of the finished scores are held against the trainer's forward, for it is they
that training uses.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any

from dpo_ray.config import VLLM, Config, Model
from dpo_ray.errors import DataError, ReferenceMismatch
from dpo_ray.evaluation.agreement import calibration, disagreement, is_finite, told
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.model.version import own_forward
from dpo_ray.on_ray.engine_choice import CannotServe, Choice, Undecided, alone, choose, compared, tried, when
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.pool import torch_pool
from dpo_ray.on_ray.vllm_engine import VLLMScorer, vllm_pool
from dpo_ray.pairs import TokenizedPair, tokenized_pair
from dpo_ray.progress import say
from dpo_ray.shards.score import Engine
from dpo_ray.storage.artifact import Artifact, Contents, make
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard

_VERSION = 2
"""Of the measures and of how pairs are drawn, raised when either changes."""

_Scores = tuple[list[list[float]], list[list[float]]]


def max_pair_tokens(config: Config) -> int:
    """The longest sequence that is scored: a prompt and one completion."""
    return config.data.max_prompt_tokens + config.data.max_completion_tokens


def choose_engine(output: Location, config: Config, tokenized: Artifact) -> Engine:
    """reference.engine, once it has been tried on some of these pairs against the trainer's forward.

    auto is vLLM where the two agree within reference.tolerance, and torch where they do not, or where vLLM cannot score
    at all. Torch is the trainer's forward, and is not tried. The comparison is an artifact of model, versions and
    options, not of the pairs: later runs and further shards keep to it, and other limits judge it anew.

    Raises ReferenceMismatch where engine is vllm and the two do not agree. Where vLLM fails, the pass is left to say
    so: it finds out whether a single row is at fault.
    """
    if config.reference.engine == "torch":
        return "torch"
    if config.model.quantization is not None and config.reference.engine == "auto":
        say("reference", f"reference.engine=auto: torch, for model.lora.quantization={config.model.quantization}")
        return "torch"
    kind, identity = "reference_engine", _identity(config, tokenized)
    limits = config.reference.tolerance.limits(config.model.dtype)

    def judge(metrics: dict[str, Any]) -> Choice:
        found = metrics["calibration"]
        if found is None:
            return Choice("torch", "there are log-probs that are not finite, vLLM's or the trainer's")
        wrong = disagreement(found, limits)
        both = f"on {metrics['pairs']} pairs vLLM and the trainer's forward"
        if wrong is not None:
            return Choice("torch", f"{both} do not agree: {wrong}")
        return Choice("vllm", f"{both} agree: {told(found)}")

    def compare() -> dict[str, Any]:
        return _compare_engines(config, tokenized)

    if config.reference.engine == "auto":
        return choose(output, kind, "reference", "reference.engine", identity, compare, judge)
    try:
        found = compared(output, kind, "reference.engine=vllm", identity, _not_recorded(compare))
    except Undecided as why:
        say("reference", f"not compared with the trainer's forward before the pass, for {why}")
        return "vllm"
    if "calibration" not in found.manifest.metrics:  # of a run with engine=auto
        return "vllm"
    made = judge(found.manifest.metrics)
    say("reference", f"{made.why} ({when(found)})")
    if made.engine != "vllm":
        raise ReferenceMismatch(
            f"Nothing has been scored: {made.why}, in nats; the limits are those of reference.tolerance for "
            f"{config.model.dtype}. Training would start from a wrong zero. Set reference.engine=torch, which scores "
            f"with the trainer's own forward; or, knowing what it means, wider limits. ({when(found).capitalize()}.)"
        )
    return "vllm"


def calibrate(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """Score some pairs again with the trainer's own forward; the artifact holds how far the two are apart.

    Raises ReferenceMismatch where they differ by more than reference.tolerance allows.
    """
    engine = reference.manifest.identity["engine"]
    identity = {"pairs": config.reference.calibration_pairs, "engine_version": own_forward(), "version": _VERSION}
    inputs = {"reference": reference.fingerprint}

    def compare(_: Location) -> Contents:
        pairs = _drawn(reference, config.reference.calibration_pairs)
        say("calibration", f"scoring {len(pairs)} pairs again with the trainer's forward")
        scored = [p.chosen_ref_logprobs or [] for p in pairs], [p.rejected_ref_logprobs or [] for p in pairs]
        found = _agreement(scored, _scored_by_trainer(config, pairs))
        if not is_finite(found):
            raise ReferenceMismatch(
                f"Of {len(pairs)} pairs, some have log-probs that are not finite, by {engine} or by the trainer's own "
                "forward. The weights may be damaged, or model.dtype too narrow: try float32."
            )
        return Contents(metrics=found)

    artifact, reused = make(output, "calibration", identity, inputs, compare)
    metrics = artifact.manifest.metrics
    say("calibration", told(metrics))
    wrong = disagreement(metrics, config.reference.tolerance.limits(config.model.dtype))
    if wrong is not None:
        raise ReferenceMismatch(
            f"The reference log-probs (engine {engine}, {config.model.dtype}) are not those of the trainer's own "
            f"forward: of {metrics['num_sequences']} completions {wrong}, in nats; the limits are those of "
            "reference.tolerance. Training would start from a wrong zero. Set reference.engine=torch, or "
            "model.dtype=float32, or, knowing what it means, wider limits."
        )
    return artifact, reused


def _identity(config: Config, tokenized: Artifact) -> dict[str, Any]:
    """What changes how far vLLM and the trainer are apart, beside vLLM's version."""
    return {
        "weights": ModelFolder.of(config.model).weights_hash(),
        "tokenizer": tokenized.manifest.identity["tokenizer"],
        "dtype": config.model.dtype,
        "torch": own_forward(),
        # Other kernels, and rows in other pieces; neither belongs to what the scores are known by.
        "gpus": config.vllm.gpus_per_actor,
        "tokens_at_once": config.vllm.max_num_batched_tokens,
        "pairs": config.reference.calibration_pairs,
        "version": _VERSION,
    }


def _compare_engines(config: Config, tokenized: Artifact) -> dict[str, Any]:
    """The calibration of vLLM, None where not all is finite."""
    pairs = _drawn(tokenized, config.reference.calibration_pairs)
    say("reference", f"before the pass: scoring {len(pairs)} pairs with vLLM and with the trainer's forward")
    arguments = {"model": config.model, "options": config.vllm, "max_model_len": max_pair_tokens(config)}
    by_vllm: _Scores = tried(vllm_pool(config, _score_by_vllm, {**arguments, "pairs": pairs}), "score this model")
    found = _agreement(by_vllm, _scored_by_trainer(config, pairs))
    return {"calibration": found if is_finite(found) else None, "pairs": len(pairs)}


def _not_recorded(compare: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same; but that vLLM failed is no verdict on the model where nothing else is to take its place."""

    def compare_or_leave() -> dict[str, Any]:
        try:
            return compare()
        except CannotServe as why:
            raise Undecided(str(why)) from why

    return compare_or_leave


def _drawn(rows: Artifact, count: int) -> list[TokenizedPair]:
    """Pairs drawn at random from all rows, the same ones every time of the same rows; of each a shard is read at most.

    Raises DataError where there are no rows.
    """
    shards = [file for file in rows.manifest.files if file.rows]
    ends = list(accumulate(file.rows or 0 for file in shards))
    if not ends:
        raise DataError(f"{rows.location} holds no pairs, so there is nothing to train on. Add data.")
    places = sorted(random.Random(rows.fingerprint).sample(range(ends[-1]), min(count, ends[-1])))
    pairs = []
    for n, of_shard in groupby(places, lambda place: bisect_right(ends, place)):
        first = ends[n] - (shards[n].rows or 0)
        table = read_whole_shard(rows.file(shards[n].name)).take([place - first for place in of_shard])
        pairs += [tokenized_pair(row) for row in table.to_pylist()]
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
