"""How fast a DPO step is, ours beside TRL's, on the same token ids with the same model and optimizer.

    python -m benchmarks.speed --trl-python <Python of the environment of requirements-trl.txt>

runs all of it in the project's environment, or `make bench` with both environments built. Each row runs in a fresh
process, the rows in turn, forwards and then backwards; what is finished is not run again, so a killed run goes on.

    ours            dpo_ray.training.loop.train, micro-batches as dpo_ray.training.plan cuts them
    trl-default     activations recomputed in the backward pass, and a live reference model, as TRL's defaults are
    trl-fair        neither: activations kept, reference log-probs precomputed
    trl-tuned       trl-fair on pairs sorted by length, at the batch size that a short trial found fastest

Each row trains the same pairs after a warm-up that is not counted. trl-tuned warms up with pairs repeated, and its
batches larger than a step's pairs are steps of their own: fewer updates, in TRL's favour. Smaller ones are accumulated.
Ours is timed from one request for a step to the next, TRL's from on_step_begin to on_step_end, which leaves out its
loading and logging. A reference pass is timed apart, without loading the model.

In bfloat16 both sides train float32 weights. TRL 1.16 by default computes under autocast; its only faster choice,
weights in bfloat16, would train no float32 weights. Ours computes on a copy of the weights in bfloat16. Both use fused
AdamW.

The folder:

    setting.json, model.json                what all parts share
    <data>/pairs.jsonl                      token ids, the first step's pairs first
    <data>/<dtype>/gemm.json                the machine's rate for the model's matrix products
    <data>/<dtype>/probe.json               tokens per second of TRL by batch size
    <data>/<dtype>/<row>.<repeat>.json      one run

Other parts, with `--side`, print and keep nothing: `profile` (where a step's time goes), `scaling` (more and longer
pairs), `balance` (how evenly pairs spread over two ranks).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import (
    OUR_PACKAGES,
    ROOT,
    SEED,
    TRL_PACKAGES,
    NoCheckpoints,
    Rows,
    dpo_config,
    environment,
    longest,
    preference_pairs,
    read_lines,
    table,
    token_ids,
    token_ids_trainer,
    train_options,
    write_json,
    write_lines,
)
from benchmarks.speed.flops import Lengths, ModelShape, gemm_rate, gemms
from benchmarks.speed.report import report
from benchmarks.speed.runs import (
    DATA,
    DEFAULT,
    DTYPES,
    OURS,
    ROWS,
    TUNED,
    Place,
    Setting,
    by_length,
    fixed_pair,
    generated_pairs,
    lengths_of,
    middle,
    real_tokens,
    repeated,
    select,
    settled,
    shared_tokens,
    speed,
)

BETA = 0.1


# The pairs


def write_pairs(place: Place, setting: Setting) -> None:
    """Tokenize the pairs of a data set."""
    rows = select(_tokenized(place, setting), setting.steps * setting.pairs_per_step, setting.max_tokens)
    write_lines(place.pairs, rows)


def _tokenized(place: Place, setting: Setting) -> Iterator[dict[str, Any]]:
    """The pairs of a data set in an order drawn from the seed; the generated ones never end."""
    from dpo_ray.model.folders import load_tokenizer

    model, shape = _model(place.folder, setting)
    if place.data == "generated":
        yield from generated_pairs(shape.head[0])
        return
    real = os.environ.get("DPO_RAY_DATA")
    if real is None:
        sys.exit(f"DPO_RAY_DATA must name the folder of {place.data}; --data generated needs none.")
    pairs = list(preference_pairs(Path(real) / place.data))
    random.Random(SEED).shuffle(pairs)
    tokenizer = load_tokenizer(Path(model))
    for pair in pairs:
        yield token_ids(tokenizer, pair)


def _model(folder: Path, setting: Setting) -> tuple[str, ModelShape]:
    """The model's folder and shape; found or made where no part has done so."""
    path = folder / "model.json"
    if not path.is_file():
        from transformers import AutoConfig

        from dpo_ray.model.folders import resolve

        source = resolve(setting.model)
        if setting.random_llama is not None:
            source = _random_llama(source, setting.random_llama, folder / "model")
        shape = ModelShape.of(AutoConfig.from_pretrained(source))
        write_json(path, {"path": str(source), "shape": asdict(shape)})
    found = json.loads(path.read_text())
    return found["path"], ModelShape.from_json(found["shape"])


