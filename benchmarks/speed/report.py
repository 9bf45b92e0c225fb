"""What the finished runs say, in Markdown."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Rows, read_lines, table, versions
from benchmarks.speed.pairs import lengths_of, padded_tokens, real_tokens, shared_tokens
from benchmarks.speed.runs import OURS, TUNED, Place, Setting, Speed, speed
from dpo_ray.training.flops import ModelShape, flops

BUSY = 0.7
"""Cores that others use at a run's start, above which the report marks it."""


@dataclass(frozen=True)
class Spread:
    """Of one number over the repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        kept = list(values)
        return cls(statistics.median(kept), min(kept), max(kept))

    def text(self, form: str) -> str:
        return f"{self.median:{form}} ({self.least:{form}}–{self.most:{form}})"


def paired_ratios(ours: Mapping[int, float], other: Mapping[int, float]) -> Spread | None:
    """Ours over the other's, repeat by repeat; None where they have no repeat in common."""
    ratios = [ours[repeat] / other[repeat] for repeat in sorted(ours.keys() & other.keys())]
    return Spread.of(ratios) if ratios else None


def loss_differences(ours: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Loss of each step, ours minus the other's, the warm-up's too; both have the same pairs in each."""
    return [a["loss"] - b["loss"] for a, b in zip(ours["steps"], other["steps"], strict=True)]


def report(folder: Path, setting: Setting, places: Sequence[Place]) -> None:
    """Print what the finished runs say."""
    everything = {place: runs for place in places if (runs := place.runs())}
    if not everything:
        sys.exit(f"There is no finished run in {folder}.")
    print("\n".join(_heading(setting, everything)))
    for place, runs in everything.items():
        print(f"\n## {place.data}, {place.dtype}\n")
        print("\n".join(_section(place, setting, runs)))


def _heading(setting: Setting, everything: Mapping[Place, Any]) -> Iterator[str]:
    runs = [run for rows in everything.values() for repeats in rows.values() for run in repeats.values()]
    distinct: dict[str, None] = {}
    for run in runs:
        found = run["environment"]
        distinct[f"{versions(found)}; {found['hardware']}; commit {found['commit']}"] = None
    model = setting.model if setting.random_llama is None else f"random Llama {setting.random_llama}"
    yield from distinct
    yield f"{model}; {setting.threads} threads; {setting.pairs_per_step} pairs a step, of at most {setting.max_tokens}"
    yield f"tokens with the prompt; {setting.steps - 1} steps measured after one of warm-up."


def _section(place: Place, setting: Setting, runs: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    rows = read_lines(place.pairs)
    measured = rows[setting.pairs_per_step :]
    speeds = {row: {repeat: speed(run) for repeat, run in repeats.items()} for row, repeats in runs.items()}
    yield f"{len(measured)} pairs: {real_tokens(measured)} real tokens, {shared_tokens(measured)} with shared prompts,"
    yield f"{padded_tokens(measured, setting.pairs_per_step)} padded in batches of {setting.pairs_per_step} in order.\n"
    yield from _speed_table(setting, runs, speeds)
    if OURS in runs:
        yield from _ratio_table(runs, speeds)
        yield from _floor(place, setting, measured, speeds[OURS])
        yield from _losses(runs, speeds)
    loads = [
        f"{row}.{repeat} {_load_text(run['load'])}"
        for row, repeats in runs.items()
        for repeat, run in sorted(repeats.items())
    ]
    yield f"\nLoad average, and cores in use, at each run's start (* more than {BUSY:g}): {'; '.join(loads)}."


def _speed_table(
    setting: Setting, runs: Mapping[str, Mapping[int, Any]], speeds: Mapping[str, Mapping[int, Speed]]
) -> Iterator[str]:
    size = setting.pairs_per_step
    lines = []
    for row, found in speeds.items():
        some = next(iter(runs[row].values()))
        batch = f", batches of {some['batch_size']}" if row == TUNED else ""
        peaks = ["peak_rss", "peak_gpu"] if some["peak_gpu"] is not None else ["peak_rss"]
        references = [run["reference"] for run in runs[row].values() if run["reference"] is not None]
        lines.append(
            [
                row + batch,
                Spread.of(s.tokens_per_second for s in found.values()).text(".0f"),
                Spread.of(s.pairs / s.wall for s in found.values()).text(".2f"),
                Spread.of(s.wall * size / s.pairs for s in found.values()).text(".2f"),
                Spread.of(s.cpu * size / s.pairs for s in found.values()).text(".2f"),
                " / ".join(Spread.of(run[p] / 1e9 for run in runs[row].values()).text(".2f") for p in peaks),
                f"{Spread.of(r['wall'] for r in references).text('.2f')} / {references[0]['pairs']}"
                if references
                else "in the steps",
                Spread.of(r["tokens"] / r["wall"] for r in references).text(".0f") if references else "",
            ]
        )
    head = [
        "row",
        "real tokens/s",
        "pairs/s",
        f"wall s / {size} pairs",
        f"CPU s / {size} pairs",
        "peak RSS (/ GPU), GB",
    ]
    yield table([*head, "reference pass, s / its pairs", "its real tokens/s"], lines)


def _ratio_table(runs: Mapping[str, Mapping[int, Any]], speeds: Mapping[str, Mapping[int, Speed]]) -> Iterator[str]:
    lines = []
    for row in speeds:
        found = {
            "speed": {name: {k: s.tokens_per_second for k, s in speeds[name].items()} for name in (OURS, row)},
            "cpu": {name: {k: s.tokens / s.cpu for k, s in speeds[name].items()} for name in (OURS, row)},
            "rss": {name: {k: run["peak_rss"] for k, run in runs[name].items()} for name in (OURS, row)},
            "reference": {
                name: {
                    k: run["reference"]["tokens"] / run["reference"]["wall"]
                    for k, run in runs[name].items()
                    if run["reference"] is not None
                }
                for name in (OURS, row)
            },
        }
        ratios = [paired_ratios(values[OURS], values[row]) for values in found.values()]
        if row != OURS and ratios[0] is not None:
            lines.append([row, *("" if ratio is None else ratio.text(".2f") for ratio in ratios)])
    if lines:
        yield "\nOurs over TRL's, median of the repeats (least–most):\n"
        yield table(["against", "tokens/s", "tokens per CPU second", "peak RSS", "reference tokens/s"], lines)


def _floor(place: Place, setting: Setting, measured: Rows, ours: Mapping[int, Speed]) -> Iterator[str]:
    if not place.gemm.is_file():
        return
    shape = ModelShape.from_json(json.loads((place.folder / "model.json").read_text())["shape"])
    rate = json.loads(place.gemm.read_text())["gflops_per_second"]
    counted = flops(shape, map(lengths_of, measured))
    seconds = counted / (rate * 1e9)
    share = Spread.of(seconds / found.wall for found in ours.values())
    steps = setting.steps - 1
    yield (
        f"\nFloor: {counted / steps / 1e9:.0f} GFLOP a step at {rate:.0f} GFLOP/s, this machine's rate for these "
        f"matrix products, are {seconds / steps:.2f} s; ours reaches {share.text('.0%')} of it."
    )


def _losses(runs: Mapping[str, Mapping[int, Any]], speeds: Mapping[str, Mapping[int, Speed]]) -> Iterator[str]:
    ours = runs[OURS][min(runs[OURS])]
    in_order = {row: repeats[min(repeats)] for row, repeats in runs.items() if row != TUNED}
    lines = [
        [row, *(f"{step['loss']:.4f}" for step in run["steps"]), _difference_text(row, ours, run)]
        for row, run in in_order.items()
    ]
    yield "\nLoss of each step, first repeat:\n"
    yield table(["row", *(str(n + 1) for n in range(len(ours["steps"]))), "max abs. Δ to ours"], lines)
    if TUNED in speeds:
        means = {row: speeds[row][min(speeds[row])].mean_loss for row in (OURS, TUNED)}
        yield f"\nMean loss of the measured pairs: ours {means[OURS]:.4f}, {TUNED} {means[TUNED]:.4f} in another order."


def _difference_text(row: str, ours: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    return "" if row == OURS else f"{max(map(abs, loss_differences(ours, run))):.1e}"


def _load_text(load: Mapping[str, Any]) -> str:
    busy = load["busy_cores"]
    return f"{load['average']:.2f}" + ("" if busy is None else f", {busy:.2f}{'*' if busy > BUSY else ''}")
