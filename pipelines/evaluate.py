"""Held-out accuracy and margin of the tuned policy, and its win rate against the base model or another one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config import Config, ImplicitReward, WinRate
from dpo_ray.config.report import MOST_SAMPLES
from dpo_ray.config.reward import compares
from dpo_ray.estimates import Estimate, quantiles
from dpo_ray.evaluation.comparison import Answered, compare, shown_samples, wins_by_source
from dpo_ray.evaluation.drift import accuracy_by_length, chosen_change
from dpo_ray.evaluation.held_out import HeldOut, held_out_pairs
from dpo_ray.evaluation.margins import HIDING, accuracy_by_source, preference_accuracy, within_noise
from dpo_ray.evaluation.tasks import beside, task_line
from dpo_ray.histogram import histograms
from dpo_ray.on_ray.generate import merge_candidates
from dpo_ray.on_ray.reward import score_candidates
from dpo_ray.progress import say
from dpo_ray.scoring.scorer import weighted
from dpo_ray.shards.generate import Ask
from dpo_ray.storage.artifact import Artifact, Contents, FileEntry, entry_of, make, read_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.generate import held_out_prompts, sample, score_by
from pipelines.held_out_sets import ScoredSet, measure_sets, noise_of, score, score_sets
from pipelines.tasks import measure_both

KIND = "evaluation"
SAMPLES = "samples.json"
"""Answers that people may look at, of MOST_SAMPLES prompts; of an evaluation without sampled answers there is none."""
_TOLD = 8
"""Of these, so many are in summary.json."""
_MEASURES = 7
"""Raised when there are other measures than before, or they are computed in another way."""


def evaluate(
    context: RunContext, pairs: Artifact, rows: Artifact, calibration: Artifact | None, policy: Artifact
) -> Artifact:
    """Measure the policy. The artifact's metrics hold `accuracy`, `margin`, `win_rate` and `histograms`; `tasks` too
    where they are measured; and of a mixture `sources`: source → the accuracy and win rate on its held-out part.

    Args:
        rows, calibration: what pipelines.reference made of the pairs.
    """
    fraction = context.config.train.eval_fraction
    scores = score(context, "score", policy.fingerprint, policy.location / MODEL_FOLDER, rows, fraction)
    sets = score_sets(context, policy, rows, scores, calibration)
    options = context.config.evaluate.win_rate
    drawn = _draw(context, options, pairs, policy) if options is not None else None
    tasks = context.config.evaluate.tasks
    of_tasks = measure_both(context, tasks, policy) if tasks is not None else None
    artifact = context.stage("evaluate", lambda: _evaluate(context, scores, rows, calibration, sets, drawn, of_tasks))
    tell_measured(context, artifact)
    return artifact


def tell_measured(context: RunContext, evaluation: Artifact) -> None:
    """Make an evaluation the run's: in summary.json, in the report and in the closing lines."""
    most = context.config.report.samples
    has_samples = any(file.name == SAMPLES for file in evaluation.manifest.files)
    samples = json.loads(evaluation.file(SAMPLES).read_bytes())[:most] if most and has_samples else []
    context.results["eval"] = evaluation.manifest.metrics
    context.results["samples"] = samples[:_TOLD]
    context.shown["samples"] = samples


@dataclass(frozen=True)
class _Drawn:
    """Completions of the tuned model and of the one that it is compared with, and what the judges give to them."""

    candidates: Artifact
    """Of each prompt those of the other model, sampling.samples of them, and then as many of the tuned one."""
    scores: dict[str, Artifact]
    log_ratios: Artifact
    """What the implicit reward of the tuned model, with beta 1, gives to its own: log π − log π_ref."""
    options: WinRate
    sources: dict[str, str] = field(default_factory=dict)
    """prompt_id → the source of a mixture that it is of; of several the first one."""

    def answered(self) -> Iterator[Answered]:
        """Prompt by prompt; one that was too long for one of the two models has no completions of it."""
        sources = [list(_rows(self.scores[source.label])) for source in self.options.reward]
        weights = [source.weight for source in self.options.reward]
        if compares(self.options.reward):
            weights = [float(weight != 0) for weight in weights]  # a share of wins stays one
        log_ratios = {row["prompt_id"]: row["scores"] for row in _rows(self.log_ratios)}
        for n, row in enumerate(_rows(self.candidates)):
            rewards = weighted([of_source[n]["scores"] for of_source in sources], weights)
            yield Answered(row, rewards, log_ratios.get(row["prompt_id"], []))


def _draw(context: RunContext, options: WinRate, pairs: Artifact, policy: Artifact) -> _Drawn:
    base_model = context.config.model
    tuned_model = base_model.model_copy(
        update={"path": (policy.location / MODEL_FOLDER).uri, "revision": None, "lora": None}
    )
    prompts = held_out_prompts(context, pairs, options.max_prompts)
    asks = [Ask(options.sampling.samples)]
    other = ("base", base_model) if options.against is None else ("other", options.against.model())
    of_models = [
        context.stage(f"sample_{side}", partial(sample, context, model, options.sampling, asks, prompts))
        for side, model in (other, ("tuned", tuned_model))
    ]
    merged = context.stage("merge_samples", partial(merge_candidates, context.output, context.config, of_models))
    scores = score_by(context, "judge", options.reward, merged, options.sampling.samples)
    ratio = ImplicitReward(
        policy=tuned_model.path, beta=1.0, dtype=base_model.dtype, trust_remote_code=base_model.trust_remote_code
    )
    log_ratios = context.stage(
        "log_ratios", partial(score_candidates, context.output, context.config, ratio, of_models[1])
    )
    return _Drawn(merged, scores, log_ratios, options, _sources(pairs, prompts) if context.config.data.sources else {})


