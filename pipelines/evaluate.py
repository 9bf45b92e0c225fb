"""Held-out accuracy and margin of the tuned policy, and its win rate against the base model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dpo_ray.config import Config, ImplicitReward, WinRate
from dpo_ray.config.reward import compares
from dpo_ray.estimates import quantiles, rate, verdict
from dpo_ray.evaluation.agreement import margin_noise
from dpo_ray.evaluation.drift import Answers, accuracy_by_length, chosen_change, kl_per_token, samples_drift
from dpo_ray.evaluation.held_out import held_out_pairs
from dpo_ray.evaluation.length_control import length_controlled_win_rate
from dpo_ray.evaluation.margins import mean_wins, preference_accuracy, win_shares
from dpo_ray.evaluation.tasks import beside, task_line
from dpo_ray.on_ray.generate import merge_candidates
from dpo_ray.on_ray.reward import score_candidates
from dpo_ray.on_ray.score import score_policy
from dpo_ray.progress import say
from dpo_ray.scoring.scorer import weighted
from dpo_ray.storage.artifact import Artifact, Contents, make, read_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.generate import held_out_prompts, sample, score
from pipelines.tasks import measure_both

KIND = "evaluation"
_SHOWN = 5
_MEASURES = 2
"""Raised when there are other measures than before, or they are computed in another way."""


def evaluate(
    context: RunContext, pairs: Artifact, rows: Artifact, calibration: Artifact | None, policy: Artifact
) -> Artifact:
    """Measure the policy. The artifact's metrics hold `accuracy`, `margin`, `win_rate` and `samples`; `tasks` too
    where they are measured.

    Args:
        rows, calibration: what pipelines.reference made of the pairs.
    """
    scores = context.stage("score", lambda: score_policy(context.output, context.config, policy, rows))
    options = context.config.evaluate.win_rate
    drawn = _draw(context, options, pairs, policy) if options is not None else None
    tasks = context.config.evaluate.tasks
    of_tasks = measure_both(context, tasks, policy) if tasks is not None else None
    artifact = context.stage("evaluate", lambda: _evaluate(context, scores, rows, calibration, drawn, of_tasks))
    metrics = artifact.manifest.metrics
    context.results["eval"] = {k: v for k, v in metrics.items() if k != "samples"}
    context.results["samples"] = metrics["samples"]
    return artifact


@dataclass(frozen=True)
class _Drawn:
    """Completions of base and tuned model, and what the judges give to them."""

    candidates: Artifact
    """Of each prompt those of the base model, sampling.samples of them, and then as many of the tuned one."""
    scores: dict[str, Artifact]
    log_ratios: Artifact
    """What the implicit reward of the tuned model, with beta 1, gives to its own: log π − log π_ref."""
    options: WinRate

    def rows(self) -> Iterator[tuple[dict[str, Any], list[float]]]:
        """The candidates, each with the rewards of its completions."""
        sources = [list(_rows(self.scores[source.label])) for source in self.options.reward]
        weights = [source.weight for source in self.options.reward]
        for n, row in enumerate(_rows(self.candidates)):
            yield row, weighted([of_source[n]["scores"] for of_source in sources], weights)


def _draw(context: RunContext, options: WinRate, pairs: Artifact, policy: Artifact) -> _Drawn:
    base_model = context.config.model
    tuned_model = base_model.model_copy(
        update={"path": (policy.location / MODEL_FOLDER).uri, "revision": None, "lora": None}
    )
    prompts = held_out_prompts(context, pairs, options.max_prompts)
    of_models = [
        context.stage(f"sample_{side}", partial(sample, context, model, options.sampling, prompts))
        for side, model in (("base", base_model), ("tuned", tuned_model))
    ]
    merged = context.stage("merge_samples", partial(merge_candidates, context.output, of_models))
    scores = score(context, "judge", options.reward, merged, options.sampling.samples)
    ratio = ImplicitReward(policy=tuned_model.path, beta=1.0, dtype=base_model.dtype)
    log_ratios = context.stage(
        "log_ratios", partial(score_candidates, context.output, context.config, ratio, of_models[1])
    )
    return _Drawn(merged, scores, log_ratios, options)


def _evaluate(
    context: RunContext,
    scores: Artifact,
    rows: Artifact,
    calibration: Artifact | None,
    drawn: _Drawn | None,
    of_tasks: dict[str, Artifact] | None = None,
) -> tuple[Artifact, bool]:
    inputs = {"scores": scores.fingerprint, rows.manifest.kind: rows.fingerprint}
    if calibration is not None:
        inputs["calibration"] = calibration.fingerprint
    identity: dict[str, Any] = {"reward": None}
    if drawn is not None:
        inputs |= {"samples": drawn.candidates.fingerprint, "log_ratios": drawn.log_ratios.fingerprint}
        inputs |= {f"rewards/{name}": artifact.fingerprint for name, artifact in drawn.scores.items()}
        identity = {"reward": {source.label: source.weight for source in drawn.options.reward}}
    if of_tasks is not None:
        inputs |= {f"tasks/{side}": artifact.fingerprint for side, artifact in of_tasks.items()}
    identity |= {"eval_fraction": context.config.train.eval_fraction, "measures": _MEASURES}

    def measure(_: Location) -> Contents:
        metrics = _held_out(context.config, scores, rows, calibration)
        if drawn is not None:
            metrics |= _compare(drawn)
        if of_tasks is not None:
            metrics |= {"tasks": _tasks(context.config, of_tasks)}
        return Contents(metrics=metrics)

    return make(context.output, KIND, identity, inputs, measure)


def _held_out(config: Config, scores: Artifact, rows: Artifact, calibration: Artifact | None) -> dict[str, Any]:
    loss = config.train.loss
    found = held_out_pairs(loss, scores, rows, config.train.eval_fraction)
    per_token = loss.averages_tokens
    noise = margin_noise(calibration.manifest.metrics, per_token=per_token) if calibration is not None else 0.0
    accuracy = preference_accuracy(found.margins, noise)
    say(KIND, f"held-out accuracy {accuracy or 'undefined: no margin above the noise of the engines'}")
    some = len(found.margins) > 0
    return {
        "accuracy": accuracy.as_dict() if accuracy else None,
        "accuracy_by_length": accuracy_by_length(found.margins, found.chosen_tokens, found.rejected_tokens)
        if accuracy
        else None,
        "margin": {"mean": float(np.mean(found.margins)), **quantiles(found.margins)} if some else None,
        "chosen_logps": chosen_change(found.chosen_logps, found.chosen_ref_logps)
        if some and found.chosen_ref_logps is not None
        else None,
        "win_rate": None,
        "samples": [],
    }


def _compare(drawn: _Drawn) -> dict[str, Any]:
    samples, reward = drawn.options.sampling.samples, drawn.options.reward
    # A prompt that was too long for one of the two has no completions of it.
    found = [(row, rewards) for row, rewards in drawn.rows() if len(rewards) == 2 * samples]
    base, tuned = [rewards[:samples] for _, rewards in found], [rewards[samples:] for _, rewards in found]
    # A judge has said who wins; of other sources the higher reward does.
    wins = mean_wins(tuned) if compares(reward) else win_shares(tuned, base)
    win_rate = rate(wins) if found else None
    say(KIND, f"win rate against the base model {win_rate or 'undefined: no prompt'}")
    if not found:
        return {}
    answers = [[_answers(row["completions"][side]) for row, _ in found] for side in _sides(samples)]
    lengths = [np.array([np.mean(prompt.tokens) for prompt in side]) for side in answers]
    log_ratios = {row["prompt_id"]: sum(row["scores"]) for row in _rows(drawn.log_ratios)}
    controlled = length_controlled_win_rate(wins, lengths[1], lengths[0])
    assert win_rate is not None and controlled is not None
    return {
        "win_rate": win_rate.as_dict(),
        "verdict": verdict(win_rate, 0.5),
        "length_controlled_win_rate": controlled.as_dict(),
        "mean_reward": {
            "base": float(np.mean([s for row in base for s in row])),
            "tuned": float(np.mean([s for row in tuned for s in row])),
        },
        "kl_per_token": kl_per_token(
            np.array([log_ratios[row["prompt_id"]] for row, _ in found]), samples * lengths[1]
        ).as_dict(),
        "drift": samples_drift(*answers),
        "samples": [
            {
                "prompt": row["prompt"][-1]["content"],
                "before": row["completions"][0]["text"].strip(),
                "after": row["completions"][samples]["text"].strip(),
            }
            for row, _ in found[:_SHOWN]
        ],
    }


def _tasks(config: Config, of_tasks: dict[str, Artifact]) -> list[dict[str, Any]]:
    assert config.evaluate.tasks is not None
    found = beside(_rows(of_tasks["base"]), _rows(of_tasks["tuned"]), config.evaluate.tasks.names)
    for row in found:
        say(KIND, task_line(row))
    return found


def _sides(samples: int) -> tuple[slice, slice]:
    return slice(0, samples), slice(samples, 2 * samples)


def _answers(completions: list[dict[str, Any]]) -> Answers:
    return Answers(*([completion[name] for completion in completions] for name in ("text", "num_tokens", "finished")))


def _rows(artifact: Artifact) -> Iterator[dict[str, Any]]:
    for shard in artifact.shards():
        yield from read_shard(shard).to_pylist()
