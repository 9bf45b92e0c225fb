"""Templates of the pages that tell people, and what several of them show."""

from __future__ import annotations

from typing import Any

import jinja2

from dpo_ray.config import BASE_MODEL, Config
from dpo_ray.config.reward import named, shared
from dpo_ray.evaluation.tasks import documents, with_stderr


def render(template: str, *, autoescape: bool = False, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpo_ray.evaluation"),
        autoescape=autoescape,
        undefined=jinja2.ChainableUndefined,
        keep_trailing_newline=True,
    )
    environment.globals.update(with_stderr=with_stderr, documents=documents)
    return environment.get_template(template).render(**values)


def judged_by(config: Config) -> str:
    """Who the win rate is by, and which of them made the pairs that were trained on: they are no independent judges."""
    assert config.evaluate.win_rate is not None
    judges = config.evaluate.win_rate.reward
    trained_on = shared(judges, config.generate.reward) if config.generate is not None else []
    note = f" ({', '.join(trained_on)} made the pairs, too)" if trained_on else ""
    return f"judged by {named(judges)}{note}"


def named_estimates(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    names = {
        "accuracy": "preference accuracy",
        "win_rate": f"win rate against {evaluation.get('against', BASE_MODEL)}",
        "greedy_win_rate": "win rate of greedy answers",
        "length_controlled_win_rate": "win rate at equal lengths",
        "kl_per_token": "KL from the base model, nats a token",
    }
    return [(label, evaluation[name]) for name, label in names.items() if evaluation.get(name)]