def _sources(pairs: Artifact, prompts: Artifact) -> dict[str, str]:
    """prompt_id → its source, for these prompts."""
    ids = pa.array([row["prompt_id"] for row in _rows(prompts)], pa.string())
    found: dict[str, str] = {}
    for shard in pairs.shards():
        for row in read_shard(shard, ["prompt_id", "source"], rows=pc.field("prompt_id").isin(ids)).to_pylist():
            if row["source"] is not None:
                found.setdefault(row["prompt_id"], row["source"])
    return found


def _evaluate(
    context: RunContext,
    scores: Artifact,
    rows: Artifact,
    calibration: Artifact | None,
    sets: dict[str, ScoredSet],
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
        if drawn.options.against is not None:
            identity["against"] = drawn.options.opponent
    for name, one in sets.items():
        inputs |= one.inputs(name)
    if of_tasks is not None:
        inputs |= {f"tasks/{side}": artifact.fingerprint for side, artifact in of_tasks.items()}
    identity |= {"eval_fraction": context.config.train.eval_fraction, "measures": _MEASURES}

    def measure(location: Location) -> Contents:
        files: list[FileEntry] = []
        metrics = _held_out(context.config, scores, calibration)
        metrics["sets"] = measure_sets(sets, per_token=context.config.train.loss.averages_tokens)
        if drawn is not None:
            compared, samples = _compare(drawn)
            (location / SAMPLES).write_bytes(content := json.dumps(samples, ensure_ascii=False).encode())
            files.append(entry_of(SAMPLES, content))
            metrics["histograms"] |= compared.pop("histograms", {})
            for name, wins in compared.pop("sources", {}).items():
                metrics.setdefault("sources", {}).setdefault(name, {}).update(win_rate=wins)
            metrics |= compared
        if of_tasks is not None:
            metrics |= {"tasks": _tasks(context.config, of_tasks)}
        return Contents(files=files, metrics=metrics)

    return make(context.output, KIND, identity, inputs, measure)


def _held_out(config: Config, scores: Artifact, calibration: Artifact | None) -> dict[str, Any]:
    loss = config.train.loss
    found = held_out_pairs(scores)
    noise = noise_of(found, calibration, per_token=loss.averages_tokens)
    accuracy = preference_accuracy(found.margins, noise)
    why = "no margin above the noise of the engines" if len(found.margins) else "no held-out pair was left"
    say(KIND, f"held-out accuracy {accuracy or f'undefined: {why}'}")
    some = len(found.margins) > 0
    hidden = float(np.mean(np.abs(found.margins) <= noise.margin)) if some and noise.margin > 0 else 0.0
    if accuracy is not None and hidden > HIDING:
        say(KIND, within_noise(hidden, noise.margin))
    by_source = accuracy_by_source(found.margins, found.sources, noise)
    for name, of_source in by_source.items():
        say(KIND, f"held-out accuracy of source {name} {of_source or 'undefined: no margin above the noise'}")
    of_sources = {name: {"accuracy": one.as_dict() if one else None} for name, one in by_source.items()}
    return {
        **({"sources": of_sources} if of_sources else {}),
        "accuracy": accuracy.as_dict() if accuracy else None,
        "accuracy_by_length": accuracy_by_length(found.margins, found.chosen_tokens, found.rejected_tokens)
        if accuracy
        else None,
        "margin": {"mean": float(np.mean(found.margins)), **quantiles(found.margins)} if some else None,
        "chosen_logps": chosen_change(found.chosen_logps, found.chosen_ref_logps)
        if some and found.chosen_ref_logps is not None
        else None,
        "within_noise": {"share": hidden, "nats": noise.margin},
        "histograms": _histograms(found),
        "win_rate": None,
    }


def _histograms(found: HeldOut) -> dict[str, Any]:
    gaps = {"before": found.ref_gaps, "after": found.gaps}
    shown = {
        "margin": {"after": found.margins},
        "gap": {name: values for name, values in gaps.items() if values is not None},
    }
    if found.chosen_ref_logps is not None:
        shown["chosen_change"] = {"after": found.chosen_logps - found.chosen_ref_logps}
    return {name: histograms(samples) for name, samples in shown.items()}


def _compare(drawn: _Drawn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the answers tell, and some of them."""
    options = drawn.options
    answered = [one for one in drawn.answered() if len(one.rewards) == 2 * options.sampling.samples]
    if not answered:
        say(KIND, f"win rate against {options.opponent} undefined: no prompt was short enough to be answered")
        return {}, []
    in_pairs = compares(options.reward)
    found = compare(answered, options.sampling, in_pairs=in_pairs)
    if drawn.sources:
        found["sources"] = {
            name: estimate.as_dict()
            for name, estimate in wins_by_source(answered, drawn.sources, options.sampling, in_pairs=in_pairs).items()
        }
    for name, label in (("win_rate", "win rate"), ("greedy_win_rate", "win rate of greedy answers")):
        if (rate := found[name]) is not None:
            say(KIND, f"{label} against {options.opponent} {Estimate(**rate)}")
    samples = shown_samples(answered, drawn.sources, options.sampling, in_pairs=in_pairs, most=MOST_SAMPLES)
    return {**found, "against": options.opponent}, samples


def _tasks(config: Config, of_tasks: dict[str, Artifact]) -> list[dict[str, Any]]:
    assert config.evaluate.tasks is not None
    found = beside(_rows(of_tasks["base"]), _rows(of_tasks["tuned"]), config.evaluate.tasks.names)
    for row in found:
        say(KIND, task_line(row))
    return found


def _rows(artifact: Artifact) -> Iterator[dict[str, Any]]:
    for shard in artifact.shards():
        yield from read_shard(shard).to_pylist()
