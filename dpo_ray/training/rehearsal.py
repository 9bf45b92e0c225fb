"""Whether the longest pair fits into the workers' memory, found out before the first step.

On a GPU it is tried: one micro-batch of it and another one, as in an optimizer step, after which all is as it was. On a
CPU, where a process that takes too much is killed without a word, it is estimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor

from dpo_ray.config import Model
from dpo_ray.errors import DataError, PairTooLong
from dpo_ray.model import attention
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.progress import say
from dpo_ray.training.files import KIND
from dpo_ray.training.longest import LongestPair
from dpo_ray.training.memory import bytes_per_token, moment_bytes, pair_bytes, room_beside_state, shape_of
from dpo_ray.training.parallel import Rank, gathered_objects
from dpo_ray.training.step import Learner

_GIB = 2**30
_PATIENCE = timedelta(minutes=5)  # for ranks that are slower
_tries = itertools.count()  # of this process: ranks come to the same ones in the same order

_WAYS_OUT = (
    "Lower data.max_prompt_tokens or data.max_completion_tokens, or use train.strategy=fsdp with more workers, "
    "train.activation_checkpointing=true, model.dtype=bfloat16, train.optimizer=adamw_8bit, model.lora, or workers "
    "with more memory."
)


def require_that_it_fits(learner: Learner, longest: LongestPair, model: Model, memory: int) -> None:
    """Every rank calls it, before its first step.

    Args:
        memory: bytes of this rank.

    Raises PairTooLong on every rank alike where the pair does not fit, on a CPU only where the size of micro-batches is
    train.tokens_per_microbatch=auto: who sets a number may know better than the estimate, and is warned. Raises
    DataError on one rank where memory ran out while others wait for it.
    """
    if learner.me.device.type == "cuda":
        try_out(learner, longest)
    else:
        estimate(learner, longest, model, memory)


def estimate(learner: Learner, longest: LongestPair, model: Model, memory: int) -> None:
    """By the model's shape, the rank with the least room counts. Raises PairTooLong on every rank alike, or warns."""
    options, me = learner.options, learner.me
    shape = shape_of(ModelFolder.of(model))
    room = room_beside_state(shape, model, options, memory=memory, num_workers=me.world_size)
    room, memory = min(gathered_objects((room, memory), me))
    policy = learner.scorer.model
    needed = pair_bytes(
        shape, model, options, longest.pair, policy.config._attn_implementation,
        window=attention.window_of(policy.config), stepwise=attention.is_stepwise(policy),
    )  # fmt: skip
    if needed <= room:
        return
    fits = max(0, int(room // bytes_per_token(shape, model, options)))
    told = (
        f"By the model's shape, {longest.described()} needs {needed / _GIB:.2f} GiB to train on alone; a worker has "
        f"{memory / _GIB:.1f} GiB, of which {max(0.0, room) / _GIB:.2f} are left beside weights, gradients and "
        f"optimizer: about {fits} tokens."
    )
    if options.tokens_per_microbatch == "auto":
        raise PairTooLong(
            f"{told} {_WAYS_OUT} If you know that it fits, set train.tokens_per_microbatch to a number: the estimate "
            "then only warns."
        )
    if me.rank == 0:
        say(KIND, f"{told} It is tried all the same, for train.tokens_per_microbatch is set. {_WAYS_OUT}")


def try_out(learner: Learner, longest: LongestPair) -> None:
    """Compute the pair as a step would, and leave all as it was: weights, gradients, random state.

    Raises PairTooLong on every rank alike where it ran out of memory on some; DataError on such a one where others do
    not come to tell how it went, for they wait in an exchange.
    """
    me = learner.me
    failure = None
    try:
        with _moments(learner):
            learner.rehearse(longest.pair)
    except torch.OutOfMemoryError as error:
        failure = f"rank {me.rank}: {' '.join(str(error).split())[:300]}"
    learner.optimizer.zero_grad(set_to_none=True)
    if me.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        failures = [found for found in _told_by_all(failure or "", me) if found]
    except dist.DistError as error:
        if failure is None:
            raise
        raise DataError(_too_long(longest, failure)) from error
    if failures:
        raise PairTooLong(_too_long(longest, failures[0]))
    if me.rank == 0:
        say(KIND, f"there is memory for {longest.described()}: it was tried")


@contextmanager
def _moments(learner: Learner) -> Iterator[None]:
    """Takes the memory that AdamW will take at the first step."""
    trained = [p for p in learner.scorer.parameters() if p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    missing = 0 if learner.optimizer.state else int(moment_bytes(learner.options) * sum(p.numel() for p in local))
    taken = torch.empty(missing, dtype=torch.uint8, device=local[0].device)  # the host's, under train.offload
    yield
    del taken


def _told_by_all(value: str, me: Rank) -> list[str]:
    """A value of every rank. Not by the ranks' own exchanges, in which those may wait that had memory.

    Raises DistError where one does not tell within some minutes.
    """
    if me.world_size == 1:
        return [value]
    store, number = _get_default_store(), next(_tries)
    names = [f"dpo-ray/longest-pair/{number}/{rank}" for rank in range(me.world_size)]
    store.set(names[me.rank], value)
    store.wait(names, _PATIENCE)
    return [store.get(name).decode() for name in names]


def _too_long(longest: LongestPair, failure: str) -> str:
    return f"Memory does not suffice to train on {longest.described()}, alone in a micro-batch ({failure}). {_WAYS_OUT}"
