"""A row that kills its engine is quarantined, and no other. (An engine killed from outside: test_killed_reference.)"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import LONGEST

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]

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
    [quarantine] = (folder.parent / "shards" / "quarantine").iterdir()
    [row] = pq.read_table(quarantine).to_pylist()
    assert row["row"] == 3 and row["reason"] == "engine_crash"
    assert json.loads(row["raw"]) == {"pair_id": "1013", "message": "the process died"}
    assert list((folder / "attempts").iterdir()) == []
    calls = [json.loads(line) for line in (tmp_path / "out" / "calls.txt").read_text().splitlines()]
    at_once = [(a, b) for a in calls for b in calls if a[0] != b[0] and a[1] < b[1] < a[2]]
    assert at_once, "no two engines worked at the same time"
