"""The first screen: what came of it and why, the figures that matter, and what changed since the last time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.errors import GateFailed
from dpo_ray.evaluation.gate import conditions
from dpo_ray.report.document import Block, Figure, Links, Paragraph, Table, Tone
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import duration, interval, number

_MOST_OPTIONS = 20
_EVEN = 0.5


def verdict(facts: Facts) -> tuple[str, Tone, list[str]]:
    """In a few words, how it is to be taken, and why."""
    summary = facts.summary
    reasons = list(summary.get("reasons") or [])
    if found := summary.get("nothing_new"):
        why = f"These data and this configuration have made what is published already: {found['version']} stands."
        return "Nothing new", "plain", [why, *reasons]
    if summary.get("published"):
        asked = conditions(facts.config.publish.gate, dict(facts.evaluation))
        why = f"The gate's {len(asked)} conditions hold." if len(asked) > 1 else "The gate's condition holds."
        return "Published", "good", [why if asked else "The gate asks for nothing.", *reasons]
    if summary["exit_code"] == GateFailed.exit_code:
        return "Not published", "bad", reasons
    if summary["exit_code"]:
        return "The run did not come to its end", "bad", reasons
    done = list(summary["stages"])
    if summary.get("is_round"):
        return "A round", "plain", ["Which round is published, if one is, stands in the report of the whole run."]
    return (
        "Not published",
        "plain",
        [f"The run was to end with the stage {done[-1]}." if done else "No stage was done."],
    )


def figures(facts: Facts) -> list[Figure]:
    """At most three."""
    found = facts.evaluation
    shown: list[Figure] = []
    if rate := found.get("win_rate"):
        controlled = found.get("length_controlled_win_rate")
        note = f"at equal lengths {controlled['value']:.3f} {interval(controlled)}" if controlled else ""
        shown.append(_figure(f"win rate against {facts.opponent}", rate, note, at=_EVEN))
    if accuracy := found.get("accuracy"):
        note = "of held-out pairs, the chosen answer has the higher reward"
        shown.append(_figure("preference accuracy", accuracy, note, at=_EVEN))
    elif "accuracy" in found:
        why = "no margin is above the engines' noise" if found.get("margin") else "no held-out pair was left"
        shown.append(Figure("preference accuracy", "undefined", "", why, "warning"))
    if kl := found.get("kl_per_token"):
        ratio = (found.get("drift") or {}).get("length_ratio")
        note = f"answers are {ratio['value']:.2f} times as long" if ratio else ""
        shown.append(_figure("KL from the base model, nats a token", kl, note))
    elif logps := found.get("chosen_logps"):
        shown.append(_figure("change of a chosen answer's log-probability, nats", logps["change"], ""))
    return shown


def _figure(label: str, found: Mapping[str, Any], note: str, at: float | None = None) -> Figure:
    tone: Tone = "plain"
    if at is not None:
        tone = "good" if found["low"] > at else "bad" if found["high"] < at else "plain"
    return Figure(label, f"{found['value']:.3f}", f"{interval(found)}, n={found['n']:,}", note, tone)


def facts_of(facts: Facts) -> list[tuple[str, str]]:
    """What it is a report on."""
    summary, config = facts.summary, facts.config
    loss = config.train.loss
    beta = getattr(loss, "beta", None)
    strength = f", β {beta:g}" if isinstance(beta, float) else ""
    found = [
        ("model", config.model.path),
        ("loss", f"{loss.type}{strength}, learning rate {config.train.learning_rate:g}"),
    ]
    if "began" in summary:
        found.append(("began", f"{_moment(summary['began'])}, took {duration(summary['seconds'])}"))
    if summary.get("published"):
        found.append(("published as", summary["published"]))
        if facts.before is None and not summary.get("nothing_new"):
            found.append(("before it", "nothing stood under this name"))
    return found


def changes(facts: Facts) -> list[Block]:
    """Since the model that was published before; nothing where it is not known whether there was one."""
    before = facts.before
    if before is None:
        return []
    where = f", made by the run {before.run_id}" if before.run_id else ""
    blocks: list[Block] = [Paragraph(f"Before it stood {before.version}, since {_moment(before.since)}{where}.")]
    theirs = before.summary.get("eval") or {}
    rows = _compared(theirs, facts.evaluation)
    pairs = [(one.get("data") or {}).get("pairs", 0) for one in (before.summary, facts.summary)]
    if all(pairs) and pairs[0] != pairs[1]:
        rows.append(["pairs of preference data", *(f"{n:,}" for n in pairs), f"{pairs[1] - pairs[0]:+,}"])
    if rows:
        blocks.append(Table(["measured", "before", "now", "change"], rows))
        blocks.append(
            Paragraph("Each was measured on its own run's held-out data, so that small changes may be of these.")
        )
    sets = [(name, one) for name, one in (facts.evaluation.get("sets") or {}).items() if one.get("change")]
    if sets:
        found = [[name, _signed(one["change"]), one["version"]] for name, one in sets]
        blocks.append(Table(["accuracy on the same pairs", "change", "from"], found, code=frozenset({2})))
    if before.options:
        shown = [list(one) for one in before.options[:_MOST_OPTIONS]]
        left = len(before.options) - len(shown)
        more = f" (and {left} more)" if left > 0 else ""
        blocks.append(Table([f"options{more}", "before", "now"], shown, code=frozenset({0, 1, 2})))
    elif before.summary:
        blocks.append(Paragraph("The configuration is the same."))
    else:
        blocks.append(Paragraph("The record of its run is gone, so that no more is known of it."))
    if before.run_id and before.summary:
        blocks.append(Links([("Its report", f"../{before.run_id}/report.html")]))
    return blocks


_COMPARED = {
    "accuracy": "preference accuracy",
    "win_rate": "win rate",
    "length_controlled_win_rate": "win rate at equal lengths",
    "kl_per_token": "KL, nats a token",
}


def _compared(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    same = theirs.get("against") == ours.get("against")
    for name, label in _COMPARED.items():
        if "win_rate" in name and not same:
            continue
        both: Sequence[Any] = (theirs.get(name), ours.get(name))
        if all(both):
            told = [f"{one['value']:.3f} {interval(one)}" for one in both]
            rows.append([label, *told, _change(both[1]["value"] - both[0]["value"])])
    return rows


def _signed(found: Mapping[str, Any]) -> str:
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] (n={found['n']:,})"


def _moment(iso: str) -> str:
    """Without what people do not read of a time in UTC."""
    return iso.replace("T", " ").replace("+00:00", " UTC").replace("Z", " UTC")


def _change(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"
