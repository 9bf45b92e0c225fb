"""The longest pair of a training: it decides how much memory is needed at most, and is looked at before the first step.

A pair that is longer than a micro-batch is one of its own. Where it does not fit, the training would end wherever the
plan has put it, and again there after every restart. Which pair is the longest depends on how the model takes pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.pairs import TokenizedPair


@dataclass(frozen=True)
class LongestPair:
    """The pair, and where it lies."""

    pair: TokenizedPair
    shard: str
    row: int

    def described(self) -> str:
        """Which pair, where, and how long."""
        prompt, chosen, rejected = (
            len(ids) for ids in (self.pair.prompt_ids, self.pair.chosen_ids, self.pair.rejected_ids)
        )
        return (
            f"the longest pair, {self.pair.pair_id} (row {self.row} of {self.shard}), of {self.pair.num_tokens} tokens "
            f"({prompt} of the prompt, {chosen} chosen, {rejected} rejected)"
        )


@dataclass(frozen=True)
class LongestPairs:
    """The longest pair for either layout of a micro-batch."""

    packed: LongestPair
    """The most tokens where a prompt is there once for both completions."""
    padded: LongestPair
    """The most tokens where each completion is a row with its prompt, padded to the longer one."""
