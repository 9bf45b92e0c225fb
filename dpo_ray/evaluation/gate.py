"""Whether what was measured lets a model be published: every condition by the interval, and not by the value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.config import Gate

FEWEST = 30
"""Observations that the gate asks for where an interval is the bootstrap's: of fewer it is too narrow."""

_OWN_INTERVALS = ("accuracy", "win_rate")  # dpo_ray.estimates.rate holds of any number of observations


@dataclass(frozen=True)
class Condition:
    """What the gate asks for, and what was measured."""

    name: str
    """Of the measure."""
    key: str
    """Below publish.gate."""
    asked: str
    """Such as "above 0.5"."""
    found: Mapping[str, Any] | None
    """value, low, high, n; None where it is undefined."""
    failure: str | None
    """Why it does not hold; None: it holds."""


def failed_conditions(gate: Gate, metrics: dict[str, Any]) -> list[str]:
    """Each condition that does not hold, in words; empty where all hold. metrics: as of `conditions`."""
    return [one.failure for one in conditions(gate, metrics) if one.failure is not None]


def conditions(gate: Gate, metrics: dict[str, Any]) -> list[Condition]:
    """All that the gate asks for.

    metrics: of an evaluation artifact. What it does not have fails the condition that asks for it.
    """
    drift, change = metrics.get("drift") or {}, (metrics.get("chosen_logps") or {}).get("change")
    fall = change and {"value": -change["value"], "low": -change["high"], "high": -change["low"], "n": change["n"]}
    within = gate.length_ratio_within or (None, None)
    asked: list[tuple[str, dict[str, Any] | None, float | None, float | None, str]] = [
        ("accuracy", metrics.get("accuracy"), gate.accuracy_above, None, "accuracy_above"),
        ("win_rate", metrics.get("win_rate"), gate.win_rate_above, None, "win_rate_above"),
        (
            "length_controlled_win_rate",
            metrics.get("length_controlled_win_rate"),
            gate.length_controlled_win_rate_above,
            None,
            "length_controlled_win_rate_above",
        ),
        ("kl_per_token", metrics.get("kl_per_token"), None, gate.kl_below, "kl_below"),
        ("the fall of chosen answers' log-probs", fall, None, gate.chosen_drop_below, "chosen_drop_below"),
        ("length_ratio", drift.get("length_ratio"), *within, "length_ratio_within"),
    ]
    sets = metrics.get("sets") or {}
    for name, limit in gate.no_regression.items():
        measured = sets.get(name, {})
        if measured.get("version", "") is not None:  # else nothing is published that it could be worse than
            label = f"the change of accuracy on {name} from the published version {measured.get('version')}"
            asked.append((label, measured.get("change"), -limit, None, f"no_regression.{name}"))
    return [_condition(*one) for one in asked if one[2] is not None or one[3] is not None]


def _condition(
    name: str, found: dict[str, Any] | None, above: float | None, below: float | None, key: str
) -> Condition:
    limits = [
        *([f"above {above:g}"] if above is not None else []),
        *([f"below {below:g}"] if below is not None else []),
    ]
    asked = " and ".join(limits)
    return Condition(name, key, asked, found, _failure(name, found, above, below, key, asked))


def _failure(
    name: str, found: dict[str, Any] | None, above: float | None, below: float | None, key: str, limits: str
) -> str | None:
    asked = f"publish.gate.{key} asks for {limits}"
    if found is None:
        why = (
            " (the published model is this run's reference, or there is no pair: name a model.path that both were "
            "trained from, or leave the set out)"
        )
        return f"{name} is undefined{why * key.startswith('no_regression')}, and {asked}"
    if found["n"] < FEWEST and name not in _OWN_INTERVALS:
        return (
            f"{name} is {found['value']:.3f} over {found['n']} observations, whose interval is too narrow below "
            f"{FEWEST}: hold out more prompts; {asked}"
        )
    if (above is None or found["low"] > above) and (below is None or found["high"] < below):
        return None
    return (
        f"{name} is {found['value']:.3f} with a 95% interval from {found['low']:.3f} to {found['high']:.3f} "
        f"(n={found['n']}), and {asked}"
    )
