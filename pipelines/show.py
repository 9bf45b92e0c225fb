"""What a person reads of a run: the plan before it, and the closing lines after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpo_ray.config import BASE_MODEL, Config, Data, Paths
from dpo_ray.config.reward import named

if TYPE_CHECKING:
    from pipelines import Stage
    from pipelines.context import RunContext


_SHOWN = 4
"""Prompts whose answers the terminal shows; the report has more."""
_TASKS_SHOWN = 6
"""Rows of benchmark tasks that the closing lines have at most; the report has all."""


def _listed(paths: Paths) -> str:
    return paths if isinstance(paths, str) else ", ".join(paths)


def _trained_on(data: Data) -> str:
    if not data.sources:
        return _listed(cast("Paths", data.train or ()))
    total = sum((data.weights or {}).values())
    shares = {source.name: f", {source.weight / total:.0%}" for source in data.sources if source.weight is not None}
    return " and ".join(f"{one.name} ({_listed(one.path)}{shares.get(one.name, '')})" for one in data.sources)


def plan_lines(config: Config, until: Stage) -> list[str]:
    """What a run would do, stage by stage."""
    train, loss, win_rate, tasks = config.train, config.train.loss, config.evaluate.win_rate, config.evaluate.tasks
    beta = getattr(loss, "beta", None)  # a few losses have none
    start = "from the published model, if there is one, " if train.start == "published" else ""
    before = ", before and after" if config.reference.engine != "torch" else ""
    if config.generate is not None:
        generate = config.generate
        told = {True: "", False: " told otherwise"}
        by = " and ".join(
            f"{m.samples} of {m.path or 'the model'}{told[m.system_prompt is None]}" for m in generate.models
        )
        by = by or f"{generate.samples} samples"
        first = [
            (
                "generate",
                f"{by} a prompt of {generate.prompts} by vLLM, scored by {named(generate.reward)}, paired",
            )
        ]
    else:
        data = config.data
        chosen = "".join(f", {name}={value}" for name, value in data.chooses_files.items())
        held_out = _listed(data.eval) if data.eval else f"{data.held_out_fraction:g} of the prompts"
        first = [
            (
                "ingest",
                f"pairs of {_trained_on(data)}{chosen}, held out: {held_out}; without duplicates and contradictions",
            )
        ]
    steps = [
        *first,
        (
            "tokenize",
            f"prompts up to {config.data.max_prompt_tokens} tokens (longer: {config.data.long_prompts}), "
            f"completions up to {config.data.max_completion_tokens} (longer: {config.data.long_completions})",
        ),
        (
            "reference",
            f"{'vllm if it agrees, or else torch,' if config.reference.engine == 'auto' else config.reference.engine} "
            f"in {config.model.dtype}{' with mismatched completions' * loss.needs_mismatched}"
            f"; {config.reference.calibration_pairs} pairs scored by the trainer too{before}, |Δ| per token up to "
            f"{config.reference.tolerance.limits(config.model.dtype).p99_per_token:g} nats"
            if loss.needs_reference
            else f"none, for {loss.type} learns without",
        ),
        (
            "train",
            f"{loss.type}, {f'beta {beta:g}, ' if beta is not None else ''}learning rate {train.learning_rate:g}, "
            f"{start}{train.epochs} epoch(s), steps of {train.global_batch_size} pairs "
            f"on {train.num_workers} worker(s)",
        ),
        (
            "evaluate",
            "held-out accuracy"
            + (f" and win rate against {win_rate.opponent}, judged by {named(win_rate.reward)}" if win_rate else "")
            + (f"; base and tuned model on {', '.join(tasks.names)}" if tasks else ""),
        ),
        ("publish", f"{config.run.output}/models/{config.run.name}, if the gate holds"),
    ]
    shown = []
    for name, text in steps:
        shown.append(f"{name}: {text}")
        if name == until:
            break
    return shown


def sweep_lines(config: Config) -> list[str]:
    """What a sweep would do after the stages that its trials share."""
    from tuning.preparations import differences, preparations
    from tuning.suggestions import num_trials

    tune = config.tune
    assert tune is not None
    prepared = [differences(config, one) for one in preparations(config).values()]
    rank_by = tune.rank_by if isinstance(tune.rank_by, str) else json.dumps(tune.rank_by)
    lines = [
        f"sweep: {num_trials(tune)} trials, {tune.search}, ranked by {rank_by} on {tune.ranked_fraction:g} of the "
        f"held-out prompts, scheduler {tune.scheduler.type}",
        *(f"  {path}: {json.dumps(found.written())}" for path, found in tune.searched().items()),
    ]
    if len(prepared) > 1:
        lines.append(f"  rows are made, and their reference scored, once for each of: {'; '.join(prepared)}")
    if tune.repeat_best is not None:
        lines.append(f"  then the best {tune.repeat_best.k} with {tune.repeat_best.seeds} other seeds each")
    lines.append("evaluate: the best trial, on the other held-out prompts")
    lines.append(f"publish: {config.run.output}/models/{config.run.name}, if the gate holds")
    return lines


def iterate_lines(config: Config) -> list[str]:
    """What `dpo-ray iterate` would do."""
    options, win_rate = config.iterate, config.evaluate.win_rate
    assert options is not None and win_rate is not None
    prompts = "a part of the prompts of its own" if options.prompts == "fresh" else "all prompts"
    reference = "the policy that it begins with" if options.reference == "current" else "the first model"
    replay = f", {options.replay:g} of its pairs from earlier rounds" if options.replay else ""
    return [
        f"iterate: {'at most ' * options.stop_early}{options.rounds} rounds, each with {prompts} and with {reference} "
        f"as reference{replay}"
        + f"; until the win rate against {win_rate.opponent} no longer improves beyond its interval"
        * options.stop_early,
        *(f"  {line}" for line in plan_lines(config, "evaluate")),
        f"publish: {config.run.output}/models/{config.run.name}, the best round, if the gate holds",
    ]


def closing_lines(context: RunContext, summary: dict[str, Any], log: Path) -> list[str]:
    """The last words of a run that ended well."""
    lines = ["", *_measured(context.config, summary.get("eval") or {})]
    for found in summary.get("rounds", []):
        rate = found["win_rate"]
        lines.append(
            f"Round {found['round']}: win rate {rate['value']:.3f}, 95% interval {rate['low']:.3f} to "
            f"{rate['high']:.3f}{', the best' if found['best'] else ''}"
        )
    if samples := summary.get("samples"):
        lines.append("The first held-out prompts:")
        for sample in samples[:_SHOWN]:
            lines += [f"  {sample['prompt']}", f"    before: {sample['before']}", f"    after:  {sample['after']}"]
    if sweep := summary.get("sweep"):
        lines += ["Trials, best first:", *(f"  {line}" for line in sweep["ranking"])]
    reused = sum(s["reused"] for s in summary["stages"].values())
    lines.append(f"Stages: {len(summary['stages'])}, of which {reused} were finished already")
    if summary["published"]:
        lines.append(f"Model:   {summary['published']}")
    if sweep:
        lines += [f"Best:    {sweep['best_yaml']}", f"Trials:  {sweep['results']}"]
    lines += [f"Report:  {context.folder / 'report.html'}", f"Summary: {context.folder / 'summary.json'}"]
    return [*lines, f"Log:     {log}"]


def _measured(config: Config, evaluation: dict[str, Any]) -> list[str]:
    """What an evaluation tells, a line each."""
    # Not above: a plan is shown without what draws reports.
    from dpo_ray.evaluation.render import judged_by
    from dpo_ray.evaluation.tasks import task_line

    lines = []
    if found := evaluation.get("accuracy"):
        lines.append(f"Held-out accuracy: {_interval(found)}")
    if found := evaluation.get("win_rate"):
        against = evaluation.get("against", BASE_MODEL)
        lines.append(f"Win rate against {against}, {judged_by(config)}: {_interval(found)}")
        if greedy := evaluation.get("greedy_win_rate"):
            lines.append(f"  of greedy answers: {_interval(greedy)}")
        controlled, drift = evaluation["length_controlled_win_rate"], evaluation["drift"]
        lines.append(f"  at equal lengths: {_interval(controlled)}")
        theirs = "before" if against == BASE_MODEL else against
        lines.append(
            f"Answers: {drift['tuned']['tokens']:.0f} tokens, {theirs} {drift['base']['tokens']:.0f}; cut short "
            f"{drift['tuned']['truncated']['value']:.0%}, {theirs} {drift['base']['truncated']['value']:.0%}"
        )
        lines.append(f"KL from the base model, nats a token: {_interval(evaluation['kl_per_token'])}")
    if found := evaluation.get("chosen_logps"):
        lines.append(
            f"Log-likelihood of a held-out chosen answer: {found['after']:.2f} nats, before {found['before']:.2f}"
        )
    if 0 < len(tasks := evaluation.get("tasks", [])) <= _TASKS_SHOWN:
        lines += [task_line(row) for row in tasks]
    for name, found in (evaluation.get("sets") or {}).items():
        if found["accuracy"]:
            lines.append(f"Accuracy on {name}: {_interval(found['accuracy'])}")
        if change := found.get("change"):
            lines.append(f"  change from the published version {found['version']}: {_interval(change)}")
    return lines


def _interval(found: dict[str, Any]) -> str:
    return f"{found['value']:.3f}, 95% interval {found['low']:.3f} to {found['high']:.3f} (n={found['n']})"
