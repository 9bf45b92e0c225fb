"""Our side: dpo_ray.training.loop.train on reference log-probs of our own scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.record import OUR_PACKAGES, Rows, read_lines
from benchmarks.side_by_side import SEED, NoCheckpoints, train_options, with_reference
from benchmarks.speed.clock import Clock, device, machine_load
from benchmarks.speed.inputs import model_of
from benchmarks.speed.pairs import real_tokens
from benchmarks.speed.runs import BETA, OURS, Place, Setting, kept_steps, write_run


def run_ours(place: Place, setting: Setting, repeat: int) -> None:
    """A run of ours, kept."""
    load = machine_load()
    measured = train_ours(place, setting, read_lines(place.pairs), setting.pairs_per_step)
    write_run(place.run(OURS, repeat), load, OUR_PACKAGES, measured)


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
    import torch

    from dpo_ray.bins import first_fit
    from dpo_ray.config import Model
    from dpo_ray.model.pair_scorer import TorchScorer
    from dpo_ray.pairs import TokenizedPair
    from dpo_ray.storage.location import Location
    from dpo_ray.training.batch import Share, Step
    from dpo_ray.training.loop import train
    from dpo_ray.training.parallel import Rank

    torch.set_num_threads(setting.threads)
    clock = Clock()
    model = Model(path=model_of(place.folder, setting)[0], dtype=place.dtype)
    unscored = [TokenizedPair(f"{n}", **row) for n, row in enumerate(rows)]
    scorer = TorchScorer(model)
    clock.start()
    scores = scorer.score(unscored)
    reference = {**clock.stop(), "pairs": len(rows), "tokens": real_tokens(rows)}
    del scorer
    pairs = with_reference(unscored, scores)
    num_steps = len(pairs) // pairs_per_step
    times: list[dict[str, float]] = []

    def steps_from(start: int) -> Iterator[Step]:
        for number in range(start, num_steps):
            members = pairs[number * pairs_per_step : (number + 1) * pairs_per_step]
            groups = first_fit([pair.num_tokens for pair in members], setting.microbatch_tokens)
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
        me=Rank(0, 1, torch.device(device())),
        steps_from=steps_from,
        held_out=None,
        checkpoints=NoCheckpoints(),
        export_to=Location.of(place.folder / "model"),
        resume=None,
        require_reference=None,
    )
    losses = [entry["loss"] for entry in state.history]
    return {"reference": reference, "steps": kept_steps(times, losses, rows, pairs_per_step, 1)}
