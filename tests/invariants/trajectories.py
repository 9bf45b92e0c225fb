"""The same 20 steps, laid out in different ways: what of it is to be the same, and how near it comes.

python -m tests.invariants.trajectories             prints the table
python -m tests.invariants.trajectories --record    writes reference.json anew: only where a change is meant
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_ray.pairs import TokenizedPair
from tests.training import Gang, Trained, random_pairs, run, scored, small_model

REFERENCE = Path(__file__).with_name("reference.json")
HALF, STEPS = 10, 20


@dataclass(frozen=True)
class Layout:
    """How a run is laid out; none of it may matter."""

    workers: int = 1
    options: dict[str, Any] = field(default_factory=dict)


BASELINE = "one worker, 1 micro-batch of 8"
LAYOUTS = {
    BASELINE: Layout(1, {"tokens_per_microbatch": 10_000}),
    "one worker, 8 micro-batches of 1": Layout(1, {"tokens_per_microbatch": 1}),
    "padded, not packed": Layout(1, {"packed": False}),
    "activation checkpointing": Layout(1, {"activation_checkpointing": True}),
    "2 workers, DDP": Layout(2),
    "2 workers, FSDP2": Layout(2, {"strategy": "fsdp"}),
    "2 workers, FSDP2, padded, activation checkpointing": Layout(
        2, {"strategy": "fsdp", "packed": False, "activation_checkpointing": True}
    ),
}
COUPLED = ("one worker, 8 micro-batches of 1", "2 workers, DDP", "2 workers, FSDP2")
"""Those tried with losses that take something from the whole batch, or from the steps before."""
COMPARED = [
    *(("sigmoid", layout, BASELINE) for layout in LAYOUTS if layout != BASELINE),
    ("sigmoid", "2 workers, FSDP2", "2 workers, DDP"),
    *((loss, layout, BASELINE) for loss in ("aot", "kto", "bco_pair") for layout in COUPLED),
]
LOSSES = ("sigmoid", "aot", "kto", "bco_pair")


class Trajectories:
    """Trains each layout once, when first asked, on 40 pairs that come round four times."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = small_model(folder / "model")
        self.pairs: list[TokenizedPair] = scored(random_pairs(40), self.model) * 4
        self._gang: Gang | None = None
        self._done: dict[str, Trained] = {}

    @property
    def gang(self) -> Gang:
        """Two workers."""
        self._gang = self._gang or Gang(2, self.folder / "store")
        return self._gang

    def end(self) -> None:
        if self._gang is not None:
            self._gang.end()

    def of(self, loss: str, layout: str, *, resumed_from: str | None = None) -> Trained:
        """The run of a layout; or from its half on, where another layout's run had come to."""
        name = f"{loss}/{layout}/{resumed_from}"
        if name not in self._done:
            resume = self.of(loss, resumed_from).last.with_name(f"step-{HALF}") if resumed_from else None
            self.train(LAYOUTS[layout], self.folder / name, resume=resume, loss={"type": loss, "beta": 0.1})
            self._done[name] = Trained(self.folder / name)
        return self._done[name]

    def train(self, layout: Layout, folder: Path, pairs: list[TokenizedPair] | None = None, **options: Any) -> None:
        """Any run in a layout."""
        start = run if layout.workers == 1 else self.gang.run
        start(self.model, pairs or self.pairs, folder, **{"checkpoint_every_steps": HALF} | layout.options | options)


def differences(got: list[float], expected: list[float]) -> tuple[float, float]:
    """Largest and mean |Δ| over the steps."""
    apart = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    return max(apart), sum(apart) / len(apart)


def read_reference() -> dict[str, list[float]]:
    """The baseline's losses, by the loss's name, as they were recorded."""
    return json.loads(REFERENCE.read_text())


def table(trajectories: Trajectories) -> str:
    """What is compared, in Markdown."""
    lines = ["| loss | run | compared with | largest \\|Δloss\\| | mean \\|Δloss\\| |", "|---|---|---|---|---|"]

    def add(loss: str, run_name: str, other: str, got: list[float], expected: list[float]) -> None:
        largest, mean = differences(got, expected)
        lines.append(f"| {loss} | {run_name} | {other} | {largest:.1e} | {mean:.1e} |")

    for loss, layout, other in COMPARED:
        add(loss, layout, other, trajectories.of(loss, layout).losses, trajectories.of(loss, other).losses)
    for loss in LOSSES:
        add(loss, BASELINE, "reference.json", trajectories.of(loss, BASELINE).losses, read_reference()[loss])
    return "\n".join(lines)


def record(trajectories: Trajectories) -> None:
    """Write the baselines' losses."""
    losses = {loss: [round(x, 7) for x in trajectories.of(loss, BASELINE).losses] for loss in LOSSES}
    lines = [f"{json.dumps(loss)}: {json.dumps(values)}" for loss, values in losses.items()]
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        both = Trajectories(Path(scratch))
        try:
            if "--record" in sys.argv:
                record(both)
            else:
                print(table(both))
        finally:
            both.end()
