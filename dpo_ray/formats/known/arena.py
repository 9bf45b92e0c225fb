"""Two responses to a prompt, and which of them won or whether it is a tie (Chatbot Arena's human preferences)."""

from __future__ import annotations

import json
from typing import Any

from dpo_ray.formats.format import Format, Row, answered, compared, is_text, no_pair, text
from dpo_ray.formats.verdict import COLUMNS, first_is_better, is_verdict

_TEXTS = ("prompt", "response_a", "response_b")


def _fits(row: Row) -> bool:
    return is_text(*(row[name] for name in _TEXTS)) and is_verdict(row)


def _fields(row: Row) -> dict[str, Any]:
    first = first_is_better(row)
    prompt, one, other = (text(row, name) for name in _TEXTS)
    asked = _turns(prompt)
    if asked is None:
        return {"prompt": prompt, **compared(one, other, first)}
    one_said, other_said = _turns(one), _turns(other)
    if one_said is None or other_said is None or not len(asked) == len(one_said) == len(other_said):
        no_pair("role_order")
    return compared(_dialogue(asked, one_said), _dialogue(asked, other_said), first)


def _turns(value: str) -> list[Any] | None:
    """The turns of one side, where they are written as a JSON list of texts."""
    if not value.startswith("["):
        return None
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(turns, list) and bool(turns) and all(turn is None or isinstance(turn, str) for turn in turns)
    return turns if is_list else None


def _dialogue(asked: list[Any], said: list[Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for question, answer in zip(asked, said, strict=True):
        turns += [{"role": "user", "content": question}, *answered(answer)]
    return turns


FORMAT = Format(
    name="arena",
    about="prompt, response_a, response_b, and winner, or winner_model_a, winner_model_b and winner_tie",
    layout="paired",
    columns=((*_TEXTS, "winner"), (*_TEXTS, *COLUMNS)),
    typed=COLUMNS,
    fits=_fits,
    fields=_fields,
)
