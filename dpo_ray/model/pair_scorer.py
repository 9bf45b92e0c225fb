"""Log-probs of pairs as the reference stage wants them, and the trainer's own forward as one who gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from dpo_ray.bins import first_fit
from dpo_ray.config import Model
from dpo_ray.errors import EngineDied
from dpo_ray.model.for_scoring import load_for_scoring
from dpo_ray.model.policy import torch_dtype
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair

_TORCH_BATCH_TOKENS = 4096
_PACKED_AT_ONCE = 4096


class PairScorer(Protocol):
    """Log-probs of the tokens of pairs that bear the loss, in nats: for each pair, those of chosen and of rejected.

    Of a side that a pair lacks they are an empty list.
    """

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]: ...


class TorchScorer:
    """Scores by the trainer's own forward pass."""

    def __init__(self, model: Model):
        folder = ModelFolder.of(model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scorer = load_for_scoring(
            folder.path,
            self.device,
            torch_dtype(model.dtype),
            trust_remote_code=folder.trust_remote_code,
            quantization=model.quantization,
        )

    @torch.inference_mode()
    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        chosen: list[list[float]] = [[] for _ in pairs]
        rejected: list[list[float]] = [[] for _ in pairs]
        for group in _groups(pairs):
            members = [pairs[i] for i in group]
            try:
                values = self.scorer(self.scorer.collate(members).to(self.device)).logprobs.tolist()
            except torch.AcceleratorError as error:
                raise EngineDied("the device is lost to this process") from error
            at = 0
            for i, pair in zip(group, members, strict=True):
                cut = at + len(pair.chosen_loss_ids)
                end = cut + len(pair.rejected_loss_ids)
                chosen[i], rejected[i] = values[at:cut], values[cut:end]
                at = end
        return chosen, rejected


def _groups(pairs: Sequence[TokenizedPair]) -> Iterator[list[int]]:
    """Pairs that are computed together, some thousands at a time: packing takes the square of their number."""
    for begin in range(0, len(pairs), _PACKED_AT_ONCE):
        some = pairs[begin : begin + _PACKED_AT_ONCE]
        for group in first_fit([pair.num_tokens for pair in some], _TORCH_BATCH_TOKENS):
            yield [begin + i for i in group]
