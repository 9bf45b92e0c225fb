"""Every part that is not finished, each in a process of its own, the rows in turn."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.speed.runs import OURS, TUNED, Place, Setting


def run_all(setting: Setting, places: Sequence[Place], rows: Sequence[str], repeats: int, trl_python: str) -> None:
    """Every part that is not finished, each in a process of its own."""
    for place in places:
        if not place.pairs.is_file():
            _run_side(sys.executable, "pairs", place, setting)
        if not place.gemm.is_file():
            _run_side(sys.executable, "gemm", place, setting)
        if TUNED in rows and not place.probe.is_file():
            _run_side(trl_python, "probe", place, setting)
        for repeat, row in in_turn(rows, repeats):
            if place.run(row, repeat).is_file():
                continue
            began = time.monotonic()
            side, python = ("ours", sys.executable) if row == OURS else ("trl", trl_python)
            _run_side(python, side, place, setting, "--rows", row, "--repeat", str(repeat))
            print(f"{place.data}, {place.dtype}, {row}.{repeat}: {time.monotonic() - began:.0f} s", flush=True)


def in_turn(rows: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """Repeat and row of each run: forwards, then backwards, so that a drift of the machine meets all rows alike."""
    return [(n, row) for n in range(1, repeats + 1) for row in (rows if n % 2 else reversed(rows))]


def _run_side(python: str, side: str, place: Place, setting: Setting, *more: str) -> None:
    where = ["--folder", str(place.folder), "--data", place.data, "--dtype", place.dtype]
    subprocess.run(
        [python, "-m", "benchmarks.speed", "--side", side, *where, *more], check=True, env=environment_of(setting)
    )


def environment_of(setting: Setting) -> dict[str, str]:
    """Variables that libraries read when they are loaded."""
    threads = {name: str(setting.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **threads, **hidden}
