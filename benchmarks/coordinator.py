"""What the one process costs that hands out work: by shard, by block of the training feed, by step, by row.

    python -m benchmarks.coordinator [--write]

Measured is what benchmarks.scaling needs and no other table has, with nothing computed by the workers: CPU seconds of
the driver for a shard of a stage; seconds between two blocks of the feed; pairs a second that one task packs for it; a
line of the training's history; the memory of a manifest; and what publishing and the table of left-out rows take for a
row. Prints a table; --write puts it at the end of coordinator.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.record import ROOT, environment, table, versions
from dpo_ray.data.duplicates import LEFT_OUT, by_shard
from dpo_ray.data.seen_rows import seen_rows, write_seen_rows
from dpo_ray.pairs import LENGTHS, REFERENCE
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import Artifact, publish, read_manifest, write_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.index import index_of
from dpo_ray.training.plan import StepPlan

_TOKENS = (164, 138, 139)
"""Of a pair of hh_helpful: prompt, chosen, rejected (benchmarks/speed.md: 441 shared and 605 real ones)."""
_ROWS_PER_SHARD = 5000
_SHARDS = 1000
_RANKS = 32
_STEPS = 160
_BATCH = 512
_LINE = {
    "loss": 0.6931471824645996,
    "grad_norm": 1.234567890123,
    "rewards/chosen": 0.0123456789,
    "rewards/rejected": -0.0123456789,
    "rewards/margins": 0.0246913578,
    "rewards/accuracies": 0.515625,
    "logps/chosen": -123.456789,
    "logps/rejected": -120.3456789,
    "logits/entropy": 1.23456789,
    "num_pairs": 512,
    "skipped": False,
    "step": 123456,
    "epoch": 0.123456789,
    "learning_rate": 9.87654321e-07,
    "tokens_per_second": 123456.789,
    "num_tokens": 123456789,
}
"""Keys and digits of a step's metrics, as a run of the loss `sigmoid` has them."""


class Nothing:
    """A shard of one row, from nothing."""

    def __call__(self, source: int) -> ShardOutput:
        return ShardOutput(pa.table({"x": [source]}), Counter(read=1))


def tokenized(folder: Path, shards: int) -> Artifact:
    """Pairs with reference log-probs, all of the same length."""
    random = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        rows = {
            "pair_id": [f"{number:08x}{row:08x}" for row in range(_ROWS_PER_SHARD)],
            "prompt_id": [f"{number:08x}{row:08x}" for row in range(_ROWS_PER_SHARD)],
            "split": ["train"] * _ROWS_PER_SHARD,
            **{name: np.full(_ROWS_PER_SHARD, count, np.int32) for name, count in zip(LENGTHS, _TOKENS, strict=True)},
        }
        for name, count in zip(("prompt_ids", "chosen_ids", "rejected_ids"), _TOKENS, strict=True):
            rows[name] = _lists(random.integers(0, 50_000, _ROWS_PER_SHARD * count), count)
        for name, count in zip(("chosen_ref_logprobs", "rejected_ref_logprobs"), _TOKENS[1:], strict=True):
            rows[name] = _lists(-random.exponential(1.5, _ROWS_PER_SHARD * count), count)
        made = pa.table(
            {field.name: pa.array(rows[field.name]).cast(field.type) for field in REFERENCE}, schema=REFERENCE
        )
        entries.append(write_shard(Location.of(folder) / "reference" / f"{number}.parquet", made, {}))
    return publish(Location.of(folder) / "reference", "reference", identity={}, inputs={}, files=entries)


def _lists(values: np.ndarray, length: int) -> pa.Array:
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, length, dtype=np.int32), pa.array(values))


def plan_over(folder: Path) -> StepPlan:
    trained, _ = index_of(Location.of(folder) / "out", tokenized(folder, 16))
    return StepPlan(trained, _BATCH, epochs=2, seed=0, hidden_size=4096)


def of_messages(folder: Path) -> float:
    """Milliseconds of the driver's CPU a shard, over a stage."""
    from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage

    def stage(shards: int) -> float:
        tasks = [ShardTask(source=n, content=f"{shards} {n}", rows=1) for n in range(shards)]
        began = time.process_time()
        shard_stage(
            Location.of(folder) / "messages", f"made{shards}", identity={}, inputs={}, tasks=tasks,
            pool=Pool(Nothing, {}, stateless=True),
        )  # fmt: skip
        return time.process_time() - began

    stage(20)  # starts Ray
    few, many = stage(100), stage(100 + _SHARDS)
    return 1e3 * (many - few) / _SHARDS


