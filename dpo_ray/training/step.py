"""One optimizer step over exactly one global batch, and the same forward for held-out pairs.

B pairs of a micro-batch, G of the global batch; N completion tokens. The result does not depend on how a step is
cut into micro-batches or spread over ranks: losses are summed and divided by G. A pair of weight 2 is two pairs: in the
loss and its gradient, in what a loss takes from the whole batch, and in what is reported of a step. Held-out pairs
count once each, as in the evaluation that a model is published by; only their loss is weighted as it is in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dpo_ray.config import Train
from dpo_ray.data.pairing import mismatched
from dpo_ray.errors import DataError, NonFiniteLoss
from dpo_ray.losses.formulas import kl_estimate
from dpo_ray.losses.objective import BatchTerms, pair_loss
from dpo_ray.losses.pair_logps import PairLogps, pair_logps
from dpo_ray.model.logprobs import TokenScores
from dpo_ray.model.policy import CompletionScorer
from dpo_ray.model.routing import Routing
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.balance import Balance, added, balance_coefficient, nothing, over_ranks, told
from dpo_ray.training.batch import Share
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.files import SKIPPED
from dpo_ray.training.optim import WeightAverage, set_learning_rate
from dpo_ray.training.pair_metrics import (
    PairSums,
    Statistics,
    batch_metrics,
    comparable,
    per_pair,
    statistics_of,
    weighted,
    weights_of,
)
from dpo_ray.training.parallel import (
    Rank,
    accumulating,
    clip_grad_norm,
    forget_gathered,
    gathered,
    gathered_objects,
)

RequireReference = Callable[[list[np.ndarray]], None]
"""Given log π − log π_ref of the tokens of each completion of a global batch, in nats; raises ReferenceMismatch where
these are not of one model."""


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step came to, over the global batch."""

    num_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    """Averages over the pairs; of a step that was skipped there are none."""
    skipped_pairs: tuple[str, ...] = ()
    """Ids of the step's pairs where its loss or gradient was not finite, and the weights were left as they are."""

    @property
    def skipped(self) -> bool:
        return bool(self.skipped_pairs)

    def record(self) -> dict[str, Any]:
        """The step's own part of its line in metrics.jsonl."""
        skipped = {SKIPPED: list(self.skipped_pairs)} if self.skipped else {}
        return {**skipped, **self.metrics, "num_tokens": self.num_tokens}


