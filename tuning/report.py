"""What the report of a sweep begins with: what was chosen and how far that is to be trusted, all trials, and charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from dpo_ray.config import BASE_MODEL, Config, Tune
from dpo_ray.config.tune import ASHA, Choice, Measure, MedianStopping, Range
from dpo_ray.report.document import Block, Chart, Code, Paragraph, Section, Table
from tuning.charts import importances, learning_curves, pareto
from tuning.coordinates import parallel_coordinates
from tuning.heat_map import heat_maps
from tuning.objectives import ShownObjective, rounded, shown, shown_objectives
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


def sweep_sections(
    config: Config,
    trials: Sequence[Trial],
    repeats: Sequence[Trial],
    ranking: Sequence[Ranked],
    chosen: dict[str, Any] | None,
    best_yaml: str | None = None,
) -> list[Section]:
    """What the report of a sweep begins with.

    Args:
        config: with the section tune.
        trials, repeats: the search's own, and those that repeat one with another seed.
        ranking: the finished ones, best first.
        chosen: None where no trial finished, or of the trial that was chosen: `number`; `accuracy` and `win_rate`, the
            final estimates (value, low, high, n) on the held-out pairs that no trial was ranked by, or None where they
            were not measured; and `ranked_accuracy` (value, low, high) on the pairs that trials were ranked by, or
            None.
        best_yaml: the configuration of the chosen one, which `dpo-ray run` takes.
    """
    tune = config.tune
    assert tune is not None
    best = chosen["number"] if chosen is not None else ranking[0].trial.number if ranking else None
    found = [_chosen_section(config, trials, ranking, chosen, best_yaml)]
    plots = _plots(tune, trials, best, is_repeated=bool(repeats))
    order = _order(tune, ranking)
    every: list[Block] = [
        *(Paragraph(text) for text in (_ties(tune, ranking), _front(tune, ranking), order) if text),
        _table(tune, trials, ranking),
        Paragraph("Measures of a trial that did not finish are those of its last evaluation, after fewer steps."),
        *([_repeats(tune, repeats)] if repeats else []),
        Paragraph(_NEVER_BY, "warning"),
        *plots,
    ]
    found.append(Section("trials", "All trials", every))
    space = [[path, _described(one)] for path, one in tune.searched().items()]
    how: list[Block] = [Table(["path", "values"], space, code=frozenset({0}))]
    how += [Paragraph(text) for text in _how(tune, trials, repeats)]
    return [*found, Section("space", "What was searched", how)]


_NEVER_BY = (
    "Never rank trials of different β, or of different losses, by loss or by margin: both scale with β, so the largest "
    "or smallest of them says which β it was, and not which model is better. Accuracy and win rate compare."
)


def _chosen_section(
    config: Config,
    trials: Sequence[Trial],
    ranking: Sequence[Ranked],
    chosen: dict[str, Any] | None,
    best_yaml: str | None,
) -> Section:
    if chosen is None:
        return Section("chosen", "The sweep", [Paragraph("No trial finished, so none was chosen.", "bad")])
    found = _chosen(config, trials, ranking, chosen)
    blocks: list[Block] = [Table(["path", "value"], found["values"], code=frozenset({0, 1}), caption="Its values")]
    curse = "is in part the one that the pairs it was ranked by happened to favour (the winner's curse)"
    if found["finals"]:
        rows = [
            [name, f"{e['value']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}", f"{e['n']:,}"]
            for name, e in found["finals"]
        ]
        blocks.append(Table([_FINAL, "value", "95% interval", "n"], rows))
        said = "This is the number to quote."
        if found["accuracy"] and found["ranked_accuracy"]:
            ranked = found["ranked_accuracy"]
            said += (
                f" On the pairs that trials were ranked by, the accuracy was {ranked['value']:.3f} "
                f"[{ranked['low']:.3f}, {ranked['high']:.3f}]."
            )
        if found["compared"] > 1:
            said += (
                " The final estimate may well be lower than what the trial was ranked by: the best of "
                f"{found['compared']} trials {curse}, and the pairs of the final estimate had no part in choosing it."
            )
        blocks.append(Paragraph(said))
    else:
        blocks.append(
            Paragraph(
                "There is no final estimate: nothing was measured on held-out pairs that no trial was ranked by. What "
                f"the trial was ranked by is no substitute: the best of several trials {curse}.",
                "warning",
            )
        )
    measures = [[label, value] for label, value in found["measures"]]
    if seeds := found["over_seeds"]:
        label = f"{seeds['label']}, mean ± standard deviation over {seeds['seeds']} seeds"
        measures.append([label, f"{seeds['mean']} ± {seeds['spread']}"])
    blocks.append(Table(["what it was ranked by", "value [95% interval]"], measures))
    if best_yaml is not None:
        blocks += [Paragraph("The chosen configuration alone, as a run:"), Code(f"dpo-ray run {best_yaml}")]
    return Section("chosen", f"Chosen: trial {found['number']}", blocks)


_FINAL = "on held-out pairs that no trial was ranked by"


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
        "values": [[path, shown(value)] for path, value in shown_values(tune, trial).items()],
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


def _table(tune: Tune, trials: Sequence[Trial], ranking: Sequence[Ranked]) -> Table:
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

    def row(place: int | None, trial: Trial, one: Ranked | None) -> list[str]:
        mine = values[trial.number]
        notes: list[str] = [trial.state]
        notes += ["best"] if place == 1 else []
        notes += ["tied with the best"] if one is not None and one.is_tied else []
        notes += ["on the front"] if several and one is not None and one.on_front else []
        found = [objective.of(trial.measured) for objective in measures]
        seeds = _over_seeds(tune, one) if one is not None else None
        return [
            "–" if place is None else str(place),
            str(trial.number),
            ", ".join(notes),
            *(shown(mine[path]) if path in mine else "–" for path in paths),
            *("–" if estimate is None else _with_interval(estimate) for estimate in found),
            *([f"{seeds['mean']} ± {seeds['spread']} ({seeds['seeds']})" if seeds else "–"] if with_seeds else []),
            f"{trial.step}/{trial.num_steps}" if trial.num_steps is not None else str(trial.step),
            f"{trial.seconds:.0f}",
            trial.reason or "",
        ]

    rows = [row(place, one.trial, one) for place, one in enumerate(ranking, 1)]
    rows += [row(None, trial, None) for trial in others]
    seeds = [f"mean {shown_objectives(tune)[0].name} ± deviation (seeds)"] if with_seeds else []
    head = ["place", "trial", "state", *paths, *(f"{o.name} ({o.unit})" for o in measures), *seeds]
    return Table([*head, "steps", "seconds", "reason"], rows, caption="Trials, best first")


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


def _repeats(tune: Tune, repeats: Sequence[Trial]) -> Table:
    objective = shown_objectives(tune)[0]
    rows = []
    for trial in sorted(repeats, key=lambda trial: (trial.number, trial.seed)):
        one = objective.of(trial.measured)
        measure = _with_interval(one) if one is not None else "–"
        rows.append([str(trial.number), str(trial.seed), trial.state, measure, trial.reason or ""])
    return Table(["trial", "seed", "state", "ranked by", "reason"], rows, caption="Repeated with other seeds")


def _plots(tune: Tune, trials: Sequence[Trial], best: int | None, *, is_repeated: bool) -> list[Chart]:
    """Those that mean something."""
    own = (
        " Values are those of the search's own seed; the marked trial is the best by its mean over all of its seeds."
        if is_repeated
        else ""
    )
    shared = " Where several trials share a cell, it shows the best of them." if tune.search == "grid" else ""
    maps = [replace(one, says=f"{one.says}{shared}{own}") for one in heat_maps(tune, trials, best)]
    others = (
        pareto(tune, trials, best),
        parallel_coordinates(tune, trials, best),
        learning_curves(tune, trials, best),
        importances(tune, trials),
    )
    return [*maps, *(one for one in others if one is not None)]


def _with_interval(one: Mapping[str, float]) -> str:
    value, low, high = (rounded(one[key], one["se"]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
