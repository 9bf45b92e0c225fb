"""What a sweep found, in an order that is fair across beta."""

from __future__ import annotations

from typing import Any


def ranked(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first: by held-out accuracy, then by the mean margin without beta.

    Neither loss nor rewards/margins would do: both scale with beta, so the largest beta would win or lose by its
    size alone. A trial whose accuracy is undefined comes last.
    """

    def key(trial: dict[str, Any]) -> tuple[float, float]:
        accuracy = trial["accuracy"]
        return (accuracy["value"] if accuracy else -1.0, trial["mean_margin"])

    return sorted(trials, key=key, reverse=True)


def describe(trial: dict[str, Any]) -> str:
    """One line about a trial."""
    accuracy = trial["accuracy"]
    measured = (
        f"held-out accuracy {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        if accuracy
        else "held-out accuracy undefined"
    )
    beta = f"beta {trial['beta']:g}, " if trial["beta"] is not None else ""
    return f"{beta}learning rate {trial['learning_rate']:g}: {measured}, mean margin {trial['mean_margin']:.3f} nats"
