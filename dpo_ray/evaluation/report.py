"""The run's HTML report and the published model's card."""

from __future__ import annotations

import io
from typing import Any

from markupsafe import Markup

from dpo_ray.config import Config, dump_config
from dpo_ray.evaluation.render import judged_by, named_estimates, render


def html_report(config: Config, summary: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The report of a run, one page that needs nothing else."""
    win_rate = config.evaluate.win_rate
    return render(
        "report.html",
        autoescape=True,
        summary=summary,
        estimates=named_estimates(summary.get("eval") or {}),
        judged_by=judged_by(config) if win_rate is not None else None,
        greedy=win_rate is not None and win_rate.sampling.include_greedy,
        of_sources=_of_sources(summary),
        data_shares=_data_shares(summary.get("data") or {}),
        figure=Markup(_figure(history)) if any("loss" in m for m in history) else None,
        config=dump_config(config),
    )


def _of_sources(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Source → what training and evaluation tell of it."""
    parts = [(summary.get(part) or {}).get("sources") or {} for part in ("train", "eval")]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: {key: value for part in parts for key, value in part.get(name, {}).items()} for name in names}


def _data_shares(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    shares = {"the chosen answer is the longer one": data.get("chosen_longer")}
    for by, share in data.get("reference_prefers_chosen", {}).items():
        shares[f"the reference prefers chosen, by the {by} of log-probs"] = share
    return [(label, share) for label, share in shares.items() if share]


# The first three that are measured: single answers have rewards, but neither accuracies nor margins.
_PLOTTED = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def _figure(history: list[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    measured = [name for name in _PLOTTED if any(name in m for m in history)][:3]
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        points = [(m["step"], m[name]) for m in history if name in m]
        axes.plot(*zip(*points, strict=True))
        axes.set_title(name)
        axes.set_xlabel("step")
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg") :]
