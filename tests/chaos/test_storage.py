"""Where artifacts lie: an endpoint that goes away, a disk that fills up, files whose bytes change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_ray.model.folders import HASHES
from tests.chaos.cells import Cell
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.disk import small_disk
from tests.chaos.job import Job
from tests.chaos.store import Away, Endpoint, endpoint
from tests.chaos.test_processes import STAGES
from tests.object_store import BUCKET, upload

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

Cells = Callable[[str, str], Cell]
MINUTE = 60.0
DAMAGED = {"flipped": "has bits flipped", "cut": "is cut off"}
TELLS = {"refuses": "refuses connections", "hangs": "hangs", "unavailable": "answers 503"}


@pytest.fixture(scope="module")
def behind_proxy(
    trace_file: Path, kept: Path, shared, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cluster, Endpoint]]:
    """A cluster whose processes know an object store, with the model and the data in it."""
    shared.end()
    sums = tmp_path_factory.mktemp("sums")  # by which the model is the same there as in the undisturbed run's folder
    digests = [
        (hashlib.sha256(file.read_bytes()).hexdigest(), file.name) for file in sorted((kept / "model").iterdir())
    ]
    (sums / HASHES).write_text("".join(f"{digest}  {name}\n" for digest, name in digests))
    with endpoint() as (proxy, _):
        upload(kept / "model", "model")
        upload(sums, "model")
        upload(kept / "data", "data")
        with pytest.MonkeyPatch.context() as patch, cluster(trace_file) as nodes:
            patch.setenv("DPO_RAY_CACHE", str(trace_file.parent / "cache"))
            yield nodes, proxy


@pytest.mark.parametrize(
    ("away", "kind"),
    [("refuses", "tokenized"), ("hangs", "reference"), ("unavailable", "step"), ("refuses", "publish")],
)
def test_store_away(
    behind_proxy: tuple[Cluster, Endpoint],
    job: Callable[..., Job],
    cell: Cells,
    undisturbed: Path,
    away: Away,
    kind: str,
):
    """The endpoint is away for a minute."""
    nodes, proxy = behind_proxy
    stage = {**STAGES, "publish": "publish"}[kind]
    what = cell(f"the object store's endpoint {TELLS[away]} for a minute", stage)
    place = f"s3://{BUCKET}/{away}-{kind}"
    where = {"data": f"s3://{BUCKET}/data/*.jsonl", "model": f"s3://{BUCKET}/model"}
    mine = job({"step": "train", "publish": None}.get(kind, kind), place, **where)
    run = mine.start(nodes)
    if kind == "publish":
        mine.trace.wait_for("publish", "copy", "begun", run)
    else:
        mine.trace.at_work(kind, run, after=14 if kind == "step" else 2)
    what.strikes()
    proxy.goes(away)
    time.sleep(MINUTE)
    proxy.returns()
    what.is_over()
    recovered = "by itself"
    if run.code() != 0:
        assert re.search(r"StorageError: .*the same command goes on", run.log), run.log[-4000:]
        recovered = "the same command again"
        mine.start(nodes).require_success()
    what.ends_as(undisturbed, mine, recovered)


@pytest.mark.parametrize("kind", ["tokenized", "step"])
def test_full_disk(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, tmp_path: Path, kind: str):
    """The output's file system has no room left; the command fails and says so, room is made, and it is run again."""
    what = cell("the output's disk is full", STAGES[kind])
    with small_disk(tmp_path / "disk", 256) as disk:
        mine = job("train" if kind == "step" else kind, disk.folder / "out", more={"train__max_failures": 0})
        first = mine.start(nodes)
        mine.trace.at_work(kind, first, after=14 if kind == "step" else 2)
        what.strikes()
        disk.fill()
        assert first.code() != 0
        assert "No space left on device" in first.log, first.log[-4000:]
        disk.make_room()
        what.is_over()
        mine.start(nodes).require_success()
        what.ends_as(undisturbed, mine, "room made, the same command again")


@pytest.mark.parametrize("damage", ["flipped", "cut"])
@pytest.mark.parametrize("kind", ["pairs", "reference"])
def test_damaged_shard(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, kind: str, damage: str):
    """A shard of a finished artifact, before the next stage reads it."""
    what = cell(f"a finished shard of {kind} {DAMAGED[damage]}", {"pairs": "tokenize", "reference": "train"}[kind])
    mine = job({"pairs": "tokenized", "reference": "train"}[kind])
    folder = Path(mine.output.uri) / "artifacts" / kind / "shards"
    spoil(sorted(folder.glob("*.parquet"))[3], damage)
    what.strikes()
    first = mine.start(nodes)
    recovered = "by itself"
    if first.code() != 0:
        assert re.search(r"DataError: .*[Tt]he same command makes it again", first.log), first.log[-4000:]
        recovered = "the same command again"
        mine.start(nodes).require_success()
    what.ends_as(undisturbed, mine, recovered)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_checkpoint(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, damage: str):
    """The newest checkpoint of a training that was killed."""
    what = cell(f"the newest checkpoint {DAMAGED[damage]}", "train")
    mine = job("train")
    first = mine.start(nodes)
    mine.trace.at_work("step", first, after=14)
    first.kill()
    mine.trace.until_quiet()
    [run] = Path(mine.output.uri).glob("artifacts/train/*/checkpoints/run-1")
    newest = max(run.glob("checkpoint_*/state.json"), key=lambda f: json.loads(f.read_text())["next_step"]).parent
    spoil(max(newest.glob("*.distcp"), key=lambda f: f.stat().st_size), damage)
    what.strikes()
    second = mine.start(nodes)
    second.require_success()
    assert re.search(r"is damaged", second.log)
    what.ends_as(undisturbed, mine, "the same command again, by itself from the one before")


def spoil(file: Path, damage: str) -> None:
    """Flip the bits of 64 bytes in its middle, or cut its second half off; its time stays as it was."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    half = len(data) // 2
    if damage == "flipped":
        data[half : half + 64] = bytes(byte ^ 0xFF for byte in data[half : half + 64])
    else:
        del data[half:]
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
