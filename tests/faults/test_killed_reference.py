"""SIGKILL of the driver and of the engine's actor in the reference stage: the same artifact, bit for bit.

DPO_RAY_KILLS is how often (2 unless told). The first kill of each comes when a shard is finished, the others at random
moments from the start of the driver on, which DPO_RAY_KILL_SEED draws. Where it is told, vLLM is killed too, not the
trainer's forward alone: what becomes of the shards does not depend on the engine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CONFIGS, DPO_RAY, LONGEST, WORKER, dpo_ray, overrides, processes_below, summary_of

KILLS = int(os.environ.get("DPO_RAY_KILLS", "2"))
ENGINES = ["torch", pytest.param("vllm", marks=pytest.mark.vllm)] if "DPO_RAY_KILLS" in os.environ else ["torch"]

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1800 + 300 * KILLS), pytest.mark.long]

NUM_PAIRS, ROWS_PER_SHARD = 240, 6  # so many shards that some are left when a first one is seen
LONGEST_WAIT = 40.0  # seconds from a start of the driver to the kill: Ray and vLLM start in about half of it


@pytest.fixture(scope="module")
def command(tmp_path_factory, servable_model, write_preferences):
    """command(output, engine) → arguments of the stages up to reference, with many small shards."""
    folder = tmp_path_factory.mktemp("killed_reference")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What comes after {n}? Answer in a few words."}],
            "chosen": [{"role": "assistant", "content": f"After {n} comes {n + 1}."}],
            "rejected": [{"role": "assistant", "content": f"Who knows, perhaps {n * n} or something like it."}],
        }
        for n in range(NUM_PAIRS)
    ]
    write_preferences(folder / "data", rows)
    settings = {
        "model__path": str(servable_model),
        "data__train": str(folder / "data"),
        "data__rows_per_shard": ROWS_PER_SHARD,
        "data__max_prompt_tokens": 128,
        "data__max_completion_tokens": 64,
        "reference__calibration_pairs": 4,
        "train__num_workers": 1,
        "train__cpus_per_worker": 1,
    }

    def arguments(output: Path, engine: str) -> list[str]:
        own = overrides(**settings, run__output=str(output), reference__engine=engine)
        return ["reference", str(CONFIGS / "align_cpu.yaml"), *own]

    return arguments


def content(output: Path) -> dict[str, dict[str, Any]]:
    """Of each finished stage: fingerprint, the files with their hashes, and the counters."""
    found = {}
    for path in sorted((output / "artifacts").glob("*/*/manifest.json")):
        manifest = json.loads(path.read_text())
        files = [(f["name"], f.get("rows"), f["sha256"]) for f in manifest["files"]]
        found[manifest["kind"]] = {name: manifest[name] for name in ("fingerprint", "counters")} | {"files": files}
    return found


def run_and_kill(arguments: list[str], victim: str, is_due: Callable[[], bool]) -> tuple[bool, int | None, str]:
    """Start the command and kill once. Returns whether it was killed, the exit code (None of a killed driver), the log.

    is_due: whether the moment has come; for the actor, the wait goes on until there is one.
    """
    process = subprocess.Popen([DPO_RAY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    killed = False
    while process.poll() is None and not killed:
        time.sleep(0.1)
        if not is_due():
            continue
        if victim == "driver":
            process.send_signal(signal.SIGKILL)
            killed = True
        elif pids := [pid for pid, name in processes_below(process.pid).items() if name.startswith(WORKER)]:
            os.kill(pids[0], signal.SIGKILL)
            killed = True
    code = process.wait(LONGEST)
    reader.join(60)
    return killed, None if killed and victim == "driver" else code, "".join(lines)


def after(seconds: float) -> Callable[[], bool]:
    due = time.monotonic() + seconds
    return lambda: time.monotonic() >= due


def one_more_shard(output: Path) -> Callable[[], bool]:
    """Whether there are more finished shards of the reference than now."""

    def finished() -> int:
        return len(list((output / "artifacts" / "reference" / "shards").glob("*.parquet")))

    before = finished()
    return lambda: finished() > before


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_some_moments_the_artifacts_are_the_same(command, one_ray, tmp_path, engine: str):
    undisturbed = one_ray(*command(tmp_path / "undisturbed", engine))
    assert undisturbed.code == 0, undisturbed.log
    chance = random.Random(os.environ.get("DPO_RAY_KILL_SEED", "kills"))
    arguments = command(tmp_path / "killed", engine)
    done = 0
    finished = False
    while done < KILLS:
        victim = ("driver", "actor")[done % 2]
        is_due = one_more_shard(tmp_path / "killed") if done < 2 else after(chance.uniform(0, LONGEST_WAIT))
        killed, code, text = run_and_kill(arguments, victim, is_due)
        assert code in (0, None), text[-6000:]
        if not killed or code == 0:
            finished = True
        if killed:
            done += 1
        if finished and done < KILLS:
            # The run came through before all kills were spent: take shards away, as a lost disk would.
            forget_some(tmp_path / "killed", chance)
            finished = False
    last = dpo_ray(*arguments)
    assert last.code == 0, last.log
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert content(tmp_path / "killed")["reference"]["counters"] == {"kept": NUM_PAIRS, "read": NUM_PAIRS}
    assert summary_of(tmp_path / "killed")["stages"]["reference"]["rows"]["dropped"] == {}
    assert list((tmp_path / "killed" / "artifacts" / "reference").glob("*/attempts/*")) == []


def forget_some(output: Path, chance: random.Random) -> None:
    """Remove the reference manifest and half of its shards, and what was made from it."""
    for manifest in (output / "artifacts" / "reference").glob("*/manifest.json"):
        shards = sorted((manifest.parents[1] / "shards").glob("*.parquet"))
        for shard in chance.sample(shards, len(shards) // 2):
            shard.unlink()
        manifest.unlink()
