"""Which point comes next: of a grid, by chance, or by Optuna from what earlier trials have shown.

A point follows from its number, the seed and, for Optuna, the trials that are known by then. So a sweep that was
killed, or is widened, goes on with the numbers that are missing, and nothing needs to be kept but the trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from dpo_ray.config import Config, Tune
from dpo_ray.config.tune import Range
from dpo_ray.storage.artifact import digest
from tuning.measures import score
from tuning.records import Trial
from tuning.space import Given, Point, drawn, points

_FEWEST_RANDOM, _MOST_RANDOM = 4, 10  # trials before TPE has enough to go by: a third of all, within these


def num_trials(tune: Tune) -> int:
    """Of the search itself, without those that repeat the best ones."""
    return tune.num_trials or sum(1 for _ in points(tune.searched()))


def next_point(config: Config, number: int, known: Iterable[Trial], again: int = 0) -> Point:
    """The point of a trial.

    Args:
        known: the search's trials that have ended or run.
        again: how often one has been drawn for this number that was no new one.
    """
    tune = config.tune
    assert tune is not None
    space = tune.searched()
    if tune.search == "grid":
        return next(point for i, point in enumerate(points(space)) if i == number)
    seed = int(digest([config.run.seed, number, again])[:8], 16)
    if tune.search == "random":
        study = study_of(tune, (), RandomSampler(seed=seed))
    else:
        random = min(_MOST_RANDOM, max(_FEWEST_RANDOM, num_trials(tune) // 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Trials that run count as bad ones, so that others look elsewhere.
            study = study_of(tune, known, TPESampler(seed=seed, n_startup_trials=random, constant_liar=True))
    trial = study.ask()
    drawn(space, _Asked(trial))
    return dict(trial.params)


def study_of(tune: Tune, trials: Iterable[Trial], sampler: BaseSampler | None = None) -> optuna.Study:
    """Trials as Optuna knows them, each objective to be made larger."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler, directions=["maximize"] * len(tune.objectives()))
    study.add_trials([_frozen(tune, trial) for trial in trials])
    return study


def _frozen(tune: Tune, trial: Trial) -> FrozenTrial:
    objectives = tune.objectives()
    distributions = _Distributions(trial.point)
    drawn(tune.searched(), distributions)
    scores = [found[0] for o in objectives if (found := score(o, trial.measured)) is not None]
    is_measured = len(scores) == len(objectives)
    values, on_the_way = None, None
    if trial.state in {"waiting", "training"}:
        state = TrialState.RUNNING
    elif trial.state == "failed":
        state = TrialState.FAIL
    elif len(objectives) > 1 or trial.state == "finished":
        # With several objectives Optuna knows of no trial that was ended early: its last values count, if any.
        state, values = (TrialState.COMPLETE, scores) if is_measured else (TrialState.FAIL, None)
    else:
        # One that was ended counts by how far it came and how good it was there; one that diverged as the worst.
        state = TrialState.PRUNED
        on_the_way = {trial.step: scores[0]} if trial.state == "stopped" and is_measured else None
    return optuna.trial.create_trial(
        state=state,
        values=values,
        params=trial.point,
        distributions=distributions.found,
        intermediate_values=on_the_way,
    )


class _Asked:
    """Values that Optuna draws."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def number(self, name: str, found: Range) -> float | int:
        if found.kind == "integer":
            return self._trial.suggest_int(name, int(found.low), int(found.high))
        return self._trial.suggest_float(name, found.low, found.high, log=found.kind == "loguniform")

    def label(self, name: str, labels: list[str]) -> str:
        label: str = self._trial.suggest_categorical(name, labels)
        return label


class _Distributions(Given):
    """The values of a point, and what they were drawn from."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.found: dict[str, BaseDistribution] = {}

    def number(self, name: str, found: Range) -> float | int:
        self.found[name] = (
            IntDistribution(int(found.low), int(found.high))
            if found.kind == "integer"
            else FloatDistribution(found.low, found.high, log=found.kind == "loguniform")
        )
        return super().number(name, found)

    def label(self, name: str, labels: list[str]) -> str:
        self.found[name] = CategoricalDistribution(labels)
        return super().label(name, labels)
