"""SIGKILL of gc and of stages beside it: every manifest that is there has all its files, and no file is half there.

DPO_RAY_KILLS is how often each of the two is killed (3 times unless told), at moments that DPO_RAY_KILL_SEED draws.
Artifacts and shards are made older all the time, so that what a stage takes up or has just made is protected by its
claim alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import Artifact, open_artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import ShardPool, has_quarantine
from pipelines.gc import collect
from tests.shard_stages import KIND, Rows, age, stage

KILLS = int(os.environ.get("DPO_RAY_KILLS", "3"))
pytestmark = [pytest.mark.faults, pytest.mark.timeout(300 + 30 * KILLS)]

SERVER = """
import os, random, signal, sys, tempfile, time
from pathlib import Path
from dpo_ray.storage import claim
from dpo_ray.storage.location import Location
from pipelines.gc import collect
from tests.shard_stages import age_what_is_finished
from tests.faults.test_killed_gc import Slow, Unsteady, some_rows
from tests.shard_stages import stage

output = Location.of(sys.argv[1])
claim._POLL_S = 0.01

def stages(chance):
    stage(output, some_rows(chance), build=chance.choice([Slow, Unsteady]))

def slowly(place, remove=Location.remove):
    time.sleep(0.02)  # so that kills come in the middle of it
    remove(place)

def gc(chance):
    Location.remove = slowly
    age_what_is_finished(Path(output.uri), chance)
    collect(output, delete=True)
    time.sleep(chance.uniform(0, 0.05))

with tempfile.TemporaryDirectory() as scratch:  # what is loaded when it is first needed
    stage(Location.of(scratch), [1])
    collect(Location.of(scratch))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    what, seed = line.split()
    child = os.fork()
    if not child:
        chance = random.Random(seed)
        while True:
            {"stages": stages, "gc": gc}[what](chance)
    print(child, flush=True)
"""
"""Starts a process that makes artifacts, or one that collects garbage, for each line that it is given; tells its id."""


class Slow(Rows):
    """Slow enough for gc to come by while a stage is at work."""

    def __call__(self, source: int) -> ShardOutput:
        time.sleep(0.02)
        return super().__call__(source)


class Unsteady(Slow):
    """Other bytes every time: they say who made them, and when."""

    def __call__(self, source: int) -> ShardOutput:
        output = super().__call__(source)
        table = output.table.append_column("when", [[f"{os.getpid()} {time.monotonic_ns()}"] * source])
        return ShardOutput(table, output.counters, output.quarantine)


def some_rows(chance: random.Random) -> list[int]:
    return sorted(chance.sample(range(1, 25), 8))


def require_whole(output: Location) -> int:
    """Every manifest has all its files, of its own bytes, and every visible shard is what its name says."""
    folder = Path(output.uri) / "artifacts" / KIND
    artifacts = [open_artifact(Location.of(manifest.parent)) for manifest in folder.glob("*/manifest.json")]
    for artifact in artifacts:
        require_files(artifact)
    pool = ShardPool(Location.of(folder))
    present = pool.present()
    for name in sorted(present.files):
        if "quarantine" not in name:
            assert pool.inspect(name, has_quarantine(name, present.files)) is not None, name
    return len(artifacts)


def require_files(artifact: Artifact) -> None:
    for entry in artifact.manifest.files:
        assert hashed(artifact.file(entry.name)) == entry.sha256, entry.name


def hashed(place: Location) -> str:
    return hashlib.sha256(place.read_bytes()).hexdigest()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)


def test_killed_at_any_moment_nothing_that_is_referred_to_is_missing(tmp_path: Path):
    chance = random.Random(os.environ.get("DPO_RAY_KILL_SEED", "gc"))
    output = Location.of(tmp_path / "out")
    kept, _ = stage(output, some_rows(chance))
    (output / "runs" / "late" / "summary.json").write_bytes(json.dumps({"pairs": kept.fingerprint}).encode())
    rounds = found = 0
    command = [sys.executable, "-c", SERVER, output.uri]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as server:
        assert server.stdin is not None and server.stdout is not None

        def start(what: str) -> int:
            server.stdin.write(f"{what} {chance.random()}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        # Until artifacts made beside gc were seen: on a busy machine it may remove all before it is killed.
        while rounds < KILLS or (found == rounds and rounds < 20 * KILLS):
            rounds += 1
            for _ in range(4):
                stage(output, some_rows(chance))
            age(tmp_path / "out" / "artifacts", 10)
            children = {start(what): what for what in ("gc", "stages")}
            for child in chance.sample(sorted(children), 2):
                time.sleep(chance.uniform(0, 1))
                kill(child)
                if children[child] == "gc":
                    # Stages would wait for its marker until a lease has run out.
                    for marker in (tmp_path / "out" / "artifacts" / "gc").glob("*.json"):
                        marker.unlink()
            found += require_whole(output)
            require_files(kept)
        server.stdin.close()
    assert found > rounds
    # The same commands go on from there.
    rows = some_rows(chance)
    artifact, _ = stage(output, rows)
    age(tmp_path / "out" / "artifacts", 10)
    assert stage(output, rows)[1]
    collect(output, delete=True)
    require_files(artifact)
    require_files(kept)
    assert {place.parent.name for place in (tmp_path / "out" / "artifacts" / KIND).glob("*/manifest.json")} == {
        kept.fingerprint,
        artifact.fingerprint,
    }
