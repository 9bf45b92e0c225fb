"""The training loop, as one worker runs it. No Ray here: pairs come in as steps, metrics go out by `report`.

B pairs of a micro-batch; N completion tokens.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dpo_ray.checkpoint import load_checkpoint, save_checkpoint
from dpo_ray.config import Loss, Model, Train
from dpo_ray.errors import DataError, DpoRayError
from dpo_ray.losses import PairLogps, pair_loss, rewards, sum_by_sequence
from dpo_ray.model import CompletionScorer, load_policy, load_tokenizer, resolve, torch_dtype
from dpo_ray.optim import learning_rate, make_optimizer
from dpo_ray.packing import MicroBatch
from dpo_ray.pairs import TokenizedPair
from dpo_ray.progress import Progress

EXPORT = "export"
"""Folder of the trained model, in Hugging Face's format, inside the last checkpoint."""


@dataclass(frozen=True)
class Step:
    """What one rank computes in an optimizer step."""

    number: int
    microbatches: list[list[TokenizedPair]]


@dataclass(frozen=True)
class Rank:
    """Who this worker is."""

    rank: int
    world_size: int
    device: torch.device


class Report(Protocol):
    """Takes the metrics of the last step and, on rank 0, the folder of a checkpoint to keep.

    Every rank calls it when a checkpoint is due; it returns when the checkpoint is safe.
    """

    def __call__(self, metrics: dict[str, Any], checkpoint: Path | None) -> None: ...


def train(
    model: Model,
    config: Train,
    *,
    seed: int,
    num_steps: int,
    pairs_per_epoch: int,
    me: Rank,
    steps_from: Callable[[int], Iterable[Step]],
    report: Report,
    resume: Path | None,
) -> None:
    """Train the policy from its start, or from a checkpoint folder, to the last step.

    Args:
        num_steps: optimizer steps over all epochs.
        steps_from: given a step, this rank's share of it and of all that follow, in order.
        resume: folder of the checkpoint to go on from.
    """
    torch.manual_seed(seed + me.rank)
    folder = resolve(model.path, model.revision)
    policy = load_policy(folder, trust_remote_code=model.trust_remote_code).to(me.device)
    scorer = CompletionScorer(policy, torch_dtype(model.dtype)).train()
    optimizer = make_optimizer(policy, config)
    start = 0
    history: list[dict[str, Any]] = []
    if resume is not None:
        start, history = load_checkpoint(resume, model=policy, optimizer=optimizer)
    forward = DistributedDataParallel(scorer) if me.world_size > 1 else scorer
    progress = Progress("train", num_steps, "steps", done=start)
    num_tokens = history[-1]["num_tokens"] if history else 0

    if start == num_steps:
        return  # the last checkpoint is already kept; only its publication was interrupted
    for step in steps_from(start):
        began = time.monotonic()
        rate = learning_rate(step.number, num_steps, config)
        metrics = _optimizer_step(forward, scorer, optimizer, step, config, rate, me)
        num_tokens += metrics["num_tokens"]
        metrics |= {
            "step": step.number + 1,
            "epoch": (step.number + 1) * config.global_batch_size / pairs_per_epoch,
            "learning_rate": rate,
            "tokens_per_second": metrics["num_tokens"] / (time.monotonic() - began),
            "num_tokens": num_tokens,
        }
        last = step.number + 1 == num_steps
        checkpoint_due = last or (step.number + 1) % config.checkpoint_every_steps == 0
        if checkpoint_due or (step.number + 1) % config.log_every_steps == 0:
            history.append(metrics)
        if me.rank == 0:
            progress.advance(
                1,
                f"loss {metrics['loss']:.4f} · accuracy {metrics['rewards/accuracies']:.2f} · "
                f"{metrics['tokens_per_second']:.0f} tokens/s",
            )
        if not checkpoint_due:
            continue
        if me.rank != 0:
            report(metrics, None)
            continue
        with tempfile.TemporaryDirectory(prefix="dpo-ray-checkpoint-") as scratch:
            save_checkpoint(
                Path(scratch), model=policy, optimizer=optimizer, next_step=step.number + 1, history=history
            )
            if last:
                policy.save_pretrained(Path(scratch) / EXPORT)
                tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
                tokenizer.save_pretrained(Path(scratch) / EXPORT)
            report(metrics, Path(scratch))


