"""Runs in Weights & Biases; trials of a sweep are runs of a group."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_ray.config.track import WandB
from dpo_ray.storage.location import Location
from dpo_ray.tracking.tracker import Opening, Point, State, Tracker

_EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 130}
_SECONDS = 30


class WandBTracker(Tracker):
    """Args:
    folder: of the run, below which what it keeps lies; of an object store's nothing stays on this machine.
    group: of the run and its trials.
    """

    name = "wandb"
    remembers = False  # an offline run knows nothing of what was sent before

    def __init__(self, options: WandB, folder: Location, group: str) -> None:
        self._options, self._group = options, group
        self._folder = folder.uri if folder.is_local else tempfile.mkdtemp(prefix="dpo-ray-wandb-")
        self._runs: dict[str, Any] = {}

    def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
        import wandb

        identity = known or uuid.uuid4().hex[:8]
        self._runs[opening.whose] = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            mode=self._options.mode,
            id=identity,
            resume="allow" if self._options.mode == "online" else None,
            name=opening.name,
            group=self._group,
            job_type="trial" if opening.whose else "run",
            config=dict(opening.params),
            dir=self._folder,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_SECONDS,
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                symlink=False,  # what it is given to keep lies in a folder that is removed
            ),
        )
        return identity, 0

    def log(self, whose: str, points: Sequence[Point]) -> None:
        run = self._runs[whose]
        for point in points:
            run.log({**point.values, "_timestamp": point.when}, step=point.step)

    def conclude(self, whose: str, point: Point) -> None:
        self._runs[whose].summary.update(dict(point.values))

    def keep(self, files: Sequence[Path]) -> None:
        for file in files:
            self._runs[""].save(str(file), base_path=str(file.parent), policy="now")

    def close(self, whose: str, state: State) -> None:
        self._runs[whose].finish(exit_code=_EXIT_CODES[state])
        del self._runs[whose]  # not before: it may fail, and is tried again

    def may_pass(self, error: Exception) -> bool:
        from wandb.errors import CommError

        return isinstance(error, OSError | CommError)

    def way_out(self) -> str:
        if self._options.mode == "offline":
            return f"See that there is room and that this user may write in {self._folder}, or leave track.wandb out."
        host = os.environ.get("WANDB_BASE_URL", "api.wandb.ai")
        return (
            f"See that {host} answers and WANDB_API_KEY is set, or set track.wandb.mode=offline and send it later with "
            f"`wandb sync`."
        )
