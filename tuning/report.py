"""The page of a sweep: what was searched, what was chosen and how far that is to be trusted, all trials, and plots."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from dpo_ray.config import BASE_MODEL, Config, Tune, dump_config
from dpo_ray.config.tune import ASHA, Choice, Measure, MedianStopping, Range
from tuning.plots import (
    ShownObjective,
    heat_map,
    importances,
    learning_curves,
    parallel_coordinates,
    pareto,
    rounded,
    shown,
    shown_objectives,
)
from tuning.records import State, Trial
from tuning.results import Ranked, shown_values

_UNFINISHED = ("stopped", "diverged", "failed", "training", "waiting")  # in the order of the table

_STATES: dict[State, str] = {
    "finished": "finished",
    "stopped": "stopped by the scheduler",
    "diverged": "diverged",
    "failed": "failed",
    "training": "still training",
    "waiting": "waiting",
}

_SEARCHES = {
    "grid": "Grid search: every combination of the values.",
    "random": "Random search: each trial's values were drawn independently.",
    "tpe": "Optuna's TPE: after a first few random trials, values were drawn where earlier trials were good.",
}


def sweep_page(
    run_id: str,
    config: Config,
    trials: Sequence[Trial],
    repeats: Sequence[Trial],
    ranking: Sequence[Ranked],
    chosen: dict[str, Any] | None,
    reasons: Sequence[str],
) -> str:
    """The report of a sweep, one HTML page that needs nothing else.

    Args:
        config: with the section tune.
        trials, repeats: the search's own, and those that repeat one with another seed.
        ranking: the finished ones, best first.
        chosen: None where no trial finished, or of the trial that was chosen: `number`; `accuracy` and `win_rate`, the
            final estimates (value, low, high, n) on the held-out pairs that no trial was ranked by, or None where they
            were not measured; `ranked_accuracy` (value, low, high) on the pairs that trials were ranked by, or None;
            and `published`, where the model stands, or None.
        reasons: why nothing was published, if so.
    """
    tune = config.tune
    assert tune is not None
    best = chosen["number"] if chosen is not None else ranking[0].trial.number if ranking else None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuning"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sweep.html").render(
        run_id=run_id,
        published=chosen["published"] if chosen is not None else None,
        reasons=reasons,
        chosen=_chosen(config, trials, ranking, chosen) if chosen is not None else None,
        ties=_ties(tune, ranking),
        front=_front(tune, ranking),
        space=[(path, _described(found)) for path, found in tune.searched().items()],
        how=_how(tune, trials, repeats),
        order=_order(tune, ranking),
        table=_table(tune, trials, ranking),
        repeats=_repeats(tune, repeats),
        plots=_plots(tune, trials, best, is_repeated=bool(repeats)),
        config=dump_config(config),
    )


def _chosen(
    config: Config, trials: Sequence[Trial], ranking: Sequence[Ranked], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """What the page says of the trial that was chosen."""
    tune, win_rate = config.tune, config.evaluate.win_rate
    assert tune is not None
    opponent = win_rate.opponent if win_rate is not None else BASE_MODEL
    number = chosen["number"]
    trial = next(trial for trial in trials if trial.number == number)
    place = next((one for one in ranking if one.trial.number == number), None)
    finals = [("preference accuracy", chosen["accuracy"]), (f"win rate against {opponent}", chosen["win_rate"])]
    return {
        "number": number,
        "values": [(path, shown(value)) for path, value in shown_values(tune, trial).items()],
        "measures": _measures(tune, trial),
        "over_seeds": _over_seeds(tune, place) if place is not None else None,
        "finals": [(label, estimate) for label, estimate in finals if estimate is not None],
        "accuracy": chosen["accuracy"],
        "ranked_accuracy": chosen["ranked_accuracy"],
        "compared": len(ranking),
    }


def _measures(tune: Tune, trial: Trial) -> list[tuple[str, str]]:
    """The objectives of a trial, first seed: label → value and interval."""
    found = ((objective.label, objective.of(trial.measured)) for objective in shown_objectives(tune))
    return [(label, _with_interval(one)) for label, one in found if one is not None]


def _over_seeds(tune: Tune, one: Ranked) -> dict[str, Any] | None:
    if one.spread is None:
        return None
    objective = shown_objectives(tune)[0]
    mean, _ = objective.of_score(one.score)
    _, spread = objective.of_score((0.0, one.spread))
    return {
        "label": objective.label,
        "mean": rounded(mean, spread),
        "spread": rounded(spread, spread),
        "seeds": 1 + len(one.repeats),
    }


def _ties(tune: Tune, ranking: Sequence[Ranked]) -> str:
    """Which trials cannot be told from the best, in a sentence or two."""
    if not ranking:
        return ""
    best, *others = ranking
    tied = [one.trial.number for one in others if one.is_tied]
    if not others:
        return f"Only trial {best.trial.number} finished: there is nothing to compare it with."
    name = shown_objectives(tune)[0].name
    if not tied:
        return (
            f"In {name}, trial {best.trial.number} differs from every other finished one by more than chance would "
            "make it (at 95%, each compared with it alone)."
        )
    named = _listed([str(number) for number in tied])
    return (
        f"In {name}, {'trials' if len(tied) > 1 else 'trial'} {named} cannot be told from trial {best.trial.number}, "
        "the best, at 95%: chance alone could have made the difference. Other reasons may choose among them, such as a "
        "smaller loss of likelihood, or values that are known to work."
    )


def _front(tune: Tune, ranking: Sequence[Ranked]) -> str:
    if len(tune.objectives()) < 2 or not ranking:
        return ""
    numbers = [str(one.trial.number) for one in ranking if one.on_front]
    first = shown_objectives(tune)[0].name
    which = f"trials {_listed(numbers)}" if len(numbers) > 1 else f"trial {_listed(numbers)} alone"
    return (
        f"The Pareto front is {which}: no other trial is better in one objective and as good in all. "
        f"Among these, {first} chooses, for it is named first."
    )


def _how(tune: Tune, trials: Sequence[Trial], repeats: Sequence[Trial]) -> list[str]:
    """Sentences that say how the space was searched, and what by."""
    counts = Counter(trial.state for trial in trials)
    states = [f"{counts[state]} {_STATES[state]}" for state in get_args(State) if counts[state]]
    by_end = sorted(states, key=lambda text: list(_STATES.values()).index(text.partition(" ")[2]))
    noun = "trial" if len(trials) == 1 else "trials"
    objectives = [f"{o.label}, {'higher' if o.higher_is_better else 'lower'} is better" for o in shown_objectives(tune)]
    by = objectives[0] if len(objectives) == 1 else "; ".join(f"{i}. {text}" for i, text in enumerate(objectives, 1))
    share = tune.ranked_fraction
    return [
        _SEARCHES[tune.search],
        _scheduled(tune),
        f"{len(trials)} {noun}: {', '.join(by_end)}." if trials else "No trial was begun.",
        f"Ranked by: {by}. Measured on {share:.0%} of the held-out prompts; the other {1 - share:.0%} judge the model "
        "that was chosen, and no trial was ranked by them.",
        *([f"{len(repeats)} more trainings repeated the best trials with other seeds."] if repeats else []),
        f"The times of all trainings add up to {_duration(sum(t.seconds for t in [*trials, *repeats]))}.",
    ]


def _scheduled(tune: Tune) -> str:
    scheduler = tune.scheduler
    if isinstance(scheduler, ASHA):
        grace = "its first evaluation" if scheduler.grace_steps is None else f"step {scheduler.grace_steps}"
        return (
            f"Asynchronous successive halving: every trial trained to {grace}, and from there on, at ever later steps, "
            f"about one in {scheduler.reduction_factor:g} went on."
        )
    if isinstance(scheduler, MedianStopping):
        grace = "its first evaluation" if scheduler.grace_steps is None else f"step {scheduler.grace_steps}"
        return (
            f"Median stopping: every trial trained to {grace}, and was then ended when its best result was below the "
            f"median of the others' running means, of {scheduler.min_trials} others at least."
        )
    return "No scheduler: every trial was to train to its end."


def _described(found: Any) -> str:
    """A distribution, for people."""
    if isinstance(found, Range):
        low, high = shown(found.low), shown(found.high)
        kinds = {"uniform": "uniform", "loguniform": "log-uniform", "integer": "whole numbers"}
        return f"{kinds[found.kind]}, {low} to {high}"
    if isinstance(found, Choice):
        options = [_described(option) for option in found.options]
        separator = "; " if any("," in option for option in options) else ", "
        return options[0] if len(options) == 1 else f"one of: {separator.join(options)}"
    if isinstance(found, Mapping):
        return f"{{{', '.join(f'{key}: {_described(inner)}' for key, inner in found.items())}}}"
    return shown(found)


def _order(tune: Tune, ranking: Sequence[Ranked]) -> str:
    """What the order of the table goes by, where it is not the ranked measure of one training alone."""
    name = shown_objectives(tune)[0].name
    parts = []
    if len(tune.objectives()) > 1:
        parts.append(f"Trials of the Pareto front come first, in the order of {name}.")
    if any(one.repeats for one in ranking):
        parts.append(
            f"Trials that were repeated with other seeds come before the others, in the order of their mean {name} "
            "over all of their seeds."
        )
    return " ".join(parts)


def _table(tune: Tune, trials: Sequence[Trial], ranking: Sequence[Ranked]) -> dict[str, Any]:
    """Header and rows of all trials: those of the ranking in its order, then the others by their state."""
    in_ranking = {one.trial.number for one in ranking}
    others = [trial for trial in trials if trial.number not in in_ranking]
    # One that finished without a measure it is ranked by has no place either.
    others.sort(key=lambda t: (_UNFINISHED.index(t.state) if t.state in _UNFINISHED else -1, t.number))
    values = {trial.number: shown_values(tune, trial) for trial in trials}
    paths = _paths(tune, values.values())
    measures = _columns(tune, trials)
    with_seeds = any(one.spread is not None for one in ranking)
    several = len(tune.objectives()) > 1

    def row(place: int | None, trial: Trial, one: Ranked | None) -> dict[str, Any]:
        mine = values[trial.number]
        notes: list[str] = [trial.state]
        notes += ["best"] if place == 1 else []
        notes += ["tied with the best"] if one is not None and one.is_tied else []
        notes += ["on the front"] if several and one is not None and one.on_front else []
        found = [objective.of(trial.measured) for objective in measures]
        seeds = _over_seeds(tune, one) if one is not None else None
        return {
            "place": "–" if place is None else place,
            "number": trial.number,
            "is_finished": trial.state == "finished",
            "state": ", ".join(notes),
            "values": [shown(mine[path]) if path in mine else "–" for path in paths],
            "measures": ["–" if estimate is None else _with_interval(estimate) for estimate in found],
            "seeds": f"{seeds['mean']} ± {seeds['spread']} ({seeds['seeds']})" if seeds else "–",
            "steps": f"{trial.step}/{trial.num_steps}" if trial.num_steps is not None else str(trial.step),
            "seconds": f"{trial.seconds:.0f}",
            "reason": trial.reason or "",
        }

    rows = [row(place, one.trial, one) for place, one in enumerate(ranking, 1)]
    return {
        "paths": paths,
        "measures": [f"{objective.name} ({objective.unit})" for objective in measures],
        "seeds": shown_objectives(tune)[0].name if with_seeds else None,
        "rows": rows + [row(None, trial, None) for trial in others],
    }


def _paths(tune: Tune, values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those that any trial has a value for, in the order of the space."""
    found = dict.fromkeys(path for mine in values for path in mine)
    return [path for top in tune.searched() for path in found if path == top or path.startswith(f"{top}.")]


