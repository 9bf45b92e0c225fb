"""What tests of orchestrators share: days of data with a tiny model, and scripts for another environment's Python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import LONGEST

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "cluster" / "orchestrators"
DAYS = ("2026-11-01", "2026-11-02", "2026-11-03")
ROWS = 40  # of a day


def python_of(name: str) -> str:
    """The Python of an orchestrator's environment; skips where none is named."""
    found = os.environ.get(f"DPO_RAY_{name.upper()}_PYTHON")
    if found is None:
        reason = f"{name} has an environment of its own, and none is named here: make test-integrations has it"
        pytest.skip(reason, allow_module_level=True)
    return found


def told_by(python: str, script: str, folder: Path, request: dict[str, Any], env: dict[str, str]) -> Any:
    """What a script beside this file tells of a request; with nothing of ours on its path."""
    answer = folder / f"{Path(script).stem}.json"
    done = subprocess.run(
        [python, str(Path(__file__).parent / script), str(answer)],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
        env=env,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return json.loads(answer.read_text())


class Project:
    """Three days of pairs, and configurations of a run over them: `config`, and `strict` with a gate that fails."""

    def __init__(self, folder: Path, model: Path, write_preferences: Callable[..., Path]):
        self.folder, self.output = folder, folder / "out"
        for n, day in enumerate(DAYS):
            pairs = [
                {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i} today."}
                for i in range(n * ROWS, (n + 1) * ROWS)
            ]
            write_preferences(folder / "data" / f"date={day}", pairs)
        tree = {
            "run": {"name": "nightly", "output": "/nowhere"},
            "model": {"path": str(model)},
            "data": {"train": str(folder / "data"), "held_out_fraction": 0.3},
            "reference": {"engine": "torch", "calibration_pairs": 4},
            "train": {
                "num_workers": 1,
                "global_batch_size": 6,
                "learning_rate": 1e-3,
                "tokens_per_microbatch": 1024,
            },
        }
        self.config = self._write("nightly.yaml", {**tree, "publish": {"gate": {"accuracy_above": None}}})
        self.strict = self._write("strict.yaml", {**tree, "publish": {"gate": {"accuracy_above": 0.999}}})

    def _write(self, name: str, tree: dict[str, Any]) -> str:
        (self.folder / name).write_text(yaml.safe_dump(tree))
        return str(self.folder / name)

    @property
    def pointer(self) -> dict[str, Any]:
        """What latest.json says."""
        found: dict[str, Any] = json.loads((self.output / "models/nightly/latest.json").read_text())
        return found

    def summary(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "runs" / run_id / "summary.json").read_text())
        return found
