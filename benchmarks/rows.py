"""What grows with the rows outside the workers: index, plan, feed, and the search for duplicates.

    python -m benchmarks.rows [--rows 500000 5000000 50000000]

Rows are generated with their ids and lengths alone, in shards of 100,000. Each figure is measured in a process of its
own: its time, and how much the peak of its resident memory (without pages of mapped files) lies above what the process
has when its modules are loaded. Prints a table as in rows.md.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.record import environment, versions
from dpo_ray.data.duplicates import by_shard, find, left_out_table, num_buckets
from dpo_ray.data.row_ids import read_bucket, row_ids
from dpo_ray.pairs import LENGTHS
from dpo_ray.storage.artifact import Artifact, open_artifact, publish, write_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.index import IndexFile, PlanIndex, index_of
from dpo_ray.training.plan import StepPlan

ROWS_PER_SHARD = 100_000
SHARDS_PER_GROUP = 40
_FEED_BATCH = 64
_SEED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 5_000_000, 50_000_000])
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        print(json.dumps(measured(STEPS[options.step], options.folder)))
        return
    here = environment(("numpy", "pyarrow"))
    print(f"{here['hardware']}; {versions(here)}; commit {here['commit']}", end="\n\n")
    print(f"| rows | {' | '.join(f'{name}: s, MiB' for name in STEPS)} |")
    print(f"|{'---|' * (len(STEPS) + 1)}")
    for count in options.rows:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-rows-", dir=options.folder) as folder:
            generate(Path(folder), count)
            found = [in_own_process(step, folder) for step in STEPS]
            cells = [f"{one['seconds']:.3g}, {one['mib']:.0f}" for one in found]
            print(f"| {count:,} | {' | '.join(cells)} |", flush=True)


def in_own_process(step: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rows", "--step", step, "--folder", folder]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def generate(folder: Path, count: int) -> None:
    """The rows as artifacts: their ids, as `pairs`, and their lengths, as `tokenized`."""
    random = np.random.default_rng(_SEED)
    files: dict[str, list] = {"pairs": [], "tokenized": []}
    for first in range(0, count, ROWS_PER_SHARD):
        n = min(ROWS_PER_SHARD, count - first)
        split = pa.array(np.where(random.random(n) < 0.02, "eval", "train"))
        prompts = hexadecimal(random.integers(0, 2**63, n, dtype=np.uint64))
        # One row in fifty repeats another.
        pairs = random.integers(0, 2**63, n, dtype=np.uint64)
        repeats = random.random(n) < 0.02
        pairs[repeats], prompt_of = pairs[0], prompts.take(pa.array(np.where(repeats, 0, np.arange(n))))
        ids = hexadecimal(pairs)
        lengths = random.lognormal(5, 1, size=(n, 3)).clip(4, 4000).astype(np.int32)
        tables = {
            "pairs": pa.table({"pair_id": ids, "prompt_id": prompt_of, "couple_id": ids, "split": split}),
            "tokenized": pa.table({"split": split, **{name: lengths[:, i] for i, name in enumerate(LENGTHS)}}),
        }
        for kind, table in tables.items():
            files[kind].append(write_shard(Location.of(folder) / kind / f"{first:012}.parquet", table, {}))
    for kind, entries in files.items():
        publish(Location.of(folder) / kind, kind, identity={}, inputs={}, files=entries)


def hexadecimal(numbers: np.ndarray) -> pa.Array:
    """16 digits each."""
    nibbles = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    text = np.stack([digits[nibbles >> 4], digits[nibbles & 15]], axis=2).tobytes()
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(numbers), [None, pa.py_buffer(text)])
    return fixed.cast(pa.binary()).cast(pa.string())


def rows_of(folder: Path, kind: str) -> Artifact:
    return open_artifact(Location.of(folder) / kind)


def index_step(folder: Path) -> Callable[[], object]:
    rows = rows_of(folder, "tokenized")
    return lambda: index_of(Location.of(folder) / "out", rows)


def opened(folder: Path) -> PlanIndex:
    [index] = (Location.of(folder) / "out" / "artifacts" / "index").children()
    return IndexFile(index, Location.of(folder) / "tokenized", "train").open()


def plan(folder: Path) -> StepPlan:
    return StepPlan(opened(folder), _FEED_BATCH, epochs=3, seed=0, hidden_size=1024)


def start_step(folder: Path) -> Callable[[], object]:
    """Opened, sent to where it is walked along, and the first step with its micro-batches."""
    return lambda: first_step(pickle.loads(pickle.dumps(plan(folder))), 0)


def restart_step(folder: Path) -> Callable[[], object]:
    def restart() -> None:
        made = pickle.loads(pickle.dumps(plan(folder)))
        first_step(made, made.num_steps * 9 // 10)

    return restart


def first_step(made: StepPlan, start: int) -> None:
    _, rows = next(iter(made.steps(start)))
    made.microbatches(rows, 8, 8192)


def ids_step(folder: Path) -> Callable[[], object]:
    """A group after the other, as tasks would."""
    shards = rows_of(folder, "pairs").shards()

    def write() -> None:
        for first in range(0, len(shards), SHARDS_PER_GROUP):
            ids = row_ids(shards[first : first + SHARDS_PER_GROUP])
            write_shard(Location.of(folder) / "ids" / f"{first:06}.parquet", ids, {})

    return write


def judge_step(folder: Path) -> Callable[[], object]:
    """A bucket after the other, as tasks would, and the rows that are left out by shard, as the driver has them."""
    buckets = num_buckets(rows_of(folder, "pairs").manifest.rows or 0)
    groups = (Location.of(folder) / "ids").children()

    def judge() -> None:
        by_shard(left_out_of(groups, number, buckets) for number in range(buckets))

    return judge


def left_out_of(groups: list[Location], number: int, buckets: int) -> pa.Table:
    rows, names = read_bucket(groups, number, buckets)
    return left_out_table(rows, find(rows), names)


STEPS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "index": index_step,
    "first step": start_step,
    "restart at 90%": restart_step,
    "ids": ids_step,
    "duplicates": judge_step,
}


def measured(step: Callable[[Path], Callable[[], object]], folder: Path) -> dict[str, float]:
    work = step(folder)
    before, highest, done = own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"seconds": seconds, "mib": max(0.0, max(highest[0], own_memory()) - before)}


def own_memory() -> float:
    """MiB of this process that are not pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    main()
