"""chosen and rejected are lists of messages written as text: JSON in a cell, or Python, as pandas writes them."""

from __future__ import annotations

import ast
import json
from typing import Any

from dpo_ray.formats.format import Format, Row, asked, is_written_out, no_pair, text
from dpo_ray.formats.known.implicit_prompt import repeats_prompt
from dpo_ray.formats.sharegpt_turns import messages


def _fits(row: Row) -> bool:
    return is_written_out(row["chosen"]) and is_written_out(row["rejected"])


def _fields(row: Row) -> dict[str, Any]:
    sides = {side: _read(text(row, side)) for side in ("chosen", "rejected")}
    if is_written_out(row.get("prompt"), whole=True):
        whole = {"prompt": _read(text(row, "prompt")), **sides}
        return sides if repeats_prompt(whole) else whole
    are_answers = all(turns and turns[0].get("role") == "assistant" for turns in sides.values())
    # A prompt beside whole dialogues says again what they hold.
    return {"prompt": asked(text(row, "prompt")), **sides} if are_answers else sides


def _read(written: str) -> list[dict[str, Any]]:
    try:
        return messages(json.loads(written))
    except (ValueError, RecursionError):
        pass
    try:
        return messages(ast.literal_eval(written.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # as where numpy left out the commas
        no_pair("messages_as_text")


FORMAT = Format(
    name="messages_as_text",
    about="chosen and rejected, and mostly prompt, as lists of messages that are written as text",
    layout="paired",
    columns=(("chosen", "rejected"),),
    optional=("prompt",),
    fits=_fits,
    fields=_fields,
)
