"""What holds on a GPU, and how fast it is there, in ten minutes.

    python -m benchmarks.gpu --out results          # on a GPU; results/gpu.md
    python -m benchmarks.gpu --out results --rehearse    # on CPUs, in tiny sizes, with a stand-in for the kernel

Each part is a process of its own and writes its result before the next one starts; one that fails is recorded, and the
next one runs. What no time is left for is recorded too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.record import OUR_PACKAGES, ROOT, environment, versions, write_json

Part = Callable[[Any, Path], list[dict[str, Any]]]


def _exactness(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """Packed attention by the variable-length kernel: largest |Δ| from float64, beside plain products in bfloat16."""
    from benchmarks.gpu.exactness import attention

    return attention(scale)


def _same_step(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """One step of a small model, computed in four ways."""
    from benchmarks.gpu.steps import same_step

    return same_step(scale, folder)


def _packed(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """Steps of the large model in bfloat16 on packed pairs, with the plan of its memory."""
    from benchmarks.gpu.steps import speed

    return speed(scale, folder, "packed")


def _plain(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """The same pairs padded, all logits at once, under autocast, with PyTorch's attention: no trick of ours."""
    from benchmarks.gpu.steps import speed

    return speed(scale, folder, "plain")


def _logprobs(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """Hidden states to log-probs, forward and backward, alone."""
    from benchmarks.gpu.logprobs import alone

    return alone(scale)


def _resume(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """A checkpoint in bfloat16, read again."""
    from benchmarks.gpu.resume import bit_for_bit

    return bit_for_bit(scale, folder)


def _compiled(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """The large model with compiled layers."""
    from benchmarks.gpu.steps import speed

    return speed(scale, folder, "compiled")


def _trl(scale: Any, folder: Path) -> list[dict[str, Any]]:
    """TRL's trainer on the same pairs, reference log-probs computed before."""
    from benchmarks.gpu.trl import steps

    return steps(scale, folder)


PARTS: dict[str, Part] = {
    "exactness": _exactness,
    "same step": _same_step,
    "packed steps": _packed,
    "plain steps": _plain,
    "logprobs": _logprobs,
    "resume": _resume,
    "compiled steps": _compiled,
    "TRL's steps": _trl,
}


def run_part(name: str, rehearse: bool, models: Path, result: Path) -> None:
    """In this process."""
    from benchmarks.gpu.scale import ON_GPU, REHEARSAL
    from benchmarks.gpu.stand_in import in_place_of_the_kernel

    with in_place_of_the_kernel() if rehearse else nullcontext():
        rows = PARTS[name](REHEARSAL if rehearse else ON_GPU, models)
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
            about = (PARTS[part].__doc__ or "").strip()
            write_json(place, {"part": part, "about": about, "seconds": time.monotonic() - began, **found})
            how = found.get("failed") or found.get("left_out") or "done"
            print(f"{part}: {how} ({time.monotonic() - began:.0f} s)", flush=True)
            on = f"{made['hardware']}; {versions(made)}; commit {made['commit']}.{_told()}"
            (options.out / "gpu.md").write_text(markdown(read(options.out), on))
    sys.exit(1 if any("failed" in result for result in read(options.out)) else 0)


def _outcome(part: str, rehearse: bool, models: Path, place: Path, seconds: float) -> dict[str, Any]:
    """Its rows, or why there are none."""
    if seconds <= 0:
        return {"failed": "no time was left"}
    if PARTS[part] is _trl and find_spec("trl") is None:
        return {"left_out": "TRL is not installed here."}
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
