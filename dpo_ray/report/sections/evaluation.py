"""What held-out pairs and sampled answers tell: margins, win rates, how far the policy has moved, tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.evaluation.margins import HIDING, within_noise
from dpo_ray.evaluation.render import judged_by
from dpo_ray.evaluation.tasks import documents, with_stderr
from dpo_ray.report.charts import histogram, intervals
from dpo_ray.report.document import Block, Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import interval, number

_EVEN = 0.5
_WHOLE = (0.0, 1.0)


def held_out_section(facts: Facts) -> Section | None:
    """Accuracy and margins."""
    found = facts.evaluation
    shown = found.get("histograms") or {}
    accuracies = [("all pairs", found["accuracy"])] if found.get("accuracy") else []
    accuracies += list((found.get("accuracy_by_length") or {}).items())
    accuracies += [(name, one["accuracy"]) for name, one in (found.get("sources") or {}).items() if one.get("accuracy")]
    blocks: list[Block] = []
    if accuracies:
        says = (
            "The share of held-out pairs whose margin is positive: over all, by which answer is the longer one, and by "
            "the tokens of both. The line is at even."
        )
        blocks.append(intervals("Accuracy by length and source", says, accuracies, "accuracy", at=_EVEN, domain=_WHOLE))
    elif "accuracy" in found:
        noise, none = "no margin is above the noise of the engines", "no held-out pair was left to measure it on"
        blocks.append(Paragraph(f"The accuracy is undefined: {noise if found.get('margin') else none}.", "warning"))
    hidden = found.get("within_noise") or {"share": 0.0}
    if found.get("accuracy") and hidden["share"] > HIDING:
        blocks.append(Paragraph(f"{within_noise(hidden['share'], hidden['nats'])}.", "warning"))
    if shown.get("gap"):
        has_both = len(shown["gap"]["counts"]) > 1
        says = (
            "By how many nats a held-out pair's chosen answer is likelier than its rejected one. Right of 0 the model "
            "prefers the chosen one."
        )
        moved = " Before: the reference." if has_both else ""
        title = "Preference before and after" if has_both else "Preference of the policy"
        blocks.append(histogram(title, f"{says}{moved}", shown["gap"], "log π(chosen) − log π(rejected), nats", at=0.0))
    if shown.get("margin"):
        says = "Margins as the loss sees them, without β; a policy that equals the reference has 0 for every pair."
        blocks.append(histogram("Margins after training", says, shown["margin"], "margin, nats", at=0.0))
    if sets := found.get("sets"):
        blocks.append(_sets(sets))
    return Section("held-out", "Held-out pairs", blocks) if blocks else None


def _sets(sets: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in sets.items():
        accuracy, change = one.get("accuracy"), one.get("change")
        measured = (
            [f"{accuracy['value']:.3f}", interval(accuracy), f"{accuracy['n']:,}"]
            if accuracy
            else ["undefined", "", ""]
        )
        said = f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
        rows.append([name, *measured, said, one.get("version") or ""])
    head = ["set", "accuracy", "95% interval", "n", "change from the published version", "which was"]
    return Table(head, rows, caption="Further sets", code=frozenset({5}))


def win_rate_section(facts: Facts) -> Section | None:
    """Who wins, and where."""
    found, win_rate = facts.evaluation, facts.config.evaluate.win_rate
    if not found.get("win_rate"):
        return None
    rates = [("all prompts", found["win_rate"])]
    rates += [
        (label, found[name])
        for name, label in (("greedy_win_rate", "greedy answers"), ("length_controlled_win_rate", "at equal lengths"))
        if found.get(name)
    ]
    rates += list((found.get("win_rate_by_length") or {}).items())
    rates += [(name, one["win_rate"]) for name, one in (found.get("sources") or {}).items() if one.get("win_rate")]
    verdict = {
        "better": "better than",
        "worse": "worse than",
        "cannot tell": "not to be told from",
    }.get(found.get("verdict", ""))
    said = f"On held-out prompts the tuned model is {verdict} {facts.opponent} (two-sided, at 5%). " if verdict else ""
    by = f"Win rates are {judged_by(facts.config)}." if win_rate is not None else ""
    blocks: list[Block] = [
        Paragraph(f"{said}{by}"),
        intervals(
            f"Win rate against {facts.opponent}",
            "How often the tuned model's answer wins, ties as halves: over all prompts, by length of the answers and "
            "by source. A rate that holds only where the tuned answers are longer, or shorter, is about length.",
            rates,
            "win rate",
            at=_EVEN,
            domain=_WHOLE,
        ),
    ]
    if reward := found.get("mean_reward"):
        blocks.append(
            Paragraph(
                f"Mean reward of an answer: {number(reward['base'])} {facts.other}, {number(reward['tuned'])} tuned."
            )
        )
    return Section("win-rate", "Win rate", blocks)


def drift_section(facts: Facts) -> Section | None:
    """How far the policy has moved."""
    found = facts.evaluation
    shown = found.get("histograms") or {}
    measured: list[tuple[str, Mapping[str, Any]]] = []
    if found.get("kl_per_token"):
        measured.append(("KL from the base model, nats a token", found["kl_per_token"]))
    drift, logps = found.get("drift"), found.get("chosen_logps")
    if drift and drift.get("length_ratio"):
        measured.append((f"tokens of an answer, {facts.other} = 1", drift["length_ratio"]))
    if logps:
        measured.append(("change of a chosen answer's log-probability, nats", logps["change"]))
    if not measured:
        return None
    rows = [[label, number(one["value"]), interval(one), f"{one['n']:,}"] for label, one in measured]
    blocks: list[Block] = [Table(["", "value", "95% interval", "n"], rows)]
    if logps:
        blocks.append(
            Paragraph(
                f"Summed log-probability of a held-out chosen answer: {logps['before']:.2f} nats before, "
                f"{logps['after']:.2f} after. DPO lowers it, as a rule; a deep fall says that the policy left the data."
            )
        )
    for name, title, says, unit, at in _HISTOGRAMS:
        if shown.get(name):
            blocks.append(histogram(title, says, _renamed(shown[name], facts), unit, at=at))
    if drift:
        blocks.append(_drift(drift, facts))
    return Section("drift", "How far it has moved", blocks)


_HISTOGRAMS = (
    ("tokens", "Length of sampled answers", "Mean tokens of a prompt's answers, before and after.", "tokens", None),
    (
        "kl_per_token",
        "KL by prompt",
        "log π − log π_ref of the tuned model's own answers, per token.",
        "nats a token",
        0.0,
    ),
    (
        "chosen_change",
        "Change of chosen answers",
        "By how much each held-out one became likelier (right of 0) or less likely.",
        "nats an answer",
        0.0,
    ),
)


def _renamed(found: Mapping[str, Any], facts: Facts) -> Mapping[str, Any]:
    names = {"before": facts.other, "after": "tuned" if facts.other != "before" else "after"}
    return {**found, "counts": {names.get(name, name): of for name, of in found["counts"].items()}}


def _drift(drift: Mapping[str, Any], facts: Facts) -> Table:
    sides = ("base", "tuned")
    rows = [
        [label, *(number(drift[side][name]) for side in sides)]
        for name, label in (("tokens", "tokens, mean"), ("distinct_1", "distinct-1"), ("distinct_2", "distinct-2"))
    ]
    for name in ("repetition", "refusals", "empty", "truncated"):
        rows.append([name, *(f"{drift[side][name]['value']:.3f} {interval(drift[side][name])}" for side in sides)])
    return Table(["sampled answers", facts.other, "tuned"], rows, caption="The answers themselves")


def tasks_section(facts: Facts) -> Section | None:
    """Benchmark tasks."""
    tasks = facts.evaluation.get("tasks")
    if not tasks:
        return None
    better = {True: "higher is better", False: "lower is better"}
    rows = [
        [
            one["task"],
            "" if one["num_fewshot"] is None else str(one["num_fewshot"]),
            one["metric"],
            better.get(one["higher_is_better"], ""),
            with_stderr(one["base"]),
            with_stderr(one["tuned"]),
            documents(one),
        ]
        for one in tasks
    ]
    table = Table(["task", "examples", "metric", "", "base", "tuned", "n"], rows)
    said = "By lm-evaluation-harness, through the model's chat template; ± one standard error."
    return Section("tasks", "Benchmark tasks", [Paragraph(said), table])