def _random_llama(like: Path, size: str, target: Path) -> Path:
    """A Llama with random weights and the tokenizer of another model.

    size: HIDDENxLAYERS; heads have 64 dimensions, and four of them share keys and values where that divides.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    hidden, _, layers = size.partition("x")
    heads = int(hidden) // 64
    config = AutoConfig.from_pretrained(like)
    config.update(
        {
            "hidden_size": heads * 64,
            "intermediate_size": heads * 64 * 8 // 3 // 64 * 64,
            "num_hidden_layers": int(layers),
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads,
            "head_dim": 64,
        }
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(like).save_pretrained(target)
    return target


# Measuring


class Clock:
    """Wall seconds and CPU seconds of the process, all its threads together; a GPU's work is waited for."""

    def __init__(self) -> None:
        import torch

        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self._began = (0.0, 0.0)

    def start(self) -> None:
        self._wait()
        self._began = (time.perf_counter(), time.process_time())

    def stop(self) -> dict[str, float]:
        """Since the start."""
        self._wait()
        return {"wall": time.perf_counter() - self._began[0], "cpu": time.process_time() - self._began[1]}


def busy_cores(before: str, after: str) -> float:
    """Cores in use between two readings of /proc/stat."""
    num_cores = sum(line.startswith("cpu") and line[3].isdigit() for line in after.splitlines())
    first, second = ([int(x) for x in text.split("\n", 1)[0].split()[1:9]] for text in (before, after))
    passed = [b - a for a, b in zip(first, second, strict=True)]
    idle = passed[3] + passed[4]  # idle, and idle while waiting for a disk
    return num_cores * (1 - idle / sum(passed)) if sum(passed) else 0.0


def _load() -> dict[str, Any]:
    """What else runs on the machine: the load average, which knows the run before this one too, and this second."""
    stat = Path("/proc/stat")
    busy = None
    if stat.is_file():
        before = stat.read_text()
        time.sleep(1)
        busy = busy_cores(before, stat.read_text())
    return {"average": os.getloadavg()[0], "busy_cores": busy}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_run(path: Path, load: dict[str, Any], packages: Sequence[str], measured: dict[str, Any]) -> None:
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    peaks = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_gpu": gpu}  # bytes
    write_json(path, {"environment": environment(packages), "load": load, **peaks, **measured})


