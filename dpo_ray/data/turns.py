"""Where the assistant's turns stand in a dialogue as a chat template writes it.

A template may mark them ({% generation %}). Where it does not, they are told by rendering the dialogue with and
without each turn: a turn begins where the dialogue before it, with the opening of the assistant's turn, ends; and ends
where the dialogue up to it does. Both must be found again in the whole dialogue, or the turn cannot be told. For k
turns of the assistant's that are 2k − 1 renderings, so the time grows with the square of the number of turns; an answer
of one turn takes one.

Positions are characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

from dpo_ray.errors import DataError
from dpo_ray.pairs import Message

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# Stands for what the assistant says where only what is written before it is asked for.
_MARK = "\ue000\uf8ff\ue002"

_WAY_OUT = (
    "Put {% generation %} and {% endgeneration %} around what the assistant says, the end of its turn included, in a "
    "copy of the chat template, and name that file as model.chat_template. Or leave such dialogues out of the data."
)


class Render(Protocol):
    """A dialogue as the template writes it; opened: up to where the assistant is to speak."""

    def __call__(self, messages: Sequence[Message], /, *, opened: bool) -> str: ...


def marks_turns(template: str) -> bool:
    """Whether a chat template marks what the assistant says."""
    return _GENERATION.search(template) is not None


def marked_turns(
    num_marks: Callable[[Sequence[Message]], int],
    messages: Sequence[Message],
    first: int,
    whole: str,
    marks: Sequence[Span],
    control: re.Pattern[str],
) -> list[list[Span]]:
    """Where the assistant's turns from message `first` on stand, each in the parts that the template marks.

    White space that a mark has after the end of the turn is no part of it. Marks that are not one for each turn are
    told apart by how many there are before each.

    Args:
        num_marks: how many marks there are in messages up to where the assistant is to speak.
        whole, marks: all messages as the template writes them, and what it marks in order.
        control: matches the control tokens that it writes.

    Raises DataError where a turn has no mark.
    """
    places = _places(messages)
    ours = [place for place in places if place >= first]
    if len(marks) == len(places):
        before = list(range(len(places) - len(ours), len(places)))
    else:
        before = [num_marks(messages[:place]) for place in ours]
    turns = [[_closed(whole, span, control) for span in marks[a:b]] for a, b in pairwise([*before, len(marks)])]
    if not all(turns):
        raise DataError(
            f"The model's chat template marks {len(marks)} parts of a dialogue of the roles {_roles(messages)} "
            "({% generation %}), and none for one of the assistant's turns, so it is not known which tokens are the "
            "assistant's. Have it mark them in every turn, in a copy of the template named as model.chat_template."
        )
    return turns


def found_turns(
    render: Render, messages: Sequence[Message], first: int, opening: str, whole: str, control: re.Pattern[str]
) -> list[Span]:
    """Where the assistant's turns from message `first` on stand, by rendering the dialogue with and without each.

    The last one ends with the dialogue.

    Args:
        opening: the messages before `first`, up to where the assistant is to speak.
        whole: all messages as the template writes them.
        control: matches the control tokens that it writes.

    Raises DataError where a turn cannot be told.
    """
    found: list[Span] = []
    for place in (place for place in _places(messages) if place >= first):
        opened = opening if place == first else render(messages[:place], opened=True)
        begins: int | None = len(opened)
        if not whole.startswith(opened):
            begins = _start_by_mark(render, messages, place, opened, whole, control)
        ends: int | None = len(whole)
        if begins is not None and place < len(messages) - 1:
            ends = _end(render, messages, place, begins, whole, control)
        if begins is None or ends is None or (found and begins < found[-1][1]):
            where = "stops before it" if begins is None else "ends with it"
            raise DataError(
                f"Of a dialogue of the roles {_roles(messages)}, the model's chat template writes the assistant's turn "
                f"at place {place + 1} otherwise than where the dialogue {where}, so it cannot be told which tokens "
                f"are the assistant's. {_WAY_OUT}"
            )
        found.append((begins, ends))
    return found


def require_calls_written(messages: Sequence[Message], first: int, whole: str, turns: Sequence[Sequence[Span]]) -> None:
    """Raises DataError where the template leaves out calls of tools in the turns from message `first` on."""
    places = [place for place in _places(messages) if place >= first]
    for place, spans in zip(places, turns, strict=True):
        written = "".join(whole[start:end] for start, end in spans)
        if any(name not in written for name in _called(messages[place])):
            raise DataError(
                f"Of a dialogue of the roles {_roles(messages)}, the model's chat template does not write the calls of "
                f"tools in the assistant's turn at place {place + 1}. Name a template that knows them as "
                "model.chat_template, or a model that was trained to call tools; or leave such dialogues out of the "
                "data."
            )


def _start_by_mark(
    render: Render, messages: Sequence[Message], place: int, opened: str, whole: str, control: re.Pattern[str]
) -> int | None:
    """Where a turn begins before which the template writes something else once it is said: where it opens the reasoning
    of a turn that is to come, or leaves out what was reasoned before the user's last words.

    Told by a mark in the turn's place, where what is written before it opens a turn of the assistant's: where it ends
    as the opening of a turn that is to come begins, or where the dialogue before the turn is as it was, and no call of
    a tool stands before the mark.
    """
    calls = _more(messages[place]).get("tool_calls")
    mark = Message(role="assistant", content=_MARK, more=json.dumps({"tool_calls": calls}) if calls else None)
    before, found, _ = render([*messages[:place], mark, *messages[place + 1 :]], opened=False).partition(_MARK)
    if not found or not whole.startswith(before):
        return None
    closed = render(messages[:place], opened=False)
    opening = opened[len(closed) :] if opened.startswith(closed) else ""
    token = control.search(opening)
    shortest = token.end() if token else max(1, len(opening))
    opens = any(before.endswith(opening[:end]) for end in range(shortest, len(opening) + 1))
    same = before.startswith(closed) and not any(name in before[len(closed) :] for name in _called(messages[place]))
    return len(before) if opens or same else None


def _end(
    render: Render, messages: Sequence[Message], place: int, start: int, whole: str, control: re.Pattern[str]
) -> int | None:
    """Where a turn ends that others follow: with the control token that ends it where it is the last."""
    last = render(messages[: place + 1], opened=False)
    for end in _closings(last, start, control):
        if whole.startswith(last[:end]):
            return end
    # A template may begin a turn otherwise where it is the last, as with empty reasoning; it still ends the same way.
    for end in _closings(last, 0, control):
        token = [found.group() for found in control.finditer(last, 0, end)][-1:]
        at = whole.find(token[0], start) if token else -1
        if at >= 0 and last[:end].endswith(whole[start : at + len(token[0])]):
            return at + len(token[0])
    return None


def _closings(text: str, start: int, control: re.Pattern[str]) -> Iterator[int]:
    """Where the dialogue's last turn may end: after the last control token, or after one before it with nothing but
    white space between them, as where a template ends the whole dialogue too. Without a control token, where the text
    ends.
    """
    ends = [found.span() for found in control.finditer(text, start)]
    if not ends or text[ends[-1][1] :].strip():
        yield len(text)
        return
    for n in reversed(range(len(ends))):
        yield ends[n][1]
        if n and text[ends[n - 1][1] : ends[n][0]].strip():
            return


def _closed(whole: str, span: Span, control: re.Pattern[str]) -> Span:
    """A span without white space after its last control token."""
    start, end = span
    ends = [found.end() for found in control.finditer(whole, start, end)]
    return (start, ends[-1]) if ends and not whole[ends[-1] : end].strip() else span


def _places(messages: Sequence[Message]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _more(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message.get("more") or "{}")
    return found


def _called(message: Message) -> list[str]:
    """Names of the functions that a message calls."""
    return [call.get("function", call)["name"] for call in _more(message).get("tool_calls", ())]


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)
