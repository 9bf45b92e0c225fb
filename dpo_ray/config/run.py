"""The section `run`."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import Field

from dpo_ray.config.hooks import Hooks
from dpo_ray.config.section import Section
from dpo_ray.errors import ConfigError


class Run(Section):
    """What a run is called, where it writes, and how it speaks."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run and of the published model: letters, digits, dot, dash, underscore."""
    output: str
    """Where everything goes: a local folder or a URI such as s3://bucket/prefix."""
    seed: int = Field(0, ge=0)
    """Seeds the split, the sampling and the order of the pairs."""
    when_busy: Literal["wait", "leave"] = "wait"
    """Where another run is at the same training, or publishes under the same name: wait until it has ended and take
    over what it made, or leave at once, with exit code 75."""
    wait_for_resources: float = Field(15.0, ge=0.0)
    """Minutes that a stage waits, at most, for a cluster to grow where it has too little room: its autoscaler is asked
    for more. 0: the run is refused at its start, as is right for a cluster that nothing adds nodes to."""

    log_format: Literal["text", "json"] = "text"
    """How a run's lines are printed: text, for people; json, for what collects logs: each line an object with time,
    level, run, stage, shard, node and message. log.jsonl in the run's folder, where that is in no object store, has
    these objects either way."""
    hooks: Hooks = Hooks()
    """Who is told how the run ended."""

    def require_absolute_output(self) -> None:
        """Raises ConfigError where `output` is a relative path: for a job on a cluster.

        A job runs in a working directory that Ray makes and removes, on whichever node it likes.
        """
        if "://" not in self.output and not PurePath(self.output).is_absolute() and not self.output.startswith("~"):
            raise ConfigError(
                f"run.output is {self.output}, a relative path, which in a job on a cluster lies below Ray's "
                "temporary working directory: what is written there is lost. Name a bucket, as in s3://bucket/folder, "
                "or the absolute path of a folder that is mounted on all nodes."
            )
