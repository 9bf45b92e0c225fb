"""What is reported of pairs: averages over those that have it, and their sums over micro-batches and ranks.

B pairs of a micro-batch or of a whole batch. A pair of weight 2 counts twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo_ray.config import Train
from dpo_ray.losses.objective import BatchTerms, rewards, unscaled_rewards
from dpo_ray.losses.pair_logps import PairLogps, sum_by_sequence
from dpo_ray.model.logprobs import TokenScores
from dpo_ray.model.packing import MicroBatch
from dpo_ray.pairs import TIE
from dpo_ray.training.parallel import Rank, summed

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Name of a metric → (what is summed [B], and over how many it is averaged [B])."""


def weights_of(logps: PairLogps) -> Tensor:
    """[B] how many pairs each counts as; 1 where none are told."""
    return torch.ones_like(logps.mean_chosen) if logps.weight is None else logps.weight


def statistics_of(scores: TokenScores, batch: MicroBatch, logps: PairLogps) -> Statistics:
    """Entropy in nats and mean logits, where the scores have them."""
    if scores.entropies is None or scores.mean_logits is None:
        return {}
    entropies, logits = (
        sum_by_sequence(values, batch.sequence_index, 2 * batch.num_pairs)
        for values in (scores.entropies, scores.mean_logits)
    )
    chosen, rejected = logps.num_chosen_tokens, logps.num_rejected_tokens
    return {
        "entropy": (entropies[0::2] + entropies[1::2], chosen + rejected),
        "logits/chosen": (logits[0::2], chosen),
        "logits/rejected": (logits[1::2], rejected),
    }


def per_pair(options: Train, losses: Tensor, logps: PairLogps) -> Statistics:
    """What is reported as an average over the pairs that have it, by their weights."""
    chosen, rejected = rewards(options.loss, logps)
    with_chosen, with_rejected = logps.num_chosen_tokens > 0, logps.num_rejected_tokens > 0
    both = with_chosen & with_rejected
    plain_chosen = (logps.mean_chosen * logps.num_chosen_tokens).detach()
    plain_rejected = (logps.mean_rejected * logps.num_rejected_tokens).detach()
    found = {
        "loss": (losses.detach(), torch.ones_like(both)),
        "rewards/chosen": (chosen, with_chosen),
        "rewards/rejected": (rejected, with_rejected),
        "rewards/margins": (chosen - rejected, both),
        "rewards/accuracies": ((chosen > rejected).float(), both & ~_ties(logps)),
        "logps/chosen": (plain_chosen, with_chosen),
        "logps/rejected": (plain_rejected, with_rejected),
    }
    return weighted(found, logps)


def weighted(statistics: Statistics, logps: PairLogps) -> Statistics:
    """The same with each pair counted as often as its weight says."""
    weight = weights_of(logps)
    return {name: (weight * values, weight * counts) for name, (values, counts) in statistics.items()}


def _ties(logps: PairLogps) -> Tensor:
    """[B] whether neither answer is the better one."""
    if logps.preference is None:
        return torch.zeros_like(logps.num_chosen_tokens, dtype=torch.bool)
    return logps.preference == TIE


def comparable(options: Train, logps: PairLogps) -> dict[str, float]:
    """What compares trainings with different β: means over the held-out pairs, and their standard errors (`_se`).

    Where no row has both completions, accuracy and margin are taken over all couples of a desirable and an undesirable
    row, and `pairs`, which their error follows from, is the smaller of the two counts.
    """
    has_chosen, has_rejected = logps.num_chosen_tokens > 0, logps.num_rejected_tokens > 0
    both = has_chosen & has_rejected & ~_ties(logps)
    chosen, rejected = unscaled_rewards(options.loss, logps)
    found: dict[str, float] = {}
    if both.any():
        found |= {"pairs": float(both.sum()), **_mean("margins", (chosen - rejected)[both])}
    elif has_chosen.any() and has_rejected.any():
        couples = chosen[has_chosen][:, None] - rejected[has_rejected][None]
        fewer = min(couples.shape)
        found = {
            "pairs": float(fewer),
            "rewards/accuracies": float((couples > 0).double().mean()),
            "margins": float(couples.mean()),
            "margins_se": float(couples.double().std(correction=0)) / math.sqrt(fewer),
        }
    found |= _mean("logps/chosen", (logps.mean_chosen * logps.num_chosen_tokens)[has_chosen])
    if options.loss.needs_reference:
        found |= _mean("logratios/chosen", logps.chosen_logratios[has_chosen])
    return found


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """Of [n] values, and its standard error; nothing of none."""
    if not len(values):
        return {}
    spread = float(values.double().std(correction=0))
    return {name: float(values.double().mean()), f"{name}_se": spread / math.sqrt(len(values))}


