"""Held-out accuracy and margin of the tuned policy, and its win rate against the base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_ray.config import Config, Model, WinRate
from dpo_ray.estimates import quantiles
from dpo_ray.evaluation.agreement import margin_noise
from dpo_ray.evaluation.held_out import held_out_margins
from dpo_ray.evaluation.margins import preference_accuracy, win_rate
from dpo_ray.on_ray.score import score_policy
from dpo_ray.progress import say
from dpo_ray.reward_source import reward_identity
from dpo_ray.rewards import load_reward, score_completions
from dpo_ray.storage.artifact import Artifact, Contents, make, read_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.generate import held_out_prompts, sample

KIND = "evaluation"
_SHOWN = 5


def evaluate(
    context: RunContext, pairs: Artifact, rows: Artifact, calibration: Artifact | None, policy: Artifact
) -> Artifact:
    """Measure the policy. The artifact's metrics hold `accuracy`, `margin`, `win_rate` and `samples`.

    Args:
        rows, calibration: what pipelines.reference made of the pairs.
    """
    scores = context.stage("score", lambda: score_policy(context.output, context.config, policy, rows))
    options = context.config.evaluate.win_rate
    drawn = _draw(context, options, pairs, policy) if options is not None else None
    artifact = context.stage("evaluate", lambda: _evaluate(context, scores, rows, calibration, drawn))
    metrics = artifact.manifest.metrics
    context.results["eval"] = {k: v for k, v in metrics.items() if k != "samples"}
    context.results["samples"] = metrics["samples"]
    return artifact


def _draw(
    context: RunContext, options: WinRate, pairs: Artifact, policy: Artifact
) -> tuple[Artifact, Artifact, WinRate]:
    base_model = context.config.model
    tuned_model = Model(
        path=(policy.location / MODEL_FOLDER).uri,
        dtype=base_model.dtype,
        trust_remote_code=base_model.trust_remote_code,
    )
    prompts = held_out_prompts(context, pairs, options.max_prompts)
    base = context.stage("sample_base", lambda: sample(context, base_model, options.sampling, prompts))
    tuned = context.stage("sample_tuned", lambda: sample(context, tuned_model, options.sampling, prompts))
    return base, tuned, options


def _evaluate(
    context: RunContext,
    scores: Artifact,
    rows: Artifact,
    calibration: Artifact | None,
    drawn: tuple[Artifact, Artifact, WinRate] | None,
) -> tuple[Artifact, bool]:
    inputs = {"scores": scores.fingerprint, rows.manifest.kind: rows.fingerprint}
    if calibration is not None:
        inputs["calibration"] = calibration.fingerprint
    identity: dict[str, Any] = {"reward": None}
    if drawn is not None:
        base, tuned, options = drawn
        inputs |= {"base": base.fingerprint, "tuned": tuned.fingerprint}
        identity = reward_identity(options.reward)
    identity["eval_fraction"] = context.config.train.eval_fraction

    def measure(_: Location) -> Contents:
        metrics = _held_out(context.config, scores, rows, calibration)
        return Contents(metrics=metrics if drawn is None else metrics | _compare(*drawn))

    return make(context.output, KIND, identity, inputs, measure)


def _held_out(config: Config, scores: Artifact, rows: Artifact, calibration: Artifact | None) -> dict[str, Any]:
    loss = config.train.loss
    margins = held_out_margins(loss, scores, rows, config.train.eval_fraction)
    per_token = loss.averages_tokens
    noise = margin_noise(calibration.manifest.metrics, per_token=per_token) if calibration is not None else 0.0
    accuracy = preference_accuracy(margins, noise)
    say(KIND, f"held-out accuracy {accuracy or 'undefined: no margin above the noise of the engines'}")
    return {
        "accuracy": accuracy.as_dict() if accuracy else None,
        "margin": {"mean": float(np.mean(margins)), **quantiles(margins)} if len(margins) else None,
        "win_rate": None,
        "samples": [],
    }


def _compare(base: Artifact, tuned: Artifact, options: WinRate) -> dict[str, Any]:
    reward = load_reward(options.reward)
    after = {row["prompt_id"]: row for row in _rows(tuned)}
    both = [(row, after[row["prompt_id"]]) for row in _rows(base) if row["prompt_id"] in after]

    base_scores = [score_completions(options.reward, reward, b) for b, _ in both]
    tuned_scores = [score_completions(options.reward, reward, t) for _, t in both]
    rate = win_rate(tuned_scores, base_scores)
    say(KIND, f"win rate against the base model {rate or 'undefined: no prompt'}")
    return {
        "win_rate": rate.as_dict() if rate else None,
        "mean_reward": {
            "base": float(np.mean([s for row in base_scores for s in row])),
            "tuned": float(np.mean([s for row in tuned_scores for s in row])),
        }
        if both
        else None,
        "samples": [
            {
                "prompt": b["prompt"][-1]["content"],
                "before": b["completions"][0]["text"].strip(),
                "after": t["completions"][0]["text"].strip(),
            }
            for b, t in both[:_SHOWN]
        ],
    }


def _rows(artifact: Artifact) -> Iterator[dict[str, Any]]:
    for shard in artifact.shards():
        yield from read_shard(shard).to_pylist()
