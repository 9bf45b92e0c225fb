"""How near `dpo-ray plan` comes to what a run then takes: tokens, memory of a training worker, time.

    python -m benchmarks.plan [--cases float32 bfloat16 lora] [--rows 256] [--calibrate-on 64] [--write]

Of each case a calibration run trains on a few pairs; then all pairs are tokenized (`plan --exact`), the plan is made,
and they are trained on. Compared are the tokens of the training, the seconds of stages, and the peak of the resident
memory of the training's workers, which the kernel keeps (VmHWM). Pairs are made of words, in lengths like those of HH.
The machine should be quiet. Prints a table; --write puts it at the end of plan.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions

_CONFIG = "pipelines/configs/align_cpu.yaml"
_GIB = 2**30
_WORDS = ("the", "quick", "patient", "river", "answers", "why", "seven", "small", "questions", "about", "light", "end")
CASES = {
    "float32": [],
    "bfloat16": ["-o", "model.dtype=bfloat16"],
    "lora": ["-o", "model.lora.rank=16"],
}
_HEAD = ["case", "what", "planned", "measured", "planned / measured"]


def write_rows(file: Path, first: int, count: int) -> None:
    """Pairs of words, lengths log-normal around 120 words of a prompt and 35 of an answer."""
    dice = random.Random(first)

    def words(median: float) -> str:
        return " ".join(dice.choices(_WORDS, k=max(1, round(dice.lognormvariate(math.log(median), 0.7)))))

    rows = [{"prompt": f"{n}: {words(120)}", "chosen": words(35), "rejected": words(35)} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class PeakOf:
    """The largest peak of resident memory among processes of a name below this one, in bytes."""

    def __init__(self, root: int, name: str) -> None:
        self._root, self._name, self.bytes = root, name, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakOf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            for pid in below(self._root):
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:  # it has ended
                    continue
                if self._name.encode() in command and "VmHWM:" in status:
                    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
                    self.bytes = max(self.bytes, peak)


def below(root: int) -> list[int]:
    """All descendants of a process."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found, waiting = [], [root]
    while waiting:
        some = children.get(waiting.pop(), [])
        found += some
        waiting += some
    return found


def dpo_ray(*words: str, watch: str | None = None) -> tuple[str, int]:
    """Standard output of a command, and the peak of the processes that are watched. Raises SystemExit on failure."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=said, text=True)
        with PeakOf(process.pid, watch or "no such process") as peak:
            out, _ = process.communicate()
        if process.returncode != 0:
            said.seek(0)
            sys.exit(f"{' '.join(words)} ended with {process.returncode}:\n{said.read()[-3000:]}")
    return out, peak.bytes


def compare(case: str, rows: int, few: int, folder: Path, more: list[str]) -> list[list[str]]:
    """The rows of the table of a case."""
    write_rows(folder / "few.jsonl", 0, few)
    write_rows(folder / "all.jsonl", few, rows)
    shared = [_CONFIG, "-o", f"run.output={folder / 'out'}", *CASES[case], "-o", "reference.engine=torch", *more]
    dpo_ray("train", *shared, "-o", f"data.train={folder / 'few.jsonl'}")
    whole = [*shared, "-o", f"data.train={folder / 'all.jsonl'}"]
    dpo_ray("plan", *whole, "--exact", "--json")
    told = json.loads(dpo_ray("plan", *whole, "--json")[0])
    _, peak = dpo_ray("train", *whole, "--run-id", "measured", watch="ray::RayTrainWorker")
    summary = json.loads((folder / "out" / "runs" / "measured" / "summary.json").read_text())
    stages: dict[str, dict[str, Any]] = {stage["stage"]: stage for stage in told["stages"]}
    train = stages["train"]
    found = [
        ("tokens", train["tokens"], summary["train"]["steps"]["tokens"], ".0f"),
        ("memory of a worker, GiB", train["memory_bytes"] / _GIB, peak / _GIB, ".2f"),
        *(
            (f"{name}, s", stages[name]["seconds"], summary["stages"][name]["seconds"], ".0f")
            for name in ("tokenize", "reference", "train")
            if not summary["stages"][name]["reused"]
        ),
    ]
    return [
        [case, what, f"{planned:{form}}", f"{measured:{form}}", f"{planned / measured:.3f}"]
        for what, planned, measured, form in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", type=int, default=256, help="pairs that the plan is about")
    parser.add_argument("--calibrate-on", type=int, default=64, help="pairs of the run before")
    parser.add_argument("-o", action="append", default=[], help="an override of the configuration, for all runs")
    parser.add_argument("--write", action="store_true", help="put the table at the end of benchmarks/plan.md")
    options = parser.parse_args()
    more = [word for override in options.o for word in ("-o", override)]
    rows = []
    for case in options.cases:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-plan-") as folder:
            rows += compare(case, options.rows, options.calibrate_on, Path(folder), more)
        print(*rows, sep="\n", file=sys.stderr)
    made = environment((*OUR_PACKAGES, "ray"))
    changed = f", with {', '.join(options.o)}" if options.o else ""
    text = (
        f"## {datetime.now(UTC):%Y-%m-%d} (commit {made['commit']})\n\n"
        f"{os.cpu_count()} cores, {made['hardware']}; {versions(made)}. SmolLM2-135M-Instruct, {options.rows} pairs "
        f"after a run on {options.calibrate_on}{changed}; load {os.getloadavg()[2]:.1f} over the last 15 minutes.\n\n"
        f"{table(_HEAD, rows)}\n"
    )
    print(text)
    if options.write:
        report = ROOT / "benchmarks" / "plan.md"
        before = report.read_text().rstrip() if report.exists() else f"# The plan and the run\n\n{_HOW}"
        report.write_text(f"{before}\n\n{text}")


_HOW = "How it is measured stands in benchmarks/plan.py."


if __name__ == "__main__":
    main()