def batch_metrics(options: Train, terms: BatchTerms) -> dict[str, float]:
    """What the loss took from the whole batch, and from the steps before."""
    named = {}
    if isinstance(terms.kl, Tensor):  # measured, not assumed
        named["kl"] = float(terms.kl)
    if options.loss.tracks_reward_mean:
        named["reward_mean"] = float(terms.reward_mean)
    return named


_NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "logits/chosen",
    "logits/rejected",
)


_BY_SOURCE = ("loss", "rewards/accuracies", "rewards/margins")


class PairSums:
    """Sums and counts of the metrics of many pairs, in float64; of some of them, by source too."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        self._sources = sources
        self._totals = torch.zeros(2, len(_NAMES), dtype=torch.float64)
        # Pairs of each source, and sums and counts of its metrics.
        self._by_source = torch.zeros(1 + 2 * len(_BY_SOURCE), len(sources), dtype=torch.float64)
        self.num_tokens = 0
        self.num_pairs = 0

    def add(self, values: Statistics, num_pairs: int, num_tokens: int, places: Tensor) -> None:
        """places: [B] which source each pair is of, -1 of none; empty where there are no sources."""
        device = values["loss"][0].device
        nothing = torch.zeros(1, device=device), torch.zeros(1, device=device)
        both = [values.get(name, nothing) for name in _NAMES]
        # A value that does not count may be anything, NaN too.
        kept = [torch.where(counts > 0, v.double(), 0.0).sum() for v, counts in both]
        self._totals[0] += torch.stack(kept).cpu()
        self._totals[1] += torch.stack([counts.double().sum() for _, counts in both]).cpu()
        self.num_tokens += num_tokens
        self.num_pairs += num_pairs
        if self._sources:
            columns = [torch.ones_like(places)]
            for name in _BY_SOURCE:
                v, counts = values[name]
                columns += [torch.where(counts > 0, v, 0.0), counts]
            known = places >= 0
            rows = torch.stack([column.double() for column in columns])[:, known]
            self._by_source.index_add_(1, places[known].cpu(), rows.cpu())

    def over_ranks(self, me: Rank) -> PairSums:
        """The sums over all ranks, on each of them."""
        own = torch.tensor([self.num_tokens, self.num_pairs], dtype=torch.float64)
        parts = [self._totals.flatten(), self._by_source.flatten(), own]
        flat = summed(torch.cat(parts).to(me.device), me).cpu()
        totals, by_source, (num_tokens, num_pairs) = flat.split([len(part) for part in parts])
        everywhere = PairSums(self._sources)
        everywhere._totals = totals.view_as(self._totals)
        everywhere._by_source = by_source.view_as(self._by_source)
        everywhere.num_tokens, everywhere.num_pairs = int(num_tokens), int(num_pairs)
        return everywhere

    def total_and_count(self, name: str) -> tuple[float, float]:
        total, count = self._totals[:, _NAMES.index(name)].tolist()
        return total, count

    def mean(self, name: str) -> float:
        total, count = self.total_and_count(name)
        return total / count

    def means(self) -> dict[str, float]:
        """Those that any pair has; a thing not measured is absent. Of sources, those that any pair is of."""
        found = {name: self.mean(name) for name in _NAMES if self.total_and_count(name)[1] > 0}
        for source, (pairs, *sums) in zip(self._sources, self._by_source.T.tolist(), strict=True):
            if pairs:
                found[f"sources/{source}/pairs"] = pairs
            for name, total, count in zip(_BY_SOURCE, sums[0::2], sums[1::2], strict=True):
                if count > 0:
                    found[f"sources/{source}/{name}"] = total / count
        return found
