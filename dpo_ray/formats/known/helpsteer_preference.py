"""Two responses, and by how much the second one is better, from -3 to 3 (HelpSteer2 and HelpSteer3)."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import (
    TIE,
    Format,
    Row,
    answered,
    compared,
    is_text,
    is_turns,
    no_pair,
    present,
    text,
)
from dpo_ray.formats.transcript import marked_turns

_OLD = ("prompt", "response_1", "response_2", "preference_strength")
_NEW = ("context", "response1", "response2", "overall_preference")


def _names(row: Row) -> tuple[str, ...]:
    return _NEW if all(name in row for name in _NEW) else _OLD


def _fits(row: Row) -> bool:
    prompt, first, second, strength = (row[name] for name in _names(row))
    return (is_text(prompt) or is_turns(prompt)) and is_text(first, second) and _is_strength(strength)


def _is_strength(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -3 <= value <= 3


def _fields(row: Row) -> dict[str, Any]:
    of_prompt, *responses, of_strength = _names(row)
    strength, prompt = present(row, of_strength), present(row, of_prompt)
    if not _is_strength(strength):
        no_pair("no_winner")
    first, second = (answered(text(row, response)) for response in responses)
    turns = prompt if isinstance(prompt, list) else marked_turns(text(row, of_prompt))
    return {"prompt": turns, **compared(first, second, TIE if strength == 0 else strength < 0)}


FORMAT = Format(
    name="helpsteer_preference",
    about="prompt, response_1, response_2, preference_strength; or context, response1, response2, overall_preference",
    layout="paired",
    columns=(_OLD, _NEW),
    typed=("preference_strength", "overall_preference", "context"),
    fits=_fits,
    fields=_fields,
)
