"""What explains a speed: the machine's rate in matrix products, where a step's time goes, what it grows with, and how
evenly it spreads over ranks."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from benchmarks.record import read_lines, table, write_json
from benchmarks.side_by_side import SEED, longest
from benchmarks.speed.clock import device
from benchmarks.speed.flops import gemm_rate, gemms
from benchmarks.speed.inputs import model_of, tokenized
from benchmarks.speed.ours import train_ours
from benchmarks.speed.pairs import Lengths, fixed_pair, lengths_of, shared_tokens
from benchmarks.speed.runs import Place, Setting, speed


def measure_gemm(place: Place, setting: Setting) -> None:
    """The machine's rate at the model's matrix shapes, for the median step's tokens in one micro-batch."""
    import torch

    torch.set_num_threads(setting.threads)
    rows, size = read_lines(place.pairs), setting.pairs_per_step
    steps = [rows[i : i + size] for i in range(0, len(rows), size)]
    shared = min(round(statistics.median(shared_tokens(step) for step in steps)), setting.microbatch_tokens)
    completions = round(statistics.median(sum(sum(lengths_of(row)[1:]) for row in step) for step in steps))
    _, shape = model_of(place.folder, setting)
    measured = gemm_rate(gemms(shape, shared, min(completions, shared)), place.dtype, device())
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

    on_gpu = device() == "cuda"
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
    _, shape = model_of(place.folder, setting)
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

    from dpo_ray.bins import spread
    from dpo_ray.training.plan import pair_cost

    model, _ = model_of(place.folder, setting)
    limit = 1000 if place.data == "generated" else None
    size = num_ranks * setting.pairs_per_step
    lengths: list[Lengths] = []
    for row in tokenized(place, setting):
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