@dataclass
class Learner:
    """A policy in training on one rank."""

    forward: nn.Module
    """The scorer as gradients flow through it: wrapped for DDP, or the scorer itself."""
    scorer: CompletionScorer
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    options: Train
    me: Rank
    state: TrainState
    sources: tuple[str, ...] = ()
    """Of a mixture, those that metrics are told apart by."""

    def __post_init__(self) -> None:
        self.balance_coefficient = balance_coefficient(self.scorer, self.options)

    def step(
        self, share: Share, rate: float, require_reference: RequireReference | None, *, with_entropies: bool = False
    ) -> StepResult:
        """Forward, backward and update; where the loss or the gradient is not finite, the step is skipped.

        Args:
            rate: the learning rate.
            require_reference: called where policy and reference must still be the same; None where they need not be.
            with_entropies: report entropy and mean logits too.

        Raises what require_reference does, on every rank alike.
        """
        options, me = self.options, self.me
        total_weight = options.global_batch_size if share.batch_weight is None else share.batch_weight
        sums = PairSums(self.sources)
        terms = self._batch_terms(share)
        coupled = self._coupled(share, terms) if options.loss.couples_batch else None
        seen: list[tuple[Tensor, Tensor]] = []
        routes = self.scorer.routes
        parts: list[Routing] = []
        balance = self._balance(share) if self.balance_coefficient and len(share.microbatches) > 1 else None
        for number, pairs in enumerate(share.microbatches):
            with accumulating(self.forward, last=number == len(share.microbatches) - 1):
                scored = self._score(self.forward, pairs or [share.filler], with_entropies, with_routing=routes)
                logps = scored.logps
                if scored.routing is not None:
                    parts.append(scored.routing if pairs else nothing(scored.routing))
                    if self.balance_coefficient and balance is None:  # this micro-batch is the rank's whole share
                        balance = Balance(self.balance_coefficient, over_ranks(added(parts), me))
                if not pairs:
                    (0.0 * (logps.policy_chosen.sum() + logps.policy_rejected.sum())).backward()
                    continue
                if coupled is None:
                    losses = pair_loss(options.loss, logps, terms)
                    # Gradients are averaged over ranks; world_size times that is their sum over the global batch.
                    part = (weights_of(logps) * losses).sum() * (me.world_size / total_weight)
                else:
                    losses, surrogate = coupled.of(logps, first=sums.num_pairs)
                    part = surrogate * me.world_size
                if balance is not None and scored.routing is not None:
                    part = part + balance.part(scored.routing) * me.world_size
                part.backward()
            values = per_pair(options, losses, logps) | weighted(scored.statistics, logps)
            sums.add(values, len(pairs), scored.num_tokens, self._places(pairs))
            if require_reference is not None:
                assert scored.token_logratios is not None
                counts = torch.stack([logps.num_chosen_tokens, logps.num_rejected_tokens], dim=1)
                seen.append((scored.token_logratios, counts.flatten().long()))
        if require_reference is not None:
            require_reference(self._everywhere(seen))
        totals = sums.over_ranks(me)
        experts = told(over_ranks(added(parts), me)) if parts else {}
        set_learning_rate(self.optimizer, rate)
        grad_norm = clip_grad_norm(self.scorer.parameters(), options.max_grad_norm)
        if not (math.isfinite(totals.mean("loss")) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            return StepResult(totals.num_tokens, skipped_pairs=self._ids(share))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        if options.loss.tracks_reward_mean:
            for side in ("rewards/chosen", "rewards/rejected"):
                total, count = totals.total_and_count(side)
                self.state.reward_sum += total
                self.state.reward_count += count
        metrics = {**totals.means(), **batch_metrics(options, terms), **experts, "grad_norm": grad_norm}
        return StepResult(totals.num_tokens, metrics)

    def rehearse(self, pair: TokenizedPair) -> None:
        """Two micro-batches of this pair alone, forward and backward as in a step; weights and random state stay.

        What memory a step takes is then known: in the second one gradients lie beside what the backward pass needs.
        Every rank calls it with the same pair.
        """
        # Replicas need no exchange for it: a rank that runs out of memory is then missed by none.
        sharded = isinstance(self.forward, FSDPModule)
        module = self.forward if sharded else self.scorer
        with torch.random.fork_rng([self.me.device] if self.me.device.type == "cuda" else []):
            for last in (False, sharded):
                with accumulating(module, last=last):
                    logps = self._score(module, [pair], self.options.entropy_every_steps is not None).logps
                    (0.0 * (logps.policy_chosen.sum() + logps.policy_rejected.sum())).backward()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, share: Share) -> dict[str, float]:
        """Metrics over held-out pairs, `eval_` before their names. A loss that couples a batch couples all of them.

        Raises NonFiniteLoss, on every rank alike, where the loss is not finite.
        """
        self.scorer.eval()
        everything, _, statistics = self._global_logps(share, with_entropies=True)
        terms = self._batch_terms(share)
        self.scorer.train()
        forget_gathered(self.forward)
        losses = pair_loss(self.options.loss, everything, terms)
        sums = PairSums(self.sources)
        places = torch.cat(gathered(self._places(share.pairs), self.me)) if self.sources else self._places(())
        values = per_pair(self.options, losses, replace(everything, weight=None)) | statistics
        weights = weights_of(everything)
        values["loss"] = (weights * losses, weights)
        sums.add(values, len(losses), 0, places)
        means = {
            **sums.means(),
            **batch_metrics(self.options, terms),
            **comparable(self.options, everything),
        }
        if not all(math.isfinite(value) for value in means.values()):
            raise NonFiniteLoss(
                f"The loss of the {len(losses)} held-out pairs is {means['loss']}. Lower train.learning_rate, or train "
                "in float32; the last checkpoint is kept."
            )
        return {f"eval_{name}": value for name, value in means.items()}

    def _score(
        self,
        module: nn.Module,
        pairs: Sequence[TokenizedPair],
        with_entropies: bool = False,
        *,
        with_routing: bool = False,
    ) -> _Scored:
        loss = self.options.loss
        batch = self.scorer.collate(list(pairs)).to(self.me.device)
        if loss.needs_reference and batch.reference_logprobs is None:
            raise DataError(
                f"Pair {pairs[0].pair_id} has no reference log-probs: train on a finished reference artifact."
            )
        reference = batch.reference_logprobs if loss.needs_reference else None
        asked = {"with_routing": True} if with_routing else {}
        scores: TokenScores = module(
            batch, with_collisions=loss.weights_by_policy, with_entropies=with_entropies, **asked
        )
        logps = pair_logps(
            scores.logprobs,
            batch.sequence_index,
            batch.num_pairs,
            ref_token_logprobs=reference,
            ld_alpha=loss.token_tail_weight,
            log_collisions=scores.log_collisions,
        )
        weight, margin, preference = torch.tensor(
            [[_or(p.weight, 1.0), _or(p.margin, 0.0), _or(p.preference, 1.0)] for p in pairs],
            dtype=scores.logprobs.dtype,
        ).T.to(self.me.device)
        logps = replace(logps, weight=weight, margin=margin, preference=preference)
        sides = [side for p in pairs for side in (p.chosen_ids, p.rejected_ids) if side]
        prompts = sum(len(p.prompt_ids) * (bool(p.chosen_ids) + bool(p.rejected_ids)) for p in pairs)
        ratios = scores.logprobs.detach() - reference if reference is not None else None
        num_tokens = prompts + sum(map(len, sides))
        return _Scored(logps, statistics_of(scores, batch, logps), num_tokens, ratios, scores.routing)

    @torch.no_grad()
    def _balance(self, share: Share) -> Balance:
        """How often the global batch's tokens choose each expert, before there are gradients."""
        parts = []
        for pairs in share.microbatches:
            routing = self._score(self.scorer, pairs or [share.filler], with_routing=True).routing
            assert routing is not None
            parts.append(routing if pairs else nothing(routing))
        return Balance(self.balance_coefficient, over_ranks(added(parts), self.me))

    @torch.no_grad()
    def _batch_terms(self, share: Share) -> BatchTerms:
        """What the loss takes from the whole batch, and from the steps before."""
        loss, state = self.options.loss, self.state
        kl: Tensor | float = 0.0
        if loss.needs_mismatched:
            ratios = [torch.zeros(0, 2, device=self.me.device)]
            for pairs in share.microbatches:
                rows = mismatched(pairs)
                scored = self._score(self.scorer, rows or [share.filler])
                if rows:
                    ratios.append(torch.stack([scored.logps.chosen_logratios, weights_of(scored.logps)], dim=1))
            everywhere = torch.cat(gathered(torch.cat(ratios), self.me))
            kl = kl_estimate(*everywhere.T) if len(everywhere) else 0.0
        mean = state.reward_sum / state.reward_count if loss.tracks_reward_mean and state.reward_count else 0.0
        return BatchTerms(kl=kl, reward_mean=mean)

    @torch.no_grad()
    def _global_logps(self, share: Share, with_entropies: bool = False) -> tuple[PairLogps, int, Statistics]:
        """Of all ranks' pairs, in the order of the ranks: log-probs, where this rank's begin, and statistics."""
        parts = []
        for pairs in share.microbatches:
            scored = self._score(self.scorer, pairs or [share.filler], with_entropies)
            if pairs:
                parts.append(scored.stacked())
        like = scored.stacked()
        mine = torch.cat(parts) if parts else like[:0]
        ranks = gathered(mine, self.me)
        logps, statistics = scored.unstacked(torch.cat(ranks))
        return logps, sum(len(part) for part in ranks[: self.me.rank]), statistics

    def _coupled(self, share: Share, terms: BatchTerms) -> _Coupled:
        """The loss over the whole global batch and its derivatives by each log-prob.

        A loss that couples pairs cannot be summed over micro-batches. So all log-probs are computed once without
        gradients; the loss is taken over all of them; and the chain rule then goes through each micro-batch with the
        derivatives of this loss (as in arXiv:2101.06983). It costs one more forward pass.
        """
        everything, first, _ = self._global_logps(share)
        leaves = {name: getattr(everything, name).clone().requires_grad_() for name in _POLICY_FIELDS}
        values = {f.name: getattr(everything, f.name) for f in fields(everything)}
        with torch.enable_grad():
            losses = pair_loss(self.options.loss, PairLogps(**{**values, **leaves}), terms)
            found = torch.autograd.grad(losses.mean(), list(leaves.values()), allow_unused=True)
        derivatives = {
            name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)
        }
        return _Coupled(losses.detach(), derivatives, first)

    def _everywhere(self, seen: list[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
        """All ranks' log-ratios of tokens, by completion; seen: a micro-batch's, and its completions' lengths."""
        ratios, lengths = (
            torch.cat(gathered(torch.cat([torch.zeros(0, dtype=dtype, device=self.me.device), *mine]), self.me)).cpu()
            for dtype, mine in (
                (torch.float32, [ratios for ratios, _ in seen]),
                (torch.long, [lengths for _, lengths in seen]),
            )
        )
        return np.split(ratios.numpy(), np.cumsum(lengths.numpy())[:-1])

    def _places(self, pairs: Sequence[TokenizedPair]) -> Tensor:
        """[B] which of the sources each pair is of, -1 of none."""
        places = {source: number for number, source in enumerate(self.sources)}
        return torch.tensor([places.get(p.source or "", -1) for p in pairs], dtype=torch.long, device=self.me.device)

    def _ids(self, share: Share) -> tuple[str, ...]:
        return tuple(i for ids in gathered_objects([p.pair_id for p in share.pairs], self.me) for i in ids)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


_POLICY_FIELDS = ("policy_chosen", "policy_rejected", "mean_chosen", "mean_rejected")


@dataclass(frozen=True)
class _Coupled:
    """A loss over the global batch: its values [G], and its mean's derivatives by each log-prob, each [G]."""

    losses: Tensor
    derivatives: dict[str, Tensor]
    first: int
    """Where this rank's pairs begin."""

    def of(self, logps: PairLogps, first: int) -> tuple[Tensor, Tensor]:
        """For a micro-batch that begins at this rank's pair `first`: its losses [B], and a scalar whose gradient
        is its part of the gradient of the mean loss."""
        here = slice(self.first + first, self.first + first + len(logps.policy_chosen))
        surrogate = sum(((getattr(logps, name) * d[here]).sum() for name, d in self.derivatives.items()), 0.0)
        assert isinstance(surrogate, Tensor)
        return self.losses[here], surrogate


@dataclass(frozen=True)
class _Scored:
    """A micro-batch after its forward pass."""

    logps: PairLogps
    statistics: Statistics
    """Entropy and mean logits, where asked for."""
    num_tokens: int
    """As the field counts them: a prompt once for each of its completions."""
    token_logratios: Tensor | None
    """log π − log π_ref [N] of the tokens that bear the loss, in the order of the pairs, chosen before rejected."""
    routing: Routing | None = None
    """Of the experts, where the model has some."""

    def stacked(self) -> Tensor:
        """All of it in one tensor, [B, columns]; unstacked gives it back."""
        values = [v for f in fields(self.logps) if (v := getattr(self.logps, f.name)) is not None]
        return torch.stack([*values, *(column for both in self.statistics.values() for column in both)], dim=1)

    def unstacked(self, stacked: Tensor) -> tuple[PairLogps, Statistics]:
        """Of any number of pairs whose columns are those of this one."""
        columns: Iterator[Tensor] = iter(stacked.unbind(1))
        present = {f.name: getattr(self.logps, f.name) is not None for f in fields(self.logps)}
        logps: dict[str, Any] = {name: next(columns) if there else None for name, there in present.items()}
        return PairLogps(**logps), {name: (next(columns), next(columns)) for name in self.statistics}
