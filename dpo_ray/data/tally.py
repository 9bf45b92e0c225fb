"""The counters of an artifact, told apart: what was read and kept, and why rows were dropped.

A manifest holds them flat, as its shards count them, and this is where they are sorted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NOTED = {
    "truncated_prompt": "the prompt was over data.max_prompt_tokens and was cut",
    "truncated_completion": "a completion was over data.max_completion_tokens and was cut; it has no end-of-turn token",
    "boundary_merge": "the last characters of the prompt and the first of a completion would share a token if they "
    "were tokenized together; trained on are the ids apart",
    "double_bos": "the prompt begins with two BOS tokens, which the chat template writes",
    "double_eos": "a completion ends with two control tokens, with nothing but white space between them, which the "
    "chat template writes; a model that stops at the first never generates the second",
    "inner_control_token": "an answer spells a control token of the model, which is taken as plain text, or has one "
    "that the chat template did not write",
    "tools_ignored": "the pair has tools, but the chat template writes nothing for them",
    "truncated_samples": "completions that were cut at sampling.max_tokens",
    "reward_cut": "dialogues over the reward model's max_tokens, which lost their beginning",
    "judge_unparseable": "questions to the judge of which no attempt's reply could be read; they count as ties, or 5.5",
    "orders_disagree": "comparisons in which the judge prefers the same place in both orders, or ties in one of them",
    "same_text": "comparisons of two equal texts, which the judge was not asked about",
}
"""Counters of kept rows that are worth a look, and why. Of pairs each counts a row once, whichever of its sides is
concerned."""

_NO_REASONS = {
    "read",
    "kept",
    "more_pairs",
    "other_split",
    "steering",
    "not_drawn",
    "no_preference",
    "tokens",
    "completions",
    *NOTED,
}


def dropped_by_reason(counters: Mapping[str, int]) -> dict[str, int]:
    """Of the counters of an artifact, or of one of its shards: reason → rows dropped for it."""
    return {name: count for name, count in counters.items() if count and name not in _NO_REASONS}


@dataclass(frozen=True)
class Tally:
    """What became of the rows that a stage read."""

    read: int
    kept: int
    """Rows of the artifact; where its shards hold something else, the rows that it leaves to later stages."""
    more_pairs: int
    """Of those kept, the pairs beyond the first of a ranked row."""
    dropped: dict[str, int]
    """Reason → rows. A row of the other side of the split, which the stage is not about, is not dropped."""
    noted: dict[str, int]
    """Keys of NOTED, in its order → kept rows."""

    @classmethod
    def of(cls, counters: Mapping[str, int]) -> Tally:
        """From the counters of an artifact of rows. What counts nothing is left out."""
        return cls(
            read=counters["read"],
            kept=counters["kept"],
            more_pairs=counters.get("more_pairs", 0),
            dropped=dropped_by_reason(counters),
            noted={name: counters[name] for name in NOTED if counters.get(name)},
        )

    def dropped_for(self, reasons: Iterable[str]) -> dict[str, int]:
        """Rows dropped for these reasons, in their order."""
        return {reason: self.dropped[reason] for reason in reasons if reason in self.dropped}
