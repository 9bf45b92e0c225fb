"""A dialogue whose last message is good or bad, as LLaMA-Factory has it for KTO."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, no_pair, present
from dpo_ray.formats.known.unpaired import is_label
from dpo_ray.formats.sharegpt_turns import are_either, messages


def _named(row: Row, *names: str) -> str:
    return next((name for name in names if name in row), names[-1])


def _dialogue(row: Row) -> str:
    return _named(row, "messages", "conversations")


def _label(row: Row) -> str:
    return _named(row, "label", "kto_tag")


def _fits(row: Row) -> bool:
    return are_either(row[_dialogue(row)]) and is_label(row[_label(row)])


def _fields(row: Row) -> dict[str, Any]:
    found = messages(present(row, _dialogue(row)))
    if not found:
        no_pair("empty_prompt")
    return {"prompt": found[:-1], "completion": found[-1:], "label": present(row, _label(row))}


FORMAT = Format(
    name="kto_messages",
    about="messages (or conversations) with a label (or kto_tag) that tells whether their last one is good",
    layout="unpaired",
    columns=(
        ("messages", "label"),
        ("conversations", "label"),
        ("messages", "kto_tag"),
        ("conversations", "kto_tag"),
    ),
    typed=("label", "kto_tag", "messages", "conversations"),
    absent=("chosen", "rejected"),
    fits=_fits,
    fields=_fields,
)