def _optimizer_step(
    forward: torch.nn.Module,
    scorer: CompletionScorer,
    optimizer: torch.optim.Optimizer,
    step: Step,
    config: Train,
    rate: float,
    me: Rank,
) -> dict[str, float]:
    """Forward, backward and update over exactly one global batch. Returns metrics averaged over its pairs."""
    sums = torch.zeros(len(_SUMMED), dtype=torch.float64, device=me.device)
    for i, pairs in enumerate(step.microbatches):
        last = i == len(step.microbatches) - 1
        with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext():
            batch = scorer.collate(pairs).to(me.device)
            logps = pair_logps(forward(batch), batch, pairs)
            losses = pair_loss(config.loss, logps)
            # DDP averages gradients over ranks; times world_size the sum over all ranks is over the global batch.
            (losses.sum() * me.world_size / config.global_batch_size).backward()
        sums += _sums(config.loss, losses, logps, pairs)
    if me.world_size > 1:
        dist.all_reduce(sums)
    for group in optimizer.param_groups:
        group["lr"] = rate
    grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
    values = dict(zip(_SUMMED, sums.tolist(), strict=True))
    _require_finite(step, values["loss"], float(grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        **{name: values[name] / config.global_batch_size for name in _SUMMED if name != "num_tokens"},
        "num_tokens": int(values["num_tokens"]),
        "grad_norm": float(grad_norm),
    }


def pair_logps(token_logprobs: Tensor, batch: MicroBatch, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """Token log-probs [N] of a micro-batch, with the stored reference log-probs of its pairs, as sums [B]."""
    sums = sum_by_sequence(token_logprobs, batch.sequence_index, 2 * batch.num_pairs)

    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=token_logprobs.device)

    return PairLogps(
        policy_chosen=sums[0::2],
        policy_rejected=sums[1::2],
        ref_chosen=tensor([_reference_sum(p, p.chosen_ref_logprobs) for p in pairs]),
        ref_rejected=tensor([_reference_sum(p, p.rejected_ref_logprobs) for p in pairs]),
        num_chosen_tokens=tensor([len(p.chosen_ids) for p in pairs]),
        num_rejected_tokens=tensor([len(p.rejected_ids) for p in pairs]),
    )


def _reference_sum(pair: TokenizedPair, logprobs: list[float] | None) -> float:
    if logprobs is None:
        raise DataError(f"Pair {pair.pair_id} has no reference log-probs: train on a finished reference artifact.")
    return math.fsum(logprobs)


_SUMMED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "num_tokens",
)


def _sums(loss: Loss, losses: Tensor, logps: PairLogps, pairs: Sequence[TokenizedPair]) -> Tensor:
    """Sums over a micro-batch of what is reported, in the order of _SUMMED."""
    chosen, rejected = rewards(loss, logps)
    per_pair = (
        losses.detach(),
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).float(),
        logps.policy_chosen.detach(),
        logps.policy_rejected.detach(),
    )
    # As the field counts them: the prompt once for chosen and once for rejected, however often it was computed.
    num_tokens = sum(p.num_tokens + len(p.prompt_ids) for p in pairs)
    return torch.stack([*(x.double().sum() for x in per_pair), losses.new_tensor(num_tokens).double()])


def _require_finite(step: Step, loss: float, grad_norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    ids = [p.pair_id for pairs in step.microbatches for p in pairs]
    raise DpoRayError(
        f"Step {step.number + 1}: loss {loss}, gradient norm {grad_norm}. The parameters were left as they were. This "
        f"rank's pairs in the step: {', '.join(ids[:8])}{', …' if len(ids) > 8 else ''}. Lower train.learning_rate, "
        "train in float32, or look at these pairs; the last checkpoint is kept."
    )