def of_blocks(folder: Path) -> float:
    """Milliseconds between two blocks of the feed, taken as fast as they come."""
    import ray.data

    from dpo_ray.on_ray import stream
    from dpo_ray.on_ray.room import Need
    from dpo_ray.on_ray.session import connect

    connect(Need("the benchmark", cpus=1, beside=1))
    plan = plan_over(folder)
    fed = stream.feed_dataset(plan, plan.num_steps - _STEPS, _RANKS, 1 << 20, Location.of(folder) / "reading")
    fed.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    blocks = iter(fed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    next(blocks)
    began = time.perf_counter()
    taken = sum(1 for _ in blocks)
    return 1e3 * (time.perf_counter() - began) / taken


def of_packing(folder: Path) -> float:
    """Pairs a second that one task packs into blocks."""
    from dpo_ray.on_ray.stream import share_blocks

    plan = plan_over(folder)
    began = time.perf_counter()
    blocks = share_blocks(plan, 0, _STEPS, steps_per_group=8, world_size=_RANKS, tokens_per_microbatch=1 << 20)
    assert sum(block.num_rows for block in blocks) == _RANKS * _STEPS // 8
    return _STEPS * _BATCH / (time.perf_counter() - began)


def of_history(folder: Path) -> float:
    """Microseconds to write a line of the history, as each checkpoint writes all of them."""
    history = [{**_LINE, "step": n} for n in range(50_000)]
    began = time.perf_counter()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m, allow_nan=False) + "\n" for m in history))
    return 1e6 * (time.perf_counter() - began) / len(history)


def of_line(folder: Path) -> float:
    """Bytes of a step of the history in memory."""
    text = [json.dumps({**_LINE, "step": n}) for n in range(20_000)]
    tracemalloc.start()
    history = [json.loads(line) for line in text]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / len(history)


def of_manifest(folder: Path) -> float:
    """Bytes of a shard in a manifest that is held in memory."""
    entry = write_shard(
        Location.of(folder) / "0.parquet", pa.table({"x": [1]}), {"read": 1000, "kept": 990, "duplicate": 10}
    )
    files = [entry.model_copy(update={"name": f"shards/{n:016x}-{n:016x}.parquet"}) for n in range(10_000)]
    publish(Location.of(folder) / "made", "made", identity={}, inputs={}, files=files)
    tracemalloc.start()
    manifest = read_manifest(Location.of(folder) / "made")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / len(manifest.files)


def of_seen_rows(folder: Path) -> float:
    """Microseconds to keep the id of a row that was trained on."""
    shards = tokenized(folder, 8).shards()
    began = time.perf_counter()
    for shard in shards:
        write_seen_rows(seen_rows(shard), Location.of(folder) / "ids" / shard.name)
    return 1e6 * (time.perf_counter() - began) / (len(shards) * _ROWS_PER_SHARD)


def of_left_out(folder: Path) -> float:
    """Microseconds to sort a row that is left out to its shard."""
    random, count = np.random.default_rng(0), 2_000_000
    names = pa.array([f"{n:016x}-{n:016x}.parquet" for n in range(2000)])
    left_out = pa.table(
        {
            "shard": names.take(pa.array(random.integers(0, len(names), count))),
            "row": random.integers(0, 48_000, count),
            "reason": pa.array(["duplicate"]).take(pa.array(np.zeros(count, np.int64))),
        },
        schema=LEFT_OUT,
    )
    began = time.perf_counter()
    by_shard([left_out])
    return 1e6 * (time.perf_counter() - began) / count


MEASURES: dict[str, tuple[str, Callable[[Path], float]]] = {
    "driver's CPU a shard of a stage": ("ms", of_messages),
    "a block of the training feed": ("ms", of_blocks),
    "pairs that one task packs for the feed": ("pairs/s", of_packing),
    "a step of the history, written at each later checkpoint": ("µs", of_history),
    "a step of the history in memory": ("bytes", of_line),
    "a shard of a manifest in memory": ("bytes", of_manifest),
    "a row whose id is kept when a model is published": ("µs", of_seen_rows),
    "a row that is left out, sorted to its shard": ("µs", of_left_out),
}


def measured(name: str) -> float:
    with tempfile.TemporaryDirectory(prefix="dpo-ray-coordinator-") as folder:
        return MEASURES[name][1](Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--write", action="store_true", help="put the table at the end of benchmarks/coordinator.md")
    options = parser.parse_args()
    rows: list[list[str]] = []
    for name in options.only:
        rows.append([name, f"{measured(name):.3g} {MEASURES[name][0]}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    now: dict[str, Any] = environment(("ray", "pyarrow", "numpy"))
    text = (
        f"\n## {datetime.now(UTC):%Y-%m-%d} (commit {now['commit']})\n\n{os.cpu_count()} cores, {now['hardware']}; "
        f"{versions(now)}. Measured once; load {os.getloadavg()[1]:.1f} over the last 5 minutes.\n\n"
        + table(["what", ""], rows)
        + "\n"
    )
    print(text)
    if options.write:
        with (ROOT / "benchmarks" / "coordinator.md").open("a") as out:
            out.write(text)


if __name__ == "__main__":
    main()
