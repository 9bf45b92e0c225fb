"""Engines that die: killed from outside the same artifact comes of it; a row that kills its engine is quarantined."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, DPO_RAY, LONGEST, WORKER, overrides, processes_below, summary_of

pytestmark = [pytest.mark.faults, pytest.mark.ray]

SHARDS, ROWS = 12, 24


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model, write_preferences) -> list[str]:
    folder = tmp_path_factory.mktemp("killed_engine")
    rows = [
        {"prompt": f"Say {n} again and again.", "chosen": f"It is {n}. " * 8, "rejected": f"No {n} today. " * 8}
        for n in range(SHARDS * ROWS)
    ]
    write_preferences(folder / "data", rows)
    return [
        "reference",
        str(CONFIGS / "align_cpu.yaml"),
        *overrides(
            model__path=str(tiny_model),
            data__train=str(folder / "data"),
            data__rows_per_shard=ROWS,
            reference__engine="torch",
            reference__calibration_pairs=4,
            train__num_workers=1,
        ),
    ]


def reference_manifest(output: Path) -> dict:
    [folder] = (output / "artifacts" / "reference").iterdir()
    return json.loads((folder / "manifest.json").read_text())


def test_an_engine_killed_from_outside_is_replaced_and_its_rows_are_scored_again(arguments, one_ray, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = one_ray(*arguments, *overrides(run__output=str(whole)))
    assert done.code == 0, done.log
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "artifacts" / "reference")
    shutil.rmtree(killed / "artifacts" / "calibration")

    command = [DPO_RAY, *arguments, *overrides(run__output=str(killed))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines, victims, finished = [], [], SHARDS
    for line in process.stdout:
        lines.append(line)
        if not victims and re.search(r"\[reference\] \d+/\d+ pairs .* done", line):
            victims = [pid for pid, name in processes_below(process.pid).items() if name.startswith(WORKER)]
            os.kill(victims[0], signal.SIGKILL)
            finished = len(list((killed / "artifacts" / "reference").glob("*/*.parquet")))
    assert process.wait(60) == 0, "".join(lines)[-6000:]
    assert victims and finished < SHARDS, f"of {victims} the first was killed after {finished} shards"

    expected, found = reference_manifest(whole), reference_manifest(killed)
    assert {f["name"]: f["sha256"] for f in found["files"]} == {f["name"]: f["sha256"] for f in expected["files"]}
    assert found["counters"] == expected["counters"] == {"kept": SHARDS * ROWS, "read": SHARDS * ROWS}
    [folder] = (killed / "artifacts" / "reference").iterdir()
    assert list((folder / "attempts").iterdir()) == []
    assert summary_of(killed)["stages"]["reference"]["rows"]["dropped"] == {}


PROGRAM = """
import json, os, signal, sys, time
import pyarrow as pa
from dpo_ray.storage.artifact import publish, write_shard
from dpo_ray.shards.score import ScoreShard
from dpo_ray.on_ray.pool import Pool, shard_stage, shard_tasks
from dpo_ray.pairs import TOKENIZED
from dpo_ray.storage.location import Location

OUT = sys.argv[1]
POISON = 1013  # the prompt of one row of the second shard

class Scorer:
    def score(self, pairs):
        began = time.time()
        time.sleep(2)  # long enough for a second engine to get work
        with open(OUT + "/calls.txt", "a") as calls:
            calls.write(json.dumps([os.getpid(), began, time.time()]) + "\\n")
        if any(p.prompt_ids == [POISON] for p in pairs):
            os.kill(os.getpid(), signal.SIGKILL)
        logprobs = [[-1.0]] * len(pairs)
        return logprobs, logprobs

class Worker(ScoreShard):
    def __init__(self):
        super().__init__(Scorer(), ("chosen_ref_logprobs", "rejected_ref_logprobs"))

output = Location.of(OUT)
files = []
for shard in range(16):
    rows = [
        {"pair_id": str(n), "prompt_id": str(n), "split": "train", "prompt_ids": [n], "chosen_ids": [1],
         "rejected_ids": [2]}
        for n in range(1000 * (shard > 0) + 10 * shard, 1000 * (shard > 0) + 10 * shard + 10)
    ]
    files.append(write_shard(output / "in" / f"{shard}.parquet", pa.Table.from_pylist(rows, schema=TOKENIZED), {}))
rows = publish(output / "in", "tokenized", identity={}, inputs={}, files=files)
pool = Pool(Worker, {}, num_actors=2, isolates=True)
made, _ = shard_stage(output, "scored", identity={}, inputs={}, tasks=shard_tasks(rows), pool=pool)
print("MADE", made.location)
"""


def test_a_row_that_kills_its_engine_is_quarantined_and_engines_are_added_while_tasks_wait(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
    )
    made = re.search(r"^MADE (.+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and made, done.stdout[-6000:]
    folder = Path(made[1])
    counters = json.loads((folder / "manifest.json").read_text())["counters"]
    assert counters == {"engine_crash": 1, "kept": 159, "read": 160}
    [quarantine] = (folder / "quarantine").iterdir()
    [row] = pq.read_table(quarantine).to_pylist()
    assert row["row"] == 3 and row["reason"] == "engine_crash"
    assert json.loads(row["raw"]) == {"pair_id": "1013", "message": "the process died"}
    assert list((folder / "attempts").iterdir()) == []
    calls = [json.loads(line) for line in (tmp_path / "out" / "calls.txt").read_text().splitlines()]
    at_once = [(a, b) for a in calls for b in calls if a[0] != b[0] and a[1] < b[1] < a[2]]
    assert at_once, "no two engines worked at the same time"
