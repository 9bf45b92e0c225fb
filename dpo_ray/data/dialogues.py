"""Dialogues as pairs: where two of them part, and what the assistant says in answer."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_ray.data.rules import reject
from dpo_ray.pairs import Answer, Message


def as_answer(turns: Sequence[Message]) -> Answer:
    """Turns as an answer: text where they are one turn of the assistant's that is nothing else."""
    if len(turns) == 1 and turns[0]["role"] == "assistant" and not turns[0].get("more"):
        return turns[0]["content"]
    return tuple(turns)


def parted(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two dialogues → the prompt that they share, and the turns of each after it.

    The prompt is the longest beginning of both after which the assistant speaks in both. So where they part at what the
    user or a tool says, the turn of the assistant's before it stands in both answers; see num_shared. Raises BadRow
    where there is no such beginning.
    """
    most = min(len(chosen), len(rejected)) - 1
    if most < 1:
        reject("missing_field")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        reject("bad_completion")
    end = _common(chosen[:most], rejected[:most])
    while end and not chosen[end]["role"] == rejected[end]["role"] == "assistant":
        end -= 1
    if not end:
        reject("diverging_prefix")
    return list(chosen[:end]), list(chosen[end:]), list(rejected[end:])


def num_shared(answers: Sequence[Answer]) -> int:
    """How many turns both answers to a prompt begin with alike; of each at least its last turn is not counted."""
    if len(answers) < 2 or any(isinstance(answer, str) for answer in answers):
        return 0
    one, other = answers
    most = min(len(one), len(other)) - 1
    return _common(one[:most], other[:most])


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items both begin with."""
    for length, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return length
    return min(len(one), len(other))