def _steps(
    times: Sequence[dict[str, float]], losses: Sequence[float], rows: Rows, size: int, num_warm_up: int
) -> list[dict[str, Any]]:
    """What is kept of each step. `size` pairs each, the last one those that are left."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [
        {"warm_up": n < num_warm_up, "pairs": len(batch), "tokens": real_tokens(batch), **spent, "loss": loss}
        for n, (spent, loss, batch) in enumerate(zip(times, losses, batches, strict=True))
    ]


# Our side


def run_ours(place: Place, setting: Setting, repeat: int) -> None:
    """A run of ours, kept."""
    load = _load()
    measured = train_ours(place, setting, read_lines(place.pairs), setting.pairs_per_step)
    _write_run(place.run(OURS, repeat), load, OUR_PACKAGES, measured)


def train_ours(
    place: Place,
    setting: Setting,
    rows: Rows,
    pairs_per_step: int,
    around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
) -> dict[str, Any]:
    """Score the reference and train, one step a batch; the first step is the warm-up.

    around: what is entered around a step, counted from 0.
    """
    from dataclasses import replace

    import torch

    from dpo_ray.config import Model
    from dpo_ray.on_ray.vllm_engine import TorchScorer
    from dpo_ray.pairs import TokenizedPair
    from dpo_ray.training.batch import Share, Step
    from dpo_ray.training.loop import train
    from dpo_ray.training.parallel import Rank
    from dpo_ray.training.plan import fit

    torch.set_num_threads(setting.threads)
    clock = Clock()
    model = Model(path=_model(place.folder, setting)[0], dtype=place.dtype)
    unscored = [TokenizedPair(f"{n}", **row) for n, row in enumerate(rows)]
    scorer = TorchScorer(model)
    clock.start()
    scores = zip(*scorer.score(unscored), strict=True)
    reference = {**clock.stop(), "pairs": len(rows), "tokens": real_tokens(rows)}
    del scorer
    pairs = [
        replace(pair, chosen_ref_logprobs=chosen, rejected_ref_logprobs=rejected)
        for pair, (chosen, rejected) in zip(unscored, scores, strict=True)
    ]
    num_steps = len(pairs) // pairs_per_step
    times: list[dict[str, float]] = []

    def steps_from(start: int) -> Iterator[Step]:
        for number in range(start, num_steps):
            members = pairs[number * pairs_per_step : (number + 1) * pairs_per_step]
            groups = fit([pair.num_tokens for pair in members], setting.microbatch_tokens)
            share = Share([[members[i] for i in group] for group in groups], filler=members[0])
            with around(number):
                clock.start()
                yield Step(number, share)
                times.append(clock.stop())

    # The loop is told of one step more than it gets: it then ends without the checkpoint of the last step.
    told = num_steps + 1
    state = train(
        model,
        train_options(pairs_per_step, checkpoint_every_steps=told, loss={"type": "sigmoid", "beta": BETA}),
        seed=SEED,
        num_steps=told,
        pairs_per_epoch=len(pairs),
        me=Rank(0, 1, torch.device(_device())),
        steps_from=steps_from,
        held_out=None,
        checkpoints=NoCheckpoints(),
        resume=None,
        reference_tolerance=None,
    )
    losses = [entry["loss"] for entry in state.history]
    return {"reference": reference, "steps": _steps(times, losses, rows, pairs_per_step, 1)}


# TRL's side


def run_trl(place: Place, setting: Setting, row: str, repeat: int) -> None:
    """A run of one of TRL's rows, kept."""
    load = _load()
    rows, size = read_lines(place.pairs), setting.pairs_per_step
    if row == TUNED:
        batch_size = json.loads(place.probe.read_text())["batch_size"]
        warm_up, measured = _tuned_pairs(rows, setting)
    else:
        batch_size, warm_up, measured = size, rows[:size], rows[size:]
    default = row == DEFAULT
    trained = _train_trl(place, setting, warm_up, measured, batch_size, checkpointing=default, precompute=not default)
    _write_run(place.run(row, repeat), load, TRL_PACKAGES, {"batch_size": batch_size, **trained})


def probe(place: Place, setting: Setting) -> None:
    """Find TRL's fastest batch size, on two batches of the largest size from the middle of the pairs by length."""
    warm_up, measured = _tuned_pairs(read_lines(place.pairs), setting)
    sample = middle(measured, 2 * max(setting.trl_batch_sizes))
    rates = {}
    for size in setting.trl_batch_sizes:
        run = _train_trl(place, setting, warm_up, sample, size, checkpointing=False, precompute=True)
        rates[size] = speed(run).tokens_per_second
    write_json(place.probe, {"batch_size": max(rates, key=lambda size: rates[size]), "tokens_per_second": rates})


def _tuned_pairs(rows: Rows, setting: Setting) -> tuple[Rows, Rows]:
    """Those of the warm-up, as many as fill whole steps of every batch size, and the measured ones by length."""
    size = setting.pairs_per_step
    count = math.lcm(size, *(max(size, b) for b in setting.trl_batch_sizes))
    return repeated(rows[:size], count), by_length(rows[size:])


