"""The runs as data: their common setting, where they are kept, what is kept of each, and their speed."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Rows, environment, write_json
from benchmarks.side_by_side import MODEL
from benchmarks.speed.pairs import real_tokens

DATA = ("hh_helpful", "tldr_human", "polite_demo", "generated")
DTYPES = ("float32", "bfloat16")
OURS, DEFAULT, TUNED = "ours", "trl-default", "trl-tuned"
ROWS = (OURS, DEFAULT, "trl-fair", TUNED)
BETA = 0.1


@dataclass(frozen=True)
class Setting:
    """What all runs of a folder have in common."""

    model: str = MODEL
    random_llama: str | None = None
    device: str = "auto"
    threads: int = 0
    steps: int = 6
    pairs_per_step: int = 4
    max_tokens: int = 1024
    tokens_per_microbatch: int | None = None
    trl_batch_sizes: Sequence[int] = (2, 4, 8)

    def __post_init__(self) -> None:
        odd = [b for b in self.trl_batch_sizes if b < self.pairs_per_step and self.pairs_per_step % b]
        if odd:
            sys.exit(f"--trl-batch-sizes {odd} do not divide --pairs-per-step {self.pairs_per_step}.")
        if self.steps < 2:
            sys.exit("--steps must be 2 or more: the first one is a warm-up.")

    @property
    def microbatch_tokens(self) -> int:
        """--tokens-per-microbatch, or what the product takes by itself where memory is not short."""
        import torch

        from dpo_ray.training.memory import MOST_TOKENS_CPU, MOST_TOKENS_GPU

        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return self.tokens_per_microbatch or (MOST_TOKENS_GPU if on_gpu else MOST_TOKENS_CPU)


def settled(folder: Path, given: Mapping[str, Any]) -> Setting:
    """The folder's setting, or, of a new folder, the defaults with what was given. Ends where the two disagree."""
    path = folder / "setting.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        other = [f"{name} {kept[name]}" for name, value in given.items() if kept[name] != value]
        if other:
            sys.exit(f"The runs in {folder} have {', '.join(other)}. Name another --folder, or remove this one.")
        return Setting(**kept)
    setting = Setting(**{"threads": len(os.sched_getaffinity(0)), **given})
    write_json(path, asdict(setting))
    return setting


@dataclass(frozen=True)
class Place:
    """One data set and dtype of a folder."""

    folder: Path
    data: str
    dtype: str

    @property
    def pairs(self) -> Path:
        return self.folder / self.data / "pairs.jsonl"

    @property
    def probe(self) -> Path:
        return self.folder / self.data / self.dtype / "probe.json"

    @property
    def gemm(self) -> Path:
        return self.folder / self.data / self.dtype / "gemm.json"

    def run(self, row: str, repeat: int) -> Path:
        """Where a finished run is kept."""
        return self.folder / self.data / self.dtype / f"{row}.{repeat}.json"

    def runs(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Row → repeat → what is finished, in the order of ROWS."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for row in ROWS:
            for path in sorted(self.run(row, 0).parent.glob(f"{row}.*.json")):
                found.setdefault(row, {})[int(path.name.split(".")[1])] = json.loads(path.read_text())
        return found


def write_run(path: Path, load: dict[str, Any], packages: Sequence[str], measured: dict[str, Any]) -> None:
    """Keep what a run measured, with where it ran, the machine's load at its start and its peaks of memory in bytes."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    peaks = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_gpu": gpu}
    write_json(path, {"environment": environment(packages), "load": load, **peaks, **measured})


def kept_steps(
    times: Sequence[dict[str, float]], losses: Sequence[float], rows: Rows, size: int, num_warm_up: int
) -> list[dict[str, Any]]:
    """What is kept of each step. `size` pairs each, the last one those that are left."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [
        {"warm_up": n < num_warm_up, "pairs": len(batch), "tokens": real_tokens(batch), **spent, "loss": loss}
        for n, (spent, loss, batch) in enumerate(zip(times, losses, batches, strict=True))
    ]


@dataclass(frozen=True)
class Speed:
    """Of the measured steps of a run, all together."""

    wall: float
    cpu: float
    pairs: int
    tokens: int
    mean_loss: float
    """Over pairs."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.wall


def speed(run: Mapping[str, Any]) -> Speed:
    """Of a run as it is kept; its warm-up does not count."""
    steps = [step for step in run["steps"] if not step["warm_up"]]
    pairs = sum(step["pairs"] for step in steps)
    return Speed(
        wall=sum(step["wall"] for step in steps),
        cpu=sum(step["cpu"] for step in steps),
        pairs=pairs,
        tokens=sum(step["tokens"] for step in steps),
        mean_loss=sum(step["loss"] * step["pairs"] for step in steps) / pairs,
    )
