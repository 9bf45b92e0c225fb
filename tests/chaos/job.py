"""The run under test: a small model, some hundreds of short pairs in twelve shards, and training by two workers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ray.storage.artifact import Manifest, file_hash, open_artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import latest
from dpo_ray.storage.shard_pool import task_of
from dpo_ray.training.files import HISTORY
from tests.chaos.cluster import Cluster, traced
from tests.chaos.running import Running
from tests.chaos.trace import Trace
from tests.command_line import CONFIGS, DPO_RAY, overrides

NAME = "numbers"
NUM_PAIRS, ROWS_PER_SHARD = 240, 20
SETTINGS: dict[str, Any] = {
    "run__name": NAME,
    "data__held_out_fraction": 0.2,
    "data__rows_per_shard": ROWS_PER_SHARD,
    "data__max_prompt_tokens": 128,
    "data__max_completion_tokens": 64,
    "reference__engine": "torch",
    "reference__calibration_pairs": 4,
    "train__global_batch_size": 8,
    "train__epochs": 2,
    "train__learning_rate": 1e-3,
    "train__checkpoint_every_steps": 4,
    "train__num_workers": 2,
    "train__cpus_per_worker": 1.5,
    "train__max_failures": 3,
    "train__tokens_per_microbatch": 1024,
    "publish__gate__accuracy_above": None,
}


def write_pairs(file: Path) -> None:
    """Raw rows, each unlike the others."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What comes after {n}? Answer in a few words."}],
            "chosen": [{"role": "assistant", "content": f"After {n} comes {n + 1}."}],
            "rejected": [{"role": "assistant", "content": f"Who knows, perhaps {n * n} or something like it."}],
        }
        for n in range(NUM_PAIRS)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Job:
    """The command over one output folder."""

    output: Location
    data: str
    model: str
    trace: Trace
    env: dict[str, str] = field(default_factory=dict)
    """What its processes have in their environment besides."""
    more: dict[str, Any] = field(default_factory=dict)
    """Settings of its own."""
    command: str = "run"

    def settings(self, **more: Any) -> list[str]:
        values = {
            **SETTINGS,
            "run__output": self.output.uri,
            "data__train": self.data,
            "model__path": self.model,
            **self.more,
            **more,
        }
        return [str(CONFIGS / "align_cpu.yaml"), *overrides(**values)]

    def start(self, on: Cluster, *arguments: str, env: dict[str, str] | None = None, **more: Any) -> Running:
        """The command as a process, which is its driver."""
        environment = {**os.environ, **on.head.env, **traced(self.trace.file, "driver"), **self.env, **(env or {})}
        return Running([DPO_RAY, self.command, *self.settings(**more), *arguments], environment)

    def submit(self, on: Cluster) -> Running:
        """`dpo-ray submit` of the command, whose driver is a process of the head's."""
        environment = {**os.environ, **on.head.env}
        del environment["RAY_ADDRESS"]
        options = ["--address", on.head.dashboard, "--command", self.command, "--executable", DPO_RAY]
        return Running([DPO_RAY, "submit", *self.settings(), *options], environment)

    def num_steps(self) -> int:
        """Of the training, as its manifest says."""
        [one] = [m for m in self.manifests() if m.kind == "train"]
        return int(one.metrics["num_steps"])

    def manifests(self) -> Iterator[Manifest]:
        """Of all finished artifacts."""
        artifacts = self.output / "artifacts"
        for name in artifacts.names():
            if name.endswith("/manifest.json"):
                yield open_artifact((artifacts / name).parent).manifest

    def rows(self) -> dict[str, int]:
        """<kind>/<task> of each shard → rows that it is made of."""
        return {
            f"{manifest.kind}/{task_of(entry.name)}": entry.counters.get("read", entry.rows)
            for manifest in self.manifests()
            for entry in manifest.files
            if entry.rows is not None
        }


def state(output: Location) -> dict[str, Any]:
    """What is in an output folder, in all that a run is to make again whatever happens to it.

    Every finished artifact with its fingerprint, its counters and the hash of each of its files, of the bytes that lie
    there; the loss of every step; what is published, and the hashes of its files. Left out is what tells the time.
    """
    found: dict[str, Any] = {}
    artifacts = output / "artifacts"
    for name in artifacts.names():
        if not name.endswith("/manifest.json"):
            continue
        artifact = open_artifact((artifacts / name).parent)
        manifest = artifact.manifest
        files = {e.name: file_hash(artifact.file(e.name)) for e in manifest.files}
        damaged = [e.name for e in manifest.files if files[e.name] != e.sha256]
        assert not damaged, f"{artifact.location} holds {damaged}, whose bytes are not those of its manifest"
        if HISTORY in files:
            history = map(json.loads, artifact.file(HISTORY).read_bytes().splitlines())
            files[HISTORY] = [(one["step"], one["loss"]) for one in history]
        found[f"{manifest.kind} {manifest.fingerprint}"] = {"counters": manifest.counters, "files": files}
    folder = output / "models" / NAME
    standing = latest(folder)
    if standing is not None:
        version = folder / standing.version
        weights = [name for name in version.names() if re.search(r"\.(safetensors|json)$", name)]
        found["published"] = {
            "version": standing.version,
            "files": {name: file_hash(version / name) for name in weights},
        }
    return found


def differences(got: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In what an output folder differs from another one, in words."""
    found = [f"{name} is missing" for name in expected.keys() - got.keys()]
    found += [f"{name} should not be there" for name in got.keys() - expected.keys()]
    for name in sorted(got.keys() & expected.keys()):
        for part in expected[name]:
            if got[name][part] != expected[name][part]:
                found.append(f"{part} of {name}: {got[name][part]} and not {expected[name][part]}")
    return found


def copy_before(kind: str | None, source: Path, target: Location) -> None:
    """Put into an output folder what another one holds of artifacts that are not made of those of a kind.

    Args:
        kind: None: all artifacts, so that only the publication is left.
    """
    later = _made_of(kind, source) if kind is not None else set()
    for folder in sorted((source / "artifacts").iterdir()):
        if folder.name in later or not any(folder.rglob("manifest.json")):
            continue
        Location.of(folder).copy_folder_to(target / "artifacts" / folder.name)


def _made_of(kind: str, output: Path) -> set[str]:
    """The kind, and those of which an artifact is made of one of its artifacts, however indirectly."""
    manifests = [open_artifact(Location.of(f.parent)).manifest for f in output.glob("artifacts/*/*/manifest.json")]
    made = {m.fingerprint for m in manifests if m.kind == kind}
    while True:
        more = {m.fingerprint for m in manifests if made & set(m.inputs.values())} - made
        if not more:
            return {m.kind for m in manifests if m.fingerprint in made}
        made |= more
