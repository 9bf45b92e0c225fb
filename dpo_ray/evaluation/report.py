"""The run's HTML report and the published model's card."""

from __future__ import annotations

import io
from typing import Any

import jinja2
from markupsafe import Markup

from dpo_ray.config import Config, dump_config


def model_card(config: Config, run_id: str, train: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README.md of a published model."""
    return _render("model_card.md", config=config, run_id=run_id, train=train, estimates=_estimates(evaluation))


def html_report(config: Config, summary: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The report of a run, one page that needs nothing else."""
    return _render(
        "report.html",
        autoescape=True,
        summary=summary,
        estimates=_estimates(summary.get("eval") or {}),
        data_shares=_data_shares(summary.get("data") or {}),
        figure=Markup(_figure(history)) if any("loss" in m for m in history) else None,
        config=dump_config(config),
    )


def _render(template: str, *, autoescape: bool = False, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpo_ray.evaluation"),
        autoescape=autoescape,
        undefined=jinja2.ChainableUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _estimates(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    names = {"accuracy": "preference accuracy", "win_rate": "win rate against the base model"}
    return [(label, evaluation[name]) for name, label in names.items() if evaluation.get(name)]


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
