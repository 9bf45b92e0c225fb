"""How trials stand, for the person who watches."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_ray.config import Tune
from tuning.measures import score
from tuning.records import Trial
from tuning.results import described

_ROWS = 12


def status_table(tune: Tune, trials: Sequence[Trial], most: int = _ROWS) -> list[list[str]]:
    """Head and rows: those that train, and then the best of those that have ended; at most so many rows."""
    objective = tune.objectives()[0]

    def value(trial: Trial) -> float:
        found = score(objective, trial.measured)
        return found[0] if found is not None else float("-inf")

    training = [t for t in trials if t.state == "training"]
    ended = sorted((t for t in trials if t.has_ended), key=lambda t: (t.state == "finished", value(t)), reverse=True)
    measures = list(dict.fromkeys(name for o in tune.objectives() for name in o))
    rows = [
        [
            str(trial.number),
            trial.state,
            f"{trial.step}/{trial.num_steps or '?'}",
            *(f"{trial.measured[name]['value']:.3f}" if name in trial.measured else "" for name in measures),
            f"{trial.seconds:.0f} s",
            described(tune, trial) + f", seed {trial.seed}" * (trial.seed != trials[0].seed),
        ]
        for trial in [*training, *ended][:most]
    ]
    return [["trial", "state", "step", *(name.replace("_", " ") for name in measures), "time", "values"], *rows]


def status_note(tune: Tune, trials: Sequence[Trial]) -> str:
    """Beside the count of those that have ended: how many train, and the best so far."""
    objective = tune.objectives()[0]
    training = sum(t.state == "training" for t in trials)
    finished = [(found[0], t) for t in trials if t.state == "finished" and (found := score(objective, t.measured))]
    if not finished:
        return f"{training} training"
    _, best = max(finished, key=lambda pair: pair[0])
    shown = ", ".join(f"{name.replace('_', ' ')} {best.measured[name]['value']:.3f}" for name in objective)
    return f"{training} training · best so far trial {best.number}: {shown}"