def _columns(tune: Tune, trials: Sequence[Trial]) -> list[ShownObjective]:
    """What any trial was measured by, the objectives first."""
    objectives = shown_objectives(tune)
    alone = {name for objective in objectives if len(objective.weights) == 1 for name in objective.weights}
    names = [name for name in get_args(Measure) if any(name in trial.measured for trial in trials)]
    return [*objectives, *(ShownObjective({name: 1.0}) for name in names if name not in alone)]


def _repeats(tune: Tune, repeats: Sequence[Trial]) -> list[dict[str, Any]]:
    objective = shown_objectives(tune)[0]
    found = []
    for trial in sorted(repeats, key=lambda trial: (trial.number, trial.seed)):
        one = objective.of(trial.measured)
        found.append(
            {
                "number": trial.number,
                "seed": trial.seed,
                "state": trial.state,
                "measure": _with_interval(one) if one is not None else "–",
                "reason": trial.reason or "",
            }
        )
    return found


def _plots(tune: Tune, trials: Sequence[Trial], best: int | None, *, is_repeated: bool) -> list[dict[str, Any]]:
    """The plots that mean something, each with a sentence on how to read it."""
    shared = " Where several trials share a cell, it shows the best of them." if tune.search == "grid" else ""
    own = (
        " Values are those of the search's own seed; the marked trial is the best by its mean over all of its seeds."
        if is_repeated
        else ""
    )
    found: Iterable[tuple[Figure | None, str]] = (
        (
            heat_map(tune, trials, best),
            "Look for a bright region and not for a single bright spot: good neighbours say that the best trial is no "
            f"stroke of luck, and a best trial at the edge that the space ends too early.{shared}{own}",
        ),
        (
            parallel_coordinates(tune, trials, best),
            "Each line is a trial and crosses each axis at its value (at – where its options have none there; lines of "
            "the same value are set apart a little). Where the bright lines meet the value matters, and where they "
            "spread over the whole axis it decides little.",
        ),
        (
            learning_curves(tune, trials, best),
            "Each line is a trial, from evaluation to evaluation: curves that still rise at their end ask for more "
            "steps, and those within the band of the best one may be as good as it. A cross says that the trial "
            "diverged, on the lower edge before its first evaluation.",
        ),
        (
            importances(tune, trials),
            "How far the values of the best finished trials stand out from those of all finished ones: a long bar is "
            "a value to choose with care. It tells little with few trials, and nothing of those that were ended early.",
        ),
        (
            pareto(tune, trials, best),
            "Each point is a finished trial, its bars one standard error: the line joins the trials that none is "
            "better than in both objectives, and the numbers on it are theirs.",
        ),
    )
    return [{"svg": Markup(_svg(figure)), "caption": caption} for figure, caption in found if figure is not None]


def _svg(figure: Figure) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _with_interval(one: Mapping[str, float]) -> str:
    value, low, high = (rounded(one[key], one["se"]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
