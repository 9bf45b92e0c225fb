"""What a sweep found: an order fair across β and losses, which places chance could have given, and the table."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.config import Tune
from dpo_ray.config.tune import Measure
from tuning.measures import Measured, distinguishable, pareto_front, score
from tuning.records import Trial
from tuning.space import Given, drawn, margins_compare


@dataclass(frozen=True)
class Ranked:
    """A finished trial and its place."""

    trial: Trial
    score: tuple[float, float]
    """Of the first objective, larger being better: the value, over all seeds the mean, and its standard error."""
    spread: float | None
    """Standard deviation of the value over the seeds; None with one seed."""
    is_tied: bool
    """Whether it cannot be told from the best one at 95%."""
    on_front: bool
    """With several objectives: no other trial is better in one and as good in all."""
    repeats: tuple[Trial, ...] = ()
    """The same point with other seeds."""
    diverged: bool = False
    """It did with another seed."""


def ranked(tune: Tune, trials: Sequence[Trial], repeats: Sequence[Trial] = ()) -> list[Ranked]:
    """The finished ones, best first.

    With several objectives those of the Pareto front come first, and within it the first objective decides. Trials that
    were repeated with other seeds come before all that were not: these were found worse before.

    Those that diverged with another seed come last: what is left of them is what went well.

    Trials that the scheduler ended, that diverged or failed have no place: they were found worse on their way.
    """
    objectives = tune.objectives()
    scores = {t.number: found for t in trials if t.state == "finished" and (found := _scores(objectives, t))}
    finished = [t for t in trials if t.number in scores]
    front = {finished[i].number for i in pareto_front([tuple(v for v, _ in scores[t.number]) for t in finished])}
    places = []
    repeated = {r.number for r in repeats}
    for trial in finished:
        mine = [r for r in repeats if r.number == trial.number]
        again = tuple(r for r in mine if r.state == "finished" and _scores(objectives, r) is not None)
        diverged = any(r.state == "diverged" for r in mine)
        value, spread = _over_seeds(objectives[0], [trial, *again])
        places.append(
            Ranked(
                trial, value, spread, is_tied=False, on_front=trial.number in front, repeats=again, diverged=diverged
            )
        )
    several, compares = len(objectives) > 1, margins_compare(tune.searched())

    def order(one: Ranked) -> tuple[bool, bool, bool, float, float]:
        # Among equals, as few pairs make them.
        margin = one.trial.measured.get("margin", {"value": 0.0})["value"] if compares else 0.0
        # Also who has lost a repeat to an error was among the best before.
        return not one.diverged, several and one.on_front, one.trial.number in repeated, one.score[0], margin

    places.sort(key=order, reverse=True)
    best = places[0] if places else None
    return [_tied(one, best) for one in places]


def _tied(one: Ranked, best: Ranked | None) -> Ranked:
    tied = best is not None and one is not best and not distinguishable(one.score, best.score)
    return replace(one, is_tied=tied)


def _scores(objectives: Sequence[Mapping[Measure, float]], trial: Trial) -> list[tuple[float, float]] | None:
    found = [score(objective, trial.measured) for objective in objectives]
    return None if any(f is None for f in found) else [f for f in found if f is not None]


def _over_seeds(
    objective: Mapping[Measure, float], trials: Sequence[Trial]
) -> tuple[tuple[float, float], float | None]:
    scores = [found for t in trials if (found := score(objective, t.measured)) is not None]
    values = np.array([value for value, _ in scores])
    error = float(np.mean([error for _, error in scores]))
    if len(values) == 1:
        return (float(values[0]), error), None
    spread = float(values.std(ddof=1))
    # All seeds are measured on the same pairs, whose chance more seeds do not lessen.
    return (float(values.mean()), math.hypot(error, spread / math.sqrt(len(values)))), spread


def described(tune: Tune, trial: Trial) -> str:
    """A trial's values, for people."""
    return ", ".join(f"{name} {_short(value)}" for name, value in shown_values(tune, trial).items())


def shown_values(tune: Tune, trial: Trial) -> dict[str, Any]:
    """Path → value; of a section that was chosen as a whole, one entry for each of its values."""
    values = drawn(tune.searched(), Given(trial.point))
    return dict(_flat("", values))


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        found += _flat(f"{path}.", value) if isinstance(value, Mapping) else [(path, value)]
    return found


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def measured_line(found: Measured) -> str:
    """What was measured, for people."""
    named = []
    for name, one in found.items():
        if name == "accuracy":
            named.append(f"held-out accuracy {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]")
        elif name == "chosen_logps":
            continue
        else:
            named.append(f"{name.replace('_', ' ')} {one['value']:.3g} nats")
    return ", ".join(named) or "nothing measured"


def results_table(tune: Tune, trials: Sequence[Trial]) -> bytes:
    """results.parquet: a row a trial, those that repeat one included; a column for each searched path and measure."""
    rows = []
    for trial in trials:
        values = shown_values(tune, trial)
        rows.append(
            {
                "number": trial.number,
                "seed": trial.seed,
                "state": trial.state,
                "reason": trial.reason,
                "step": trial.step,
                "num_steps": trial.num_steps,
                **{
                    path: value if isinstance(value, int | float | str) else json.dumps(value)
                    for path, value in values.items()
                },
                **{f"{m}{end}": one[key] for m, one in trial.measured.items() for end, key in _ENDS},
                "first_step_loss": trial.first_step_loss,
                "seconds": trial.seconds,
                "policy": trial.policy,
            }
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int}:
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array(values, pa.float64())
    return pa.array(
        [value if value is None or isinstance(value, str) else json.dumps(value) for value in values], pa.string()
    )
