"""What a sweep knows of its trials, one small file each: it survives a kill, and the same command goes on from it.

The folder's name is a fingerprint of the search: another space, measure or configuration is another sweep. How many
trials there are, and how many at once, is not part of it, so a sweep can be widened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import TypedDict

from dpo_ray.config import Config
from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import digest
from dpo_ray.storage.location import Location
from tuning.measures import Measured
from tuning.space import Point

State = Literal["waiting", "training", "finished", "stopped", "diverged", "failed"]
"""stopped: by the scheduler, before its last step. diverged: its loss was not finite. failed: an error ended it, after
all that it was tried again."""

ENDED: frozenset[State] = frozenset({"finished", "stopped", "diverged"})
"""Not computed again. What failed is: its cause may be gone."""


class Evaluation(TypedDict):
    """What a trial measured on its way."""

    step: int
    loss: float
    measured: Measured


class Trial(BaseModel):
    """A point of the space, and what became of it."""

    model_config = ConfigDict(extra="forbid")

    number: int
    point: Point
    seed: int
    state: State = "waiting"
    step: int = 0
    num_steps: int | None = None
    evaluations: list[Evaluation] = []
    """In the order of their steps."""
    measured: Measured = {}
    """Of the weights that are kept, or of the last evaluation of a trial that did not finish."""
    policy: str | None = None
    """Fingerprint of the train artifact."""
    was_trained: bool = False
    """By this sweep: the artifact was not there before."""
    first_step_loss: float | None = None
    seconds: float = 0.0
    """That it held its place, over all attempts."""
    reason: str | None = None
    """Why it did not finish."""

    @property
    def name(self) -> str:
        return f"{self.number:04d}-seed{self.seed}"

    @property
    def has_ended(self) -> bool:
        """It is not computed again."""
        return self.state in ENDED


@dataclass
class Records:
    """The trials of one sweep, in the folder where they are written."""

    folder: Location
    trials: dict[str, Trial] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Location, identity: dict[str, Any]) -> Records:
        """Those that earlier runs of the sweep have left. Raises DataError where a file is none of ours."""
        records = cls(output / "sweeps" / digest(identity))
        records.load()
        return records

    def load(self) -> None:
        """Take what is written as it is now. Raises DataError where a file is none of ours."""
        self.trials.clear()
        for file in (self.folder / "trials").children():
            try:
                trial = Trial.model_validate_json(file.read_bytes())
            except ValidationError as error:
                raise DataError(
                    f"{file} is not a trial's record ({error.error_count()} errors). Remove it; its number is then "
                    "drawn again, and a training of the same options that is finished is taken over."
                ) from error
            self.trials[trial.name] = trial

    def get(self, number: int, seed: int, point: Point) -> Trial:
        """The trial, from before or new."""
        fresh = Trial(number=number, point=point, seed=seed)
        return self.trials.setdefault(fresh.name, fresh)

    def write(self, trial: Trial) -> None:
        self.trials[trial.name] = trial
        (self.folder / "trials" / f"{trial.name}.json").write_bytes(trial.model_dump_json(indent=1).encode())

    def evaluated(self, trial: Trial, evaluation: Evaluation) -> None:
        """One more, or one again that was made before a kill; those of later steps stay until they come again."""
        others = [e for e in trial.evaluations if e["step"] != evaluation["step"]]
        trial.evaluations = sorted([*others, evaluation], key=lambda e: e["step"])
        trial.step = max(trial.step, evaluation["step"])
        trial.measured = trial.evaluations[-1]["measured"]
        self.write(trial)

    def search(self, seed: int) -> list[Trial]:
        """The trials of the search itself, in the order of their numbers; not those that repeat one."""
        return sorted((t for t in self.trials.values() if t.seed == seed), key=lambda trial: trial.number)


def identity(config: Config, rows: Iterable[str], weights: Iterable[str]) -> dict[str, Any]:
    """What makes a search another one.

    Args:
        rows: fingerprints of what is trained on.
        weights: hashes of the models that trials begin with.
    """
    assert config.tune is not None
    how_many = {"num_trials", "max_concurrent_trials", "max_failures", "repeat_best", "keep_models"}
    return {
        "tune": config.tune.model_dump(mode="json", exclude=how_many),
        "train": config.train.identity(),
        "lora": config.model.model_dump(mode="json")["lora"],
        "seed": config.run.seed,
        "rows": sorted(rows),
        "weights": sorted(weights),
    }
