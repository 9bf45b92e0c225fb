"""What a run leaves behind: on what it ran, its files, and a table of them in Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

OUR_PACKAGES = ("torch", "transformers")
TRL_PACKAGES = ("trl", "torch", "transformers", "accelerate", "datasets")

Rows = list[dict[str, Any]]


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware and commit, as a report names them."""
    import torch

    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "dpo_ray"], capture_output=True, text=True).stdout
    cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(":")[2].strip() for line in cpu_info.splitlines() if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "hardware": f"{models[0] if models else 'unknown CPU'}, threads: {torch.get_num_threads()}, "
        f"{torch.backends.cpu.get_cpu_capability()}{gpu}",
        "commit": commit + (", dpo_ray changed since" if changed else ""),
    }


def versions(*environments: dict[str, Any]) -> str:
    """The versions of several environments, in one line."""
    return " / ".join(", ".join(f"{k} {v}" for k, v in e["versions"].items()) for e in environments)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, so that a killed run leaves no half of a file."""
    _write(path, json.dumps(value, indent=1))


def write_lines(path: Path, rows: Rows) -> None:
    """JSON, a line a row; whole or not at all."""
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def read_lines(path: Path) -> Rows:
    """What write_lines wrote."""
    if not path.is_file():
        sys.exit(f"There is no {path}: run that side first.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
