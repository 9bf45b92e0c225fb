"""One run: where it writes, and the record that it keeps of its stages."""

from __future__ import annotations

import json
import os
import shlex
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from dpo_ray.config import Config, Model, Train, dump_config
from dpo_ray.data.tally import Tally
from dpo_ray.on_ray.metrics import STAGE_SECONDS, Work, take_up, tell, tell_progress
from dpo_ray.on_ray.usage import metered
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact, library_versions
from dpo_ray.storage.claim import kept_fresh
from dpo_ray.storage.lineage import SourceFile
from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import Fan
from pipelines import require_run_id
from pipelines.cost import cost_of
from pipelines.live import Live

STAGES_SO_FAR = "stages.json"
"""In a run's folder while it is at work: fingerprints of what its stages have made, which `dpo-ray gc` spares."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's, in the environment of a submitted job


@dataclass
class RunContext:
    """What the stages of one run share."""

    config: Config
    run_id: str
    output: Location
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a stage → its entry in summary.json."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """Name of a stage → what it has made or taken over."""
    results: dict[str, Any] = field(default_factory=dict)
    """The other entries of summary.json."""
    command: tuple[str, ...] = ("run",)
    """Of dpo-ray, which does this again: its name, and the options besides the configuration."""
    shown: dict[str, Any] = field(default_factory=dict)
    """What the report has besides summary.json: `samples`; of a sweep or rounds `more`, sections that come first, and
    the `config` of what was published."""
    sources: dict[str, SourceFile] = field(default_factory=dict)
    """Name of a shard of pairs → the file that its rows are from."""
    formats: dict[str, int] = field(default_factory=dict)
    """Name of a format → how many files of preferences are written so."""
    models: dict[str, Model] = field(default_factory=dict)
    """Fingerprint of a policy → the model that it was trained from."""
    begins: Callable[[str], None] = field(default=lambda name: None)
    """Told the name of each stage as it begins."""
    table: Callable[[Sequence[Sequence[str]]], None] = field(default=lambda rows: None)
    """Shown a table that stands below the stages, its head first, while a stage is at work."""
    live: Live = field(default_factory=Live)
    """What it is at, for who looks from outside."""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    trackers: Fan | None = None
    """Those that follow the run; None: none does."""
    variant: str = ""
    """Which of several ways of doing the stages this is, where there are several."""

    @classmethod
    def start(cls, config: Config, run_id: str | None = None) -> RunContext:
        """Open the run's folder and put the resolved configuration there. Raises ConfigError."""
        if run_id is not None:
            require_run_id(run_id)
        if _JOB in os.environ:
            config.run.require_absolute_output()
        output = Location.of(config.run.output)
        output.require_writable()
        context = cls(config, run_id or _free_run_id(output, config.run.name), output)
        (context.folder / "config.yaml").write_bytes(dump_config(config).encode())
        take_up(Work(config.run.name))
        return context

    def other(self, config: Config, variant: str) -> RunContext:
        """The same run with another configuration: its stages are recorded beside, its results are not."""
        return replace(self, config=config, variant=variant, results={})

    @property
    def folder(self) -> Location:
        """The run's own folder."""
        return self.output / "runs" / self.run_id

    def stage(self, name: str, make: Callable[[], tuple[Artifact, bool]]) -> Artifact:
        """Run a stage and record what it did."""
        recorded = f"{name} ({self.variant})" if self.variant else name
        self.begins(name)
        self.live.begins(recorded)
        take_up(Work(self.config.run.name, name))
        tell_progress()
        began = time.monotonic()
        so_far = {name: entry["fingerprint"] for name, entry in self.stages.items()}
        with kept_fresh(self.folder / STAGES_SO_FAR, json.dumps(so_far).encode()), metered() as usage:
            artifact, reused = make()
        counters = artifact.manifest.counters
        tally = Tally.of(counters) if counters else None  # of what is no table of rows nothing is counted
        dropped = tally.dropped if tally else {}
        self.artifacts[recorded] = artifact
        self.stages[recorded] = {
            "fingerprint": artifact.fingerprint,
            "reused": reused,
            "seconds": round(time.monotonic() - began, 1),
            "rows": {"in": tally and tally.read, "kept": tally and tally.kept, "dropped": dropped},
            "noted": tally.noted if tally else {},
            "workers": usage.workers,
            "gpus": usage.gpus,
        }
        tell_progress()
        if not reused:
            tell(STAGE_SECONDS, self.stages[recorded]["seconds"])
            rows = f"{tally.kept} rows, " if tally and artifact.manifest.rows is not None else ""
            said = f" (dropped {', '.join(f'{k}: {v}' for k, v in dropped.items())})" if dropped else ""
            say(name, f"done: {rows}{self.stages[recorded]['seconds']} s{said}")
        return artifact

    def write_summary(self, exit_code: int, reasons: list[str]) -> dict[str, Any]:
        """Write summary.json; readers see the whole of it or none."""
        if self.trackers is not None:
            self.trackers.settle()
            self.results["trackers"] = self.trackers.figures()
        seconds = (datetime.now(UTC) - self.began).total_seconds()
        summary = {
            "run_id": self.run_id,
            "exit_code": exit_code,
            "began": f"{self.began:%Y-%m-%dT%H:%M:%SZ}",
            "seconds": round(seconds, 1),
            "cost": cost_of(self.stages, seconds, self._trials()),
            "command": self.command_line(),
            "versions": library_versions(),
            "stages": self.stages,
            "published": None,
            **self.results,
            "reasons": reasons,
        }
        (self.folder / "summary.json").write_bytes(json.dumps(summary, indent=1, ensure_ascii=False).encode())
        (self.folder / STAGES_SO_FAR).remove()
        return summary

    def command_line(self) -> str:
        """What does the same again."""
        name, *options = self.command
        return shlex.join(["dpo-ray", name, (self.folder / "config.yaml").uri, *options])

    def _trials(self) -> tuple[float, int, Train] | None:
        """Of a sweep, what cost_of wants to know of its trials."""
        sweep = self.results.get("sweep")
        return (sweep["seconds"], sweep["at_once"], self.config.train) if sweep else None


def _free_run_id(output: Location, name: str) -> str:
    """By the name and the time. Two runs that begin in the same second, as schedules have them, get one each."""
    stem = f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    if not output.is_local:
        # Folders of an object store are not made, so that none can be taken before another.
        return f"{stem}-{uuid.uuid4().hex[:4]}"
    for number in count(1):
        run_id = stem if number == 1 else f"{stem}-{number}"
        try:
            Path((output / "runs" / run_id).uri).mkdir(parents=True)
        except FileExistsError:
            continue
        return run_id
    raise AssertionError("unreachable")