def _train_trl(
    place: Place,
    setting: Setting,
    warm_up: Rows,
    measured: Rows,
    batch_size: int,
    *,
    checkpointing: bool,
    precompute: bool,
) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    torch.set_num_threads(setting.threads)
    clock, reference_clock = Clock(), Clock()
    times: list[dict[str, float]] = []
    passes: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(clock.stop())

    class Trainer(token_ids_trainer()):  # type: ignore[misc]
        def compute_ref_log_probs(self, *arguments: Any, **options: Any) -> Any:
            reference_clock.start()
            found = super().compute_ref_log_probs(*arguments, **options)
            passes.append(reference_clock.stop())
            return found

    rows = warm_up + measured
    accumulated = max(1, setting.pairs_per_step // batch_size)
    size = batch_size * accumulated
    model, _ = _model(place.folder, setting)
    trainer = Trainer(
        model=model,
        args=dpo_config(
            place.folder / "trl",
            loss_type=["sigmoid"],
            beta=BETA,
            precompute_ref_log_probs=precompute,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=math.ceil(len(rows) / size),
            gradient_checkpointing=checkpointing,
            bf16=place.dtype == "bfloat16",
            use_cpu=_device() == "cpu",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    spent = {name: sum(p[name] for p in passes) for name in ("wall", "cpu")}
    return {
        # A live reference is part of the steps.
        "reference": {**spent, "pairs": len(rows), "tokens": real_tokens(rows)} if precompute else None,
        "steps": _steps(times, losses, rows, size, len(warm_up) // size),
    }


# The other parts


def measure_gemm(place: Place, setting: Setting) -> None:
    """The machine's rate at the model's matrix shapes, for the median step's tokens in one micro-batch."""
    import torch

    torch.set_num_threads(setting.threads)
    rows, size = read_lines(place.pairs), setting.pairs_per_step
    steps = [rows[i : i + size] for i in range(0, len(rows), size)]
    shared = min(round(statistics.median(shared_tokens(step) for step in steps)), setting.microbatch_tokens)
    completions = round(statistics.median(sum(sum(lengths_of(row)[1:]) for row in step) for step in steps))
    _, shape = _model(place.folder, setting)
    measured = gemm_rate(gemms(shape, shared, min(completions, shared)), place.dtype, _device())
    write_json(place.gemm, measured)
    print(f"{place.data}, {place.dtype}: {measured['gflops_per_second']:.0f} GFLOP/s in matrix products", flush=True)


GROUPS = {
    "other": ("expand",),
    "optimizer": ("adam", "optimizer"),
    "attention": ("attention",),
    "matmul": ("mm", "linear", "matmul"),
    # On a CPU logsumexp is made of amax, sub and exp, which the decoder itself does not use.
    "softmax/log-prob": ("softmax", "logsumexp", "aten::amax", "aten::sub", "aten::exp", "gather", "scatter"),
    "copy/cast": ("copy", "clone", "aten::cat", "index", "zero", "fill", "aten::to", "contiguous", "empty"),
    "elementwise/norm": (
        *("aten::mul", "aten::add", "aten::div", "aten::neg", "aten::pow", "aten::sum", "aten::mean"),
        *("sqrt", "silu", "sigmoid", "norm", "aten::where", "embedding"),
    ),
}
"""Group → parts of the names of its operations; the first group that fits has it."""


def group_of(operation: str) -> str:
    """The group of an operation as torch.profiler names it."""
    name = operation.lower()
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")


def profile(place: Place, setting: Setting) -> None:
    """Print where the time of one step of ours goes."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = _device() == "cuda"
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])], acc_events=True
    )
    rows = read_lines(place.pairs)[: 2 * setting.pairs_per_step]
    train_ours(place, setting, rows, setting.pairs_per_step, lambda step: profiler if step == 1 else nullcontext())
    spent = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in profiler.key_averages()}
    total = sum(spent.values())
    groups: dict[str, float] = {}
    for name, microseconds in spent.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + microseconds
    unit = f"own {'GPU' if on_gpu else 'CPU'} time, ms"
    print(f"\nOne step of {setting.pairs_per_step} pairs, {place.data}, {place.dtype}:\n")
    print(table(["group", unit, "share"], _shares(groups, total)))
    print()
    print(table(["operation", unit, "share"], _shares(spent, total)[:20]))


def _shares(spent: Mapping[str, float], total: float) -> list[list[str]]:
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return [[name, f"{value / 1e3:.1f}", f"{value / total:.1%}"] for name, value in ordered]


def scaling(place: Place, setting: Setting) -> None:
    """Print tokens per second of ours for more pairs a step and for longer ones; equal ones mean linear cost."""
    _, shape = _model(place.folder, setting)
    lines = []
    for pairs, length in ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4)):
        size, sizes = setting.pairs_per_step * pairs, (128 * length, 64 * length, 64 * length)
        dice = random.Random(SEED)
        rows = [fixed_pair(dice, shape.head[0], sizes) for _ in range(size * 4)]
        found = speed(train_ours(place, setting, rows, size))
        cells = [f"{pairs}×", f"{length}×", f"{size}", "{}, {}, {}".format(*sizes)]
        lines.append([*cells, f"{found.wall / 3:.3f}", f"{found.tokens_per_second:.0f}"])
    print(f"\nOurs, pairs of random tokens, {place.dtype}, 3 steps each:\n")
    head = ["pairs", "length", "pairs a step", "P, C, R", "wall s a step", "real tokens/s"]
    print(table(head, lines))


def balance(place: Place, setting: Setting, num_ranks: int = 2) -> None:
    """Print how far the slowest rank is from the mean, in counted cost, over all whole steps of the data."""
    import numpy as np
    from transformers import AutoConfig

    from dpo_ray.training.plan import pair_cost, spread

    model, _ = _model(place.folder, setting)
    limit = 1000 if place.data == "generated" else None
    size = num_ranks * setting.pairs_per_step
    lengths: list[Lengths] = []
    for row in _tokenized(place, setting):
        if longest(row) <= setting.max_tokens:
            lengths.append(lengths_of(row))
        if len(lengths) == limit:
            break
    costs = pair_cost(np.array(lengths), AutoConfig.from_pretrained(model).hidden_size)
    steps = [costs[i : i + size] for i in range(0, len(costs) - size + 1, size)]
    balanced = [[float(sum(step[share])) for share in spread(step, num_ranks)] for step in steps]
    in_order = [[float(sum(part)) for part in np.split(step, num_ranks)] for step in steps]
    print(f"\n{place.data}: {len(steps)} steps of {num_ranks} ranks with {setting.pairs_per_step} pairs each\n")
    lines = [
        [name, f"{statistics.mean(ratios):.3f}", f"{max(ratios):.3f}", f"{over_all:.3f}"]
        for name, (ratios, over_all) in {"in order": imbalance(in_order), "balanced": imbalance(balanced)}.items()
    ]
    print(table(["pairs", "max/mean of a step, mean", "worst", "over all steps"], lines))


def imbalance(steps: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """From the costs of the ranks in each step: max/mean of each, and of all steps where each waits for its slowest."""
    ratios = [max(costs) / statistics.mean(costs) for costs in steps]
    return ratios, sum(map(max, steps)) / sum(map(statistics.mean, steps))


# Running


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
        [python, "-m", "benchmarks.speed", "--side", side, *where, *more], check=True, env=_environment_of(setting)
    )


def _environment_of(setting: Setting) -> dict[str, str]:
    """Variables that libraries read when they are loaded."""
    threads = {name: str(setting.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **threads, **hidden}


SIDES = ("pairs", "ours", "trl", "probe", "gemm", "profile", "scaling", "balance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
        os.environ |= _environment_of(setting)
        _run_part(arguments.side, setting, places, arguments.rows, arguments.repeat)
        return
    if not arguments.report:
        trl_python = arguments.trl_python
        if trl_python is None and set(arguments.rows) != {OURS}:
            parser.error("name the Python of TRL's environment with --trl-python, or take --rows ours")
        run_all(setting, places, arguments.rows, arguments.repeats, trl_python)
    report(arguments.folder, setting, places)


def _run_part(side: str, setting: Setting, places: Sequence[Place], rows: Sequence[str], repeat: int) -> None:
    if setting.device == "cuda" and _device() != "cuda":
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
