"""chosen and rejected are texts that begin alike; what they share is the prompt (TRL's implicit plain text)."""

from __future__ import annotations

import re
from typing import Any

from dpo_ray.formats.format import Format, Row, is_text, is_transcript, no_pair, text

_OF_PROMPT = re.compile(
    r"prompt|question|instruction|query|problem|request|history|dialog|conversation|messages|context|(^|_)(input|user|human|task"
    r"|text|post|article|document|passage)s?($|_)",
    re.IGNORECASE,
)
"""Names of columns that hold what was asked, whatever they are called exactly."""


def _shared(chosen: str, rejected: str) -> int:
    """How many characters are the prompt: as TRL cuts it, a space before the first difference is the answers'."""
    ends = (n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    first = next(ends, min(len(chosen), len(rejected)))
    return first - 1 if first and chosen[first - 1] == " " else first


def _fits(row: Row) -> bool:
    chosen, rejected = row["chosen"], row["rejected"]
    if not is_text(chosen, rejected) or is_transcript(chosen) or is_transcript(rejected):
        return False
    return _is_prompt(chosen[: _shared(chosen, rejected)]) and not any(map(_asks, row, row.values()))


def _asks(column: str, value: Any) -> bool:
    """Whether a column holds the question that the answers are to: they may begin alike with a phrase."""
    said = _is_prompt(value) if isinstance(value, str) else isinstance(value, list | dict) and bool(value)
    return said and _OF_PROMPT.search(column) is not None


def _is_prompt(text: str) -> bool:
    """Whether it is more than a word: answers to a question that stands elsewhere may begin with the same one."""
    return len(text.split()) > 1


def _fields(row: Row) -> dict[str, Any]:
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    shared = _shared(chosen, rejected)
    if not _is_prompt(chosen[:shared]):
        no_pair("missing_field")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


FORMAT = Format(
    name="implicit_text",
    about="chosen and rejected as texts that begin with the same prompt",
    layout="paired",
    columns=(("chosen", "rejected"),),
    absent=("prompt", "instruction", "question", "input", "query", "context", "messages", "conversations", "history"),
    fits=_fits,
    fields=_fields,
)
