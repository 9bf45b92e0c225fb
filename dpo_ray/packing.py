"""Pairs → the tensors of one forward pass, in the packed or in the padded layout.

    P, C, R tokens of prompt, chosen and rejected; T tokens of a row; N completion tokens of the micro-batch.

Both layouts name the same N completion tokens in the same order (pair by pair, chosen then rejected), so that
what follows the forward pass need not know which one was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_ray.attention import Segment
from dpo_ray.pairs import TokenizedPair


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass."""

    input_ids: Tensor
    """[rows, T]"""
    position_ids: Tensor
    """[rows, T]"""
    attention_mask: Tensor | None
    """[rows, T] of 0 and 1 in the padded layout; None in the packed one."""
    segments: list[Segment] | None
    """The pairs of the packed row; None in the padded layout."""
    predictors: Tensor
    """[N] index, into the flattened [rows · T] positions, of the position that predicts each completion token."""
    targets: Tensor
    """[N] the completion tokens."""
    sequence_index: Tensor
    """[N] 2·pair for chosen tokens, 2·pair + 1 for rejected ones."""
    num_pairs: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on a device."""
        mask = self.attention_mask.to(device) if self.attention_mask is not None else None
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=mask,
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            sequence_index=self.sequence_index.to(device),
        )


def pack(pairs: Sequence[TokenizedPair]) -> MicroBatch:
    """One row [prompt|chosen|rejected|prompt|chosen|…]: each prompt once, no padding."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predictors: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    for i, pair in enumerate(pairs):
        start, p = len(ids), len(pair.prompt_ids)
        c, r = len(pair.chosen_ids), len(pair.rejected_ids)
        ids += [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]
        positions += [*range(p + c), *range(p, p + r)]
        segments.append(Segment(start, p, c, r))
        last = start + p - 1  # the last prompt token predicts the first token of both completions
        predictors += [last, *range(last + 1, last + c), last, *range(last + c + 1, last + c + r)]
        targets += [*pair.chosen_ids, *pair.rejected_ids]
        sequences += [2 * i] * c + [2 * i + 1] * r
    return MicroBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        segments=segments,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        sequence_index=torch.tensor(sequences),
        num_pairs=len(pairs),
    )


def pad(pairs: Sequence[TokenizedPair]) -> MicroBatch:
    """Two rows a pair, [prompt|chosen] and [prompt|rejected], padded on the right: for any causal model."""
    rows = [pair.prompt_ids + done for pair in pairs for done in (pair.chosen_ids, pair.rejected_ids)]
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    predictors: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        p = len(pairs[i // 2].prompt_ids)
        predictors += range(i * width + p - 1, i * width + len(row) - 1)
        targets += row[p:]
        sequences += [i] * (len(row) - p)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(rows), width).contiguous(),
        attention_mask=mask,
        segments=None,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        sequence_index=torch.tensor(sequences),
        num_pairs=len(pairs),
    )
