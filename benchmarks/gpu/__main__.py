"""What holds on a GPU, and how fast it is there, in ten minutes.

    python -m benchmarks.gpu --out results          # on a GPU; results/gpu.md
    python -m benchmarks.gpu --out results --rehearse    # on CPUs, in tiny sizes, with a stand-in for the kernel

Each part is a process of its own and writes its result before the next one starts; one that fails is recorded, and the
next one runs. What no time is left for is recorded too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import OUR_PACKAGES, ROOT, environment, versions, write_json


class Part(NamedTuple):
    """One of them."""

    about: str
    function: str
    """module:name below benchmarks.gpu; given the scale, the folder of models, and the arguments, it returns rows."""
    arguments: tuple[str, ...] = ()
    needs: str | None = None
    """A package without which it is left out."""


PARTS = {
    "exactness": Part(
        "Packed attention by the variable-length kernel: largest |Δ| from float64, beside plain products in bfloat16.",
        "exactness:attention",
    ),
    "same step": Part("One step of a small model, computed in four ways.", "steps:same_step"),
    "packed steps": Part(
        "Steps of the large model in bfloat16 on packed pairs, with the plan of its memory.", "steps:speed", ("packed",)
    ),
    "plain steps": Part(
        "The same pairs padded, all logits at once, under autocast, with PyTorch's attention: no trick of ours.",
        "steps:speed",
        ("plain",),
    ),
    "logprobs": Part("Hidden states to log-probs, forward and backward, alone.", "logprobs:alone"),
    "resume": Part("A checkpoint in bfloat16, read again.", "resume:bit_for_bit"),
    "compiled steps": Part("The large model with compiled layers.", "steps:speed", ("compiled",)),
    "TRL's steps": Part(
        "TRL's trainer on the same pairs, reference log-probs computed before.", "trl:steps", needs="trl"
    ),
}


def run_part(name: str, rehearse: bool, models: Path, result: Path) -> None:
    """In this process."""
    from benchmarks.gpu.scale import ON_GPU, REHEARSAL
    from benchmarks.gpu.stand_in import in_place_of_the_kernel

    module, _, function = PARTS[name].function.partition(":")
    with in_place_of_the_kernel() if rehearse else nullcontext():
        compute = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        rows = compute(REHEARSAL if rehearse else ON_GPU, models, *PARTS[name].arguments)
    write_json(result, {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which nothing is computed any more")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="all unless told")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on CPUs")
    parser.add_argument("--in-this-process", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        run_part(options.in_this_process, options.rehearse, options.models, options.out)
        return
    from benchmarks.gpu.report import markdown, read

    made = environment(OUR_PACKAGES)
    if not options.rehearse:
        _require_a_gpu()
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="dpo-ray-gpu-") as models:
        for part in options.parts:
            place = options.out / f"{list(PARTS).index(part)}.json"
            began = time.monotonic()
            found = _outcome(part, options.rehearse, Path(models), place, ends - began)
            write_json(place, {"part": part, "about": PARTS[part].about, "seconds": time.monotonic() - began, **found})
            how = found.get("failed") or found.get("left_out") or "done"
            print(f"{part}: {how} ({time.monotonic() - began:.0f} s)", flush=True)
            on = f"{made['hardware']}; {versions(made)}; commit {made['commit']}.{_told()}"
            (options.out / "gpu.md").write_text(markdown(read(options.out), on))
    sys.exit(1 if any("failed" in result for result in read(options.out)) else 0)


def _outcome(part: str, rehearse: bool, models: Path, place: Path, seconds: float) -> dict[str, Any]:
    """Its rows, or why there are none."""
    if seconds <= 0:
        return {"failed": "no time was left"}
    if (needed := PARTS[part].needs) is not None and find_spec(needed) is None:
        return {"left_out": f"{needed} is not installed here."}
    result = place.with_suffix(".rows")
    command = [sys.executable, "-m", "benchmarks.gpu", "--in-this-process", part, "--out", str(result)]
    command += ["--models", str(models), *(["--rehearse"] if rehearse else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within the {seconds:.0f} s that were left"}
    if done.returncode:
        (place.with_suffix(".log")).write_text(done.stderr)
        said = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
        return {"failed": (said or [f"exit code {done.returncode}"])[-1][:2000]}
    found: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return found


def _require_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device here. --rehearse runs all parts on CPUs, in tiny sizes.")


def _told() -> str:
    from dpo_ray.model.varlen import missing

    return "".join(f" Missing in this PyTorch: {what}." for what in missing())


if __name__ == "__main__":
    main()
