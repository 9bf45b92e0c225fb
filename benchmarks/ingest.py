"""What ingesting and tokenizing cost, in memory and in time, as the data grow past Ray's object store.

    python -m benchmarks.ingest --hf-python <Python of the environment of requirements-trl.txt>

writes sets of preference pairs of random words, the largest of them ten times the object store, and runs each through
`dpo-ray tokenize` in a fresh process: memory of the whole tree of processes is read twice a second, and what Ray
spilled is counted. On the smallest set, `datasets.map` of Hugging Face with two processes tokenizes the same rows
beside it, by the way of TRL: each side rendered as a whole, the prompt cut off. That side checks no row, hashes none
and finds no duplicates.

Sides, each in a process of its own: `data` writes a set, `ours` and `hf` run it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions, write_json
from benchmarks.side_by_side import MODEL, SEED

MIB = 2**20
ROWS_PER_SHARD = 2048
ROWS_PER_FILE = 20_000


def random_rows(size: int, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Pairs in chat layout until their text has `size` bytes: medians of 90, 60 and 60 words, log-normal.

    The words are nobody's, and as in a language the frequent ones are few and short.
    """
    dice = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    vocabulary = ["".join(dice.choices(syllables, k=1 + rank.bit_length() // 5)) for rank in range(30_000)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(vocabulary))))
    written = 0
    while written < size:
        prompt, chosen, rejected = (
            " ".join(dice.choices(vocabulary, cum_weights=weights, k=max(3, round(m * dice.lognormvariate(0, 0.6)))))
            for m in (90, 60, 60)
        )
        written += len(prompt) + len(chosen) + len(rejected)
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def write_set(folder: Path, size: int) -> None:
    """Parquet files of at most ROWS_PER_FILE rows, and their count beside them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    total = 0
    part: list[dict[str, Any]] = []

    def flush() -> None:
        path = folder / f"train-{total // ROWS_PER_FILE:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=ROWS_PER_SHARD, compression="zstd")

    for row in random_rows(size):
        part.append(row)
        if len(part) == ROWS_PER_FILE:
            flush()
            total += len(part)
            part.clear()
    if part:
        flush()
        total += len(part)
    write_json(folder / "rows.json", total)


class MemoryWatch:
    """The memory of this process and all below it, read twice a second: what each has for itself (USS), in bytes."""

    def __init__(self) -> None:
        self.peak_all = 0
        self.peak_one = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.5):
            found = []
            for process in [me, *me.children(recursive=True)]:
                try:
                    found.append(process.memory_full_info().uss)
                except psutil.Error:
                    continue  # it has ended since the list was made
            self.peak_all = max(self.peak_all, sum(found))
            self.peak_one = max(self.peak_one, *found)


def run_ours(folder: Path, result: Path, object_store: int) -> None:
    """Ingest and tokenize a set on a Ray of its own."""
    import ray

    from dpo_ray.config import parse_config
    from pipelines.align import align
    from pipelines.context import RunContext

    rows = json.loads((folder / "rows.json").read_text())
    output, spill = result.with_suffix(".out"), result.with_suffix(".spill")
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(spill, ignore_errors=True)
    spill.mkdir(parents=True)
    config = parse_config(
        {
            "run": {"name": "ingest", "output": str(output)},
            "model": {"path": MODEL},
            "data": {"train": str(folder / "*.parquet"), "rows_per_shard": ROWS_PER_SHARD},
            "reference": {"engine": "torch"},
        }
    )
    with MemoryWatch() as memory:
        began = time.perf_counter()
        ray.init(
            address="local", num_cpus=4, object_store_memory=object_store, object_spilling_directory=str(spill),
            logging_level="warning",
        )  # fmt: skip
        started = time.perf_counter()
        context = RunContext.start(config)
        align(context, until="tokenize")
        wall = time.perf_counter() - started
    spilled = sum(f.stat().st_size for f in spill.rglob("*") if f.is_file())
    ray.shutdown()
    write_json(
        result,
        {
            "environment": environment((*OUR_PACKAGES, "ray", "pyarrow")),
            "rows": rows,
            "bytes": sum(f.stat().st_size for f in folder.glob("*.parquet")),
            "object_store": object_store,
            "start_ray": started - began,
            "wall": wall,
            "stages": {name: stage["seconds"] for name, stage in context.stages.items()},
            "kept": context.stages["tokenize"]["rows"]["kept"],
            "peak_all": memory.peak_all,
            "peak_one": memory.peak_one,
            "spilled": spilled,
        },
    )
    shutil.rmtree(output)
    shutil.rmtree(spill)


def run_hf(folder: Path, result: Path, model: str) -> None:
    """The same rows by datasets.map with two processes."""
    import datasets
    from transformers import AutoTokenizer

    rows = json.loads((folder / "rows.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        sides = {}
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
            sides[f"{side}_ids"] = whole[len(prompt) :]
        return {"prompt_ids": prompt, **sides}

    cache = result.with_suffix(".cache")
    shutil.rmtree(cache, ignore_errors=True)
    with MemoryWatch() as memory:
        began = time.perf_counter()
        files = sorted(str(f) for f in folder.glob("*.parquet"))
        data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
        loaded = time.perf_counter()
        tokenized = data.map(tokenize, num_proc=2, remove_columns=data.column_names)
        wall = time.perf_counter() - began
    assert len(tokenized) == rows
    write_json(
        result,
        {
            "environment": environment(("datasets", "transformers", "pyarrow")),
            "rows": rows,
            "wall": wall,
            "load": loaded - began,
            "peak_all": memory.peak_all,
            "peak_one": memory.peak_one,
        },
    )
    shutil.rmtree(cache)


# Running


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line nearest to these points, by least squares."""
    n = len(points)
    mean_x, mean_y = (sum(p[i] for p in points) / n for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def report(folder: Path, sizes: list[int]) -> None:
    """Print what is finished, as tables in Markdown."""
    found = [json.loads((folder / f"ours-{size}.json").read_text()) for size in sizes]
    print(f"\n{versions(found[0]['environment'])}; {found[0]['environment']['hardware']}; "
          f"commit {found[0]['environment']['commit']}\n")  # fmt: skip
    lines = [
        [
            f"{size} MiB, {size * MIB / run['object_store']:.1f}× the object store",
            f"{run['rows']:,}",
            f"{run['rows'] / run['wall']:.0f}",
            ", ".join(f"{name} {seconds:.0f}" for name, seconds in run["stages"].items()),
            f"{run['peak_all'] / MIB:.0f}",
            f"{run['peak_one'] / MIB:.0f}",
            f"{run['spilled'] / MIB:.0f}",
        ]
        for size, run in zip(sizes, found, strict=True)
    ]
    head = ["text", "rows", "rows/s", "stages, s", "peak of all processes, MiB", "of one, MiB", "spilled, MiB"]
    print(table(head, lines))
    if len(found) > 1:
        for what in ("peak_all", "peak_one"):
            per_row = slope([(run["rows"], run[what]) for run in found])
            print(f"\n{what}: {per_row:.0f} bytes more for each row more")
    hf = folder / f"hf-{sizes[0]}.json"
    if hf.is_file():
        theirs, ours = json.loads(hf.read_text()), found[0]
        print(f"\nHugging Face, {versions(theirs['environment'])}: {theirs['rows'] / theirs['wall']:.0f} rows/s "
              f"(loading {theirs['load']:.0f} s of {theirs['wall']:.0f} s), peak {theirs['peak_all'] / MIB:.0f} MiB; "
              f"ours over theirs {ours['rows'] / ours['wall'] / (theirs['rows'] / theirs['wall']):.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", choices=("data", "ours", "hf"), help="run this part only")
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 400, 800], help="MiB of text of each set")
    parser.add_argument("--object-store", type=int, default=80, help="MiB of Ray's object store")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "ingest", help="where the parts meet")
    parser.add_argument("--hf-python", help="Python of TRL's environment, for datasets.map; left out: ours only")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    for size in arguments.sizes:
        data = folder / f"data-{size}"
        if arguments.side == "data":
            write_set(data, size * MIB)
        elif arguments.side == "ours":
            run_ours(data, folder / f"ours-{size}.json", arguments.object_store * MIB)
        elif arguments.side == "hf":
            from_ours = json.loads((folder / "model.json").read_text())
            run_hf(data, folder / f"hf-{size}.json", from_ours)
    if arguments.side is not None:
        return
    from dpo_ray.model.resolve import resolve

    write_json(folder / "model.json", str(resolve(MODEL)))
    for size in arguments.sizes:
        sides = [("data", sys.executable, folder / f"data-{size}" / "rows.json")]
        sides.append(("ours", sys.executable, folder / f"ours-{size}.json"))
        if arguments.hf_python and size == arguments.sizes[0]:
            sides.append(("hf", arguments.hf_python, folder / f"hf-{size}.json"))
        for side, python, made in sides:
            if made.is_file():
                continue
            command = [python, "-m", "benchmarks.ingest", "--side", side, "--sizes", str(size), "--folder", str(folder)]
            subprocess.run(
                [*command, "--object-store", str(arguments.object_store)],
                check=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            )
    report(folder, arguments.sizes)


if __name__ == "__main__":
    main()
