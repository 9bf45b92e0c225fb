"""The stages, the main job and the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, get_args

from dpo_ray.errors import ConfigError

if TYPE_CHECKING:
    from dpo_ray.config import Config

Stage = Literal["ingest", "generate", "tokenize", "reference", "train", "evaluate", "publish"]
"""What the command line can run up to; ingest or generate comes first, by the configuration."""
STAGES: tuple[Stage, ...] = get_args(Stage)


def planned(config: Config, until: Stage) -> list[str]:
    """The stages of a run, in order."""
    absent = {"ingest" if config.generate is not None else "generate"}
    absent |= set() if config.train.loss.needs_reference else {"reference"}
    return [stage for stage in STAGES[: STAGES.index(until) + 1] if stage not in absent]


def require_run_id(run_id: str) -> None:
    """Raises ConfigError where it is no plain name of a folder."""
    if not re.fullmatch(r"\w[\w.:+=@ -]*", run_id):
        raise ConfigError(
            f"{run_id!r} is no name of a run. --run-id, or --submission-id of a job, names one folder below runs/: "
            "letters, digits, spaces and any of . _ - : + = @, beginning with a letter or a digit."
        )
