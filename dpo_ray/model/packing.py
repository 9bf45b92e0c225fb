"""Pairs → the tensors of one forward pass, in the packed or in the padded layout.

    P, C, R tokens of prompt, chosen and rejected; T tokens of a row; N tokens of the micro-batch that bear the loss.

A completion's tokens bear the loss, all of them or those that its mask names. Both layouts name the same N tokens in
the same order (pair by pair, chosen then rejected), so that what follows the forward pass need not know which one was
used. A pair may lack one side (unpaired data): that side has no tokens in the packed row and no row of its own in the
padded layout.

What the packed row shares is the longest common prefix of the two sequences: the prompt, and the tokens with which
both completions begin. These stand in the row once and are targets twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_ray.errors import DataError
from dpo_ray.model.segment import Segment
from dpo_ray.pairs import TokenizedPair, bearing_loss


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass."""

    input_ids: Tensor
    """[rows, T]"""
    position_ids: Tensor
    """[rows, T]"""
    attention_mask: Tensor | None
    """[rows, T] of 0 and 1 in the padded layout; None in the packed one."""
    segments: tuple[Segment, ...] | None
    """The pairs of the packed row; None in the padded layout."""
    predictors: Tensor
    """[N] index, into the flattened [rows · T] positions, of the position that predicts each token."""
    targets: Tensor
    """[N] the tokens."""
    sequence_index: Tensor
    """[N] 2·pair for chosen tokens, 2·pair + 1 for rejected ones."""
    occurrences: Tensor
    """[rows, T] float32: in how many sequences a position stands, times its pair's weight; 0 of padding."""
    num_pairs: int
    reference_logprobs: Tensor | None = None
    """[N] float32, in nats, of the tokens; None where the pairs have none."""

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
            occurrences=self.occurrences.to(device),
            reference_logprobs=self.reference_logprobs.to(device) if self.reference_logprobs is not None else None,
        )


def pack(pairs: Sequence[TokenizedPair]) -> MicroBatch:
    """One row [shared|chosen|rejected|shared|chosen|…]: each common prefix once, no padding.

    Raises DataError where a pair's reference log-probs are not those of its tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predictors: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    occurrences: list[float] = []
    for i, pair in enumerate(pairs):
        start, p = len(ids), len(pair.prompt_ids)
        c, r = len(pair.chosen_ids), len(pair.rejected_ids)
        common = _common_prefix(pair.chosen_ids, pair.rejected_ids)
        ids += [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids[common:]]
        positions += [*range(p + c), *range(p + common, p + r)]
        segments.append(Segment(start, p + common, c - common, r - common))
        weight = _weight(pair)
        occurrences += [weight * (bool(c) + bool(r))] * (p + common) + [weight] * (c + r - 2 * common)
        last = start + p - 1  # the last prompt token predicts the first token of both completions
        of_chosen = [*range(last, last + c)]
        of_rejected = [*range(last, last + min(common + 1, r)), *range(last + c + 1, last + c + r - common)]
        predictors += bearing_loss(of_chosen, pair.chosen_mask) + bearing_loss(of_rejected, pair.rejected_mask)
        chosen, rejected = pair.chosen_loss_ids, pair.rejected_loss_ids
        targets += [*chosen, *rejected]
        sequences += [2 * i] * len(chosen) + [2 * i + 1] * len(rejected)
    return MicroBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        segments=tuple(segments),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        sequence_index=torch.tensor(sequences),
        occurrences=torch.tensor([occurrences], dtype=torch.float32),
        num_pairs=len(pairs),
        reference_logprobs=_reference_logprobs(pairs),
    )


def pad(pairs: Sequence[TokenizedPair]) -> MicroBatch:
    """Two rows a pair, [prompt|chosen] and [prompt|rejected], padded on the right: for any causal model.

    Raises DataError where a pair's reference log-probs are not those of its tokens.
    """
    sides = [
        side
        for pair in pairs
        for side in ((pair, pair.chosen_ids, pair.chosen_mask), (pair, pair.rejected_ids, pair.rejected_mask))
    ]
    present = [(sequence, ids, mask) for sequence, (_, ids, mask) in enumerate(sides) if ids]
    rows = [pair.prompt_ids + ids for pair, ids, _ in sides if ids]
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attended = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.tensor([_weight(pairs[sequence // 2]) for sequence, _, _ in present], dtype=torch.float32)
    predictors: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    for number, (row, (sequence, ids, mask)) in enumerate(zip(rows, present, strict=True)):
        input_ids[number, : len(row)] = torch.tensor(row)
        attended[number, : len(row)] = 1
        end = number * width + len(row) - 1
        predictors += bearing_loss([*range(end - len(ids), end)], mask)
        of_loss = bearing_loss(ids, mask)
        targets += of_loss
        sequences += [sequence] * len(of_loss)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(rows), width).contiguous(),
        attention_mask=attended,
        segments=None,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        sequence_index=torch.tensor(sequences),
        occurrences=attended * weights[:, None],
        num_pairs=len(pairs),
        reference_logprobs=_reference_logprobs(pairs),
    )


def _weight(pair: TokenizedPair) -> float:
    return 1.0 if pair.weight is None else pair.weight


def _common_prefix(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for length, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            return length
    return min(len(chosen), len(rejected))


def _reference_logprobs(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    values: list[float] = []
    without = []
    for pair in pairs:
        sides = (pair.chosen_loss_ids, pair.chosen_ref_logprobs), (pair.rejected_loss_ids, pair.rejected_ref_logprobs)
        if all(logprobs is None for _, logprobs in sides):
            without.append(pair.pair_id)
            continue
        for ids, logprobs in sides:
            found = logprobs or []  # of an absent side, which has no ids either
            if len(found) != len(ids):
                raise DataError(
                    f"Pair {pair.pair_id} has {len(found)} reference log-probs for a completion of {len(ids)} tokens "
                    "that bear the loss. Remove the reference artifact that it comes from; it will be computed again."
                )
            values += found
    if without and len(without) < len(pairs):
        raise DataError(
            f"Pair {without[0]} has no reference log-probs, while other pairs of its micro-batch have them. Remove the "
            "reference artifact that it comes from; it will be computed again."
        )
    return torch.tensor(values, dtype=torch.float32) if not without else None
