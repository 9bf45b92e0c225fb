"""The same 20 steps, laid out in different ways: what of it is to be the same, and how near it comes.

python -m tests.invariants.trajectories             prints the table
python -m tests.invariants.trajectories --record    writes reference.json anew: only where a change is meant
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_ray.pairs import TokenizedPair
from tests import gradients, rounding
from tests.training import Gang, Trained, random_pairs, run, scored, small_model

REFERENCE = Path(__file__).with_name("reference.json")
HALF, STEPS = 10, 20
BETA = 0.1

TOKENS = 8  # of a completion, at most
LOGPROB = TOKENS * rounding.ulps(1, math.log(512))
"""How far a completion's log-prob may be from itself in another order of summation: each token by an ulp, all to one
side. In a mean over the pairs of a batch that leaves room for several ulps a token: they go either way."""
LOSS = BETA / 2 * 2 * LOGPROB + rounding.ulps(1, 1)
"""The same of a loss: it moves by β/2 of either completion's log-prob, and is itself below 2. It is 5e-7."""


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
            self.train(LAYOUTS[layout], self.folder / name, resume=resume, loss={"type": loss, "beta": BETA})
            self._done[name] = Trained(self.folder / name)
        return self._done[name]

    def train(self, layout: Layout, folder: Path, pairs: list[TokenizedPair] | None = None, **options: Any) -> None:
        """Any run in a layout: with a smooth AdamW, on gradients most of which are clipped, and which are kept."""
        start = run if layout.workers == 1 else self.gang.run
        always = {"checkpoint_every_steps": HALF, "learning_rate": 2e-3, "max_grad_norm": 0.5, "record_gradients": True}
        start(self.model, pairs or self.pairs, folder, **always | layout.options | options)


def differences(got: list[float], expected: list[float]) -> tuple[float, float]:
    """Largest and mean |Δ| over the steps."""
    apart = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    return max(apart), sum(apart) / len(apart)


def require_equal(got: list[float], expected: list[float], bound: float) -> None:
    """Step by step."""
    largest, _ = differences(got, expected)
    assert largest <= bound, f"largest |Δ| {largest:.2g}, over {bound:.2g}"


def require_same(got: Trained, expected: Trained) -> None:
    """The same run but for rounding: its losses, and all that it learnt from; one that was resumed from there on."""
    found = got.gradients
    gradients.require_same(found, expected.gradients[-len(found) :])
    mine, other = ([m for m in trained.metrics if "loss" in m] for trained in (got, expected))
    require_equal([m["loss"] for m in mine], [m["loss"] for m in other], LOSS)
    norms = [m["grad_norm"] for m in other]
    require_equal([m["grad_norm"] for m in mine], norms, rounding.GRADIENT * max(norms))


def require_same_weights(got: Trained, expected: Trained, start: dict[str, torch.Tensor]) -> None:
    """Moved from the start by the same, but for the rounding of gradients, and of weights once a step."""
    steps = len(expected.gradients)
    for name, value in expected.weights.items():
        apart, moved = (got.weights[name] - value).norm(), (value - start[name]).norm()
        # A step is a quotient of two averages of gradients, either of which is rounded.
        assert apart <= 2 * rounding.GRADIENT * moved + 2 * steps * 2**-24 * value.norm(), (name, apart, moved)


def read_reference() -> dict[str, list[float]]:
    """The baseline's losses, by the loss's name, as they were recorded."""
    return json.loads(REFERENCE.read_text())


def table(trajectories: Trajectories) -> str:
    """What is compared, in Markdown."""
    lines = [
        "| loss | run | compared with | largest \\|Δloss\\| | mean \\|Δloss\\| | largest ‖Δg‖ / ‖g‖ of a parameter |",
        "|---|---|---|---|---|---|",
    ]
    for loss, layout, other in COMPARED:
        one, two = trajectories.of(loss, layout), trajectories.of(loss, other)
        largest, mean = differences(one.losses, two.losses)
        apart, _, _ = gradients.furthest(one.gradients, two.gradients)
        lines.append(f"| {loss} | {layout} | {other} | {largest:.1e} | {mean:.1e} | {apart:.1e} |")
    for loss in LOSSES:
        largest, mean = differences(trajectories.of(loss, BASELINE).losses, read_reference()[loss])
        lines.append(f"| {loss} | {BASELINE} | reference.json | {largest:.1e} | {mean:.1e} | |")
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
