"""What trials had and what they measured, by the paths of the configuration: what charts of a sweep are drawn from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpo_ray.config import Tune
from dpo_ray.config.tune import Choice, Distribution, Range
from tuning.measures import score
from tuning.objectives import ShownObjective, shown, shown_objectives
from tuning.records import Trial
from tuning.space import labels
from tuning.suggestions import study_of

_MOST_LABEL = 26  # characters of an option's label
_LOG_FROM = 20.0  # values that span more than this factor are drawn by their logarithm
_FEWEST_FOR_IMPORTANCES = 4


def searched(tune: Tune) -> Iterator[tuple[str, str, Distribution]]:
    """Name in a point, path in the configuration, and distribution: one path has several names where several options
    of a choice have it. What is inside of an option comes after it."""
    for path, found in tune.searched().items():
        yield from _inside(path, path, found)


def _inside(name: str, path: str, found: Any) -> Iterator[tuple[str, str, Distribution]]:
    if isinstance(found, Range):
        yield name, path, found
    elif isinstance(found, Choice):
        yield name, path, found
        for label, option in zip(labels(found), found.options, strict=True):
            yield from _inside(f"{name}[{label}]", path, option)
    elif isinstance(found, Mapping):
        for key, inner in found.items():
            yield from _inside(f"{name}.{key}", f"{path}.{key}", inner)


def searched_paths(tune: Tune) -> list[str]:
    return list(dict.fromkeys(path for _, path, _ in searched(tune)))


def searched_values(tune: Tune, trial: Trial) -> dict[str, Any]:
    """Path → value; of an option that is a section its label."""
    values = {}
    for name, path, found in searched(tune):
        if name in trial.point:
            value = trial.point[name]
            values[path] = option_of(found, value) if isinstance(found, Choice) else value
    return values


def option_of(choice: Choice, label: str) -> Any:
    """What a label stands for, or the name of a section."""
    option = choice.options[labels(choice).index(label)]
    if not isinstance(option, Mapping | Range | Choice):
        return option
    names = [_section_name(*both) for both in zip(labels(choice), choice.options, strict=True)]
    place = labels(choice).index(label)
    return names[place] if names.count(names[place]) == 1 else f"{place + 1}: {names[place]}"


def _section_name(label: str, option: Any) -> str:
    """Shorter than its label, which is all of it as JSON where its type does not tell it apart."""
    if not isinstance(option, Mapping) or label == option.get("type"):
        return label
    parts = []
    for key, inner in option.items():
        value = "…" if isinstance(inner, Mapping | Range | Choice) else shown(inner)
        parts.append(value if key == "type" else f"{key} {value}")
    return ", ".join(parts) or label


def distinct(tune: Tune, trials: Iterable[Trial], path: str) -> list[Any]:
    values = (searched_values(tune, trial) for trial in trials)
    return sorted({mine[path] for mine in values if path in mine})


def are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def most_telling_pair(tune: Tune, trials: Sequence[Trial]) -> tuple[str, str] | None:
    """The two paths of the heat map, across and up."""
    found: dict[str, list[Any]] = {}
    for trial in trials:
        for path, value in searched_values(tune, trial).items():
            found.setdefault(path, []).append(value)
    numbers = [p for p in searched_paths(tune) if are_numbers(found.get(p, ())) and len(set(found.get(p, ()))) > 1]
    beta = next((path for path in numbers if path.startswith("train.loss.") and path.endswith(".beta")), None)
    if beta is not None and "train.learning_rate" in numbers:
        return beta, "train.learning_rate"
    if len(numbers) < 2:
        return None
    shares = dict.fromkeys(numbers, 0.0)
    path_of = {name: path for name, path, _ in searched(tune)}
    for name, share in (shares_of_importance(tune, trials) or {}).items():
        if path_of[name] in shares:
            shares[path_of[name]] += share
    first, second = sorted(numbers, key=lambda path: -shares[path])[:2]
    return first, second


def panels_by_loss(tune: Tune, trials: Sequence[Trial], pair: tuple[str, str]) -> dict[str, list[Trial]]:
    """Title → trials, one panel for each loss where the pair has an option of it."""
    if not any(path.startswith("train.loss.") for path in pair):
        return {"": list(trials)}
    panels: dict[str, list[Trial]] = {}
    for trial in trials:
        mine = searched_values(tune, trial)
        loss = mine.get("train.loss", mine.get("train.loss.type"))
        panels.setdefault("" if loss is None else cut(str(loss)), []).append(trial)
    return panels


def _ranges(tune: Tune, path: str) -> list[Range]:
    return [found for _, mine, found in searched(tune) if mine == path and isinstance(found, Range)]


def is_grid(tune: Tune, pair: tuple[str, str]) -> bool:
    return tune.search == "grid" or not any(_ranges(tune, path) for path in pair)


def is_log(tune: Tune, path: str, values: Sequence[float]) -> bool:
    if any(found.kind == "loguniform" for found in _ranges(tune, path)):
        return True
    return min(values) > 0 and max(values) / min(values) > _LOG_FROM


def value_of(tune: Tune, trial: Trial) -> float:
    one = shown_objectives(tune)[0].of(trial.measured)
    assert one is not None  # of a trial that _finished has let through
    return one["value"]


def oriented(tune: Tune, trial: Trial) -> float:
    return value_of(tune, trial) * (1 if shown_objectives(tune)[0].higher_is_better else -1)


def finished(tune: Tune, trials: Iterable[Trial]) -> list[Trial]:
    objective = shown_objectives(tune)[0]
    return [t for t in trials if t.state == "finished" and objective.of(t.measured) is not None]


def best_of(tune: Tune, done: Sequence[Trial]) -> int | None:
    return max(done, key=lambda trial: oriented(tune, trial)).number if done else None


def curve_of(objective: ShownObjective, trial: Trial) -> list[tuple[int, dict[str, float]]]:
    """Step and what was measured after it, at each evaluation that has measured the objective."""
    found = ((e["step"], objective.of(e["measured"])) for e in trial.evaluations)
    return [(step, one) for step, one in found if one is not None]


def shares_of_importance(tune: Tune, trials: Sequence[Trial]) -> dict[str, float] | None:
    """Name in points → its share, the largest first; None where they would mean nothing.

    For a study whose parameters it is left to find Optuna documents no error, so none is caught here: it warns where
    few trials leave an importance inaccurate, and it gives zeros where the trials do not differ.
    """
    done = finished(tune, trials)
    if len(done) < _FEWEST_FOR_IMPORTANCES:
        return None
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    objectives = tune.objectives()
    study = study_of(tune, [t for t in done if all(score(o, t.measured) for o in objectives)])
    # What sets the best tenth apart. Optuna advises five trials among them at least; of few trials they are a third.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(1 / 3, max(0.1, 5 / len(done))))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of few trials, which the page says; that low values count as good: hence the −
        found = get_param_importances(study, evaluator=evaluator, target=lambda t: -t.values[0], normalize=False)
    total = sum(found.values())
    if not total > 0:
        return None
    return {name: found[name] / total for name in sorted(found, key=lambda name: (-found[name], name))}


def cut(label: str, most: int = _MOST_LABEL) -> str:
    """The label, or its beginning."""
    return label if len(label) <= most else f"{label[: most - 1]}…"
