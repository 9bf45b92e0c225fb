"""How fast a DPO step is, ours beside TRL's, on the same token ids with the same model and optimizer.

    python -m benchmarks.speed --trl-python <Python of the environment of requirements-trl.txt>

runs all of it in the project's environment, from the root of a clone, or `make bench` with both environments built.
Other parts, with `--side`, print and keep nothing: `profile` (where a step's time goes), `scaling` (more and longer
pairs), `balance` (how evenly pairs spread over two ranks).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.speed.clock import device
from benchmarks.speed.inputs import write_pairs
from benchmarks.speed.ours import run_ours
from benchmarks.speed.parts import balance, measure_gemm, profile, scaling
from benchmarks.speed.report import report
from benchmarks.speed.runs import DATA, DTYPES, OURS, ROWS, Place, Setting, settled
from benchmarks.speed.schedule import environment_of, run_all
from benchmarks.speed.trl import probe, run_trl

SIDES = ("pairs", "ours", "trl", "probe", "gemm", "profile", "scaling", "balance")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--side", choices=SIDES, help="run this part only")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    real = ["hh_helpful", "tldr_human"] if os.environ.get("DPO_RAY_DATA") else ["generated"]
    parser.add_argument("--data", nargs="+", choices=DATA, default=real)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=2, help="runs of each row")
    parser.add_argument("--repeat", type=int, default=1, help="number of the run, with --side ours or trl")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "speed", help="where the parts meet")
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"), help="Python of TRL's environment")
    kept = parser.add_argument_group("setting, kept in the folder")
    kept.add_argument("--model", help="folder, .gguf or package:// of the model")
    kept.add_argument("--random-llama", metavar="HIDDENxLAYERS", help="random weights, with the model's tokenizer")
    kept.add_argument("--device", choices=["auto", "cpu", "cuda"], help="auto: a GPU where there is one")
    kept.add_argument("--threads", type=int, help="default: every core that the process may use")
    kept.add_argument("--steps", type=int, help="the first one is a warm-up; default 6")
    kept.add_argument("--pairs-per-step", type=int, help="default 4")
    kept.add_argument("--max-tokens", type=int, help="of the prompt and its longer completion; default 1024")
    kept.add_argument("--tokens-per-microbatch", type=int, help="ours; default: the product's")
    kept.add_argument("--trl-batch-sizes", type=int, nargs="+", help="tried for trl-tuned; default 2 4 8")
    arguments = parser.parse_args()

    given = {f.name: value for f in fields(Setting) if (value := getattr(arguments, f.name)) is not None}
    setting = settled(arguments.folder, given)
    places = [Place(arguments.folder, data, dtype) for data in arguments.data for dtype in arguments.dtype]
    if arguments.side is not None:
        os.environ |= environment_of(setting)
        _run_part(arguments.side, setting, places, arguments.rows, arguments.repeat)
        return
    if not arguments.report:
        trl_python = arguments.trl_python
        if trl_python is None and set(arguments.rows) != {OURS}:
            parser.error("name the Python of TRL's environment with --trl-python, or take --rows ours")
        run_all(setting, places, arguments.rows, arguments.repeats, trl_python)
    report(arguments.folder, setting, places)


def _run_part(side: str, setting: Setting, places: Sequence[Place], rows: Sequence[str], repeat: int) -> None:
    if setting.device == "cuda" and device() != "cuda":
        sys.exit("--device cuda, and torch sees no GPU here.")
    if side == "balance":
        for place in {place.data: place for place in places}.values():
            balance(place, setting)
        return
    if side == "scaling":
        for place in {place.dtype: place for place in places}.values():
            scaling(place, setting)
        return
    for place in places:
        if not place.pairs.is_file():
            write_pairs(place, setting)
        match side:
            case "ours":
                run_ours(place, setting, repeat)
            case "trl":
                for row in rows:
                    if row != OURS:
                        run_trl(place, setting, row, repeat)
            case "probe":
                probe(place, setting)
            case "gemm":
                measure_gemm(place, setting)
            case "profile":
                profile(place, setting)


if __name__ == "__main__":
    main()
