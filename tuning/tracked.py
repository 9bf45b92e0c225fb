"""Trials as runs of their own in the trackers that follow a sweep, nested below its run."""

from __future__ import annotations

from dpo_ray.config import Config
from dpo_ray.progress import say
from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import Fan, flat
from dpo_ray.tracking.follower import Follower
from dpo_ray.tracking.tracker import Opening, State, point_of
from dpo_ray.training.files import read_history


class TrackedTrials:
    """Args:
    name: of the sweep's run.
    """

    def __init__(self, fan: Fan, name: str) -> None:
        self._fan, self._name = fan, name
        self._follower = Follower(fan)
        self._trainings: dict[str, Location] = {}

    def begins(self, trial: str, config: Config, training: Location) -> None:
        """A trial has its process, for the first time or again.

        Args:
            training: where its artifact lies, finished or not.
        """
        self._trainings[trial] = training
        self._fan.open(Opening(trial, f"{self._name}, trial {trial}", flat(config.model_dump(mode="json"))))
        self._follower.follow(trial, training)

    def ended(self, trial: str, state: State) -> None:
        """A trial has come to its end, or was ended."""
        self._follower.leave(trial)
        training = self._trainings.pop(trial, None)
        if training is not None and state == "finished":
            # One that was taken over has told nobody of its steps.
            try:
                self._fan.points(trial, [point_of(line) for line in read_history(training)])
            except OSError as error:
                say("track", f"trial {trial}: its last steps could not be read for the trackers ({error})")
        self._fan.end(trial, state)

    def close(self) -> None:
        """No more trials are followed."""
        self._follower.close()
