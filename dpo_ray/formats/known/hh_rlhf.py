"""HH-RLHF as it is published: chosen and rejected are transcripts; or answers, with a transcript as their prompt."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, answered, is_text, is_transcript, text
from dpo_ray.formats.transcript import question, turns


def _fits(row: Row) -> bool:
    sides = (row["chosen"], row["rejected"])
    whole = [is_transcript(side) for side in sides]
    return all(whole) or (is_transcript(row.get("prompt")) and is_text(*sides) and not any(whole))


def _fields(row: Row) -> dict[str, Any]:
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if is_transcript(chosen) or "prompt" not in row:
        return {"chosen": turns(chosen), "rejected": turns(rejected)}
    asked = question(text(row, "prompt"))
    return {"prompt": asked, "chosen": answered(chosen.lstrip(" ")), "rejected": answered(rejected.lstrip(" "))}


FORMAT = Format(
    name="hh_rlhf",
    about="chosen and rejected as transcripts of Human and Assistant",
    layout="paired",
    columns=(("chosen", "rejected"),),
    optional=("prompt",),
    fits=_fits,
    fields=_fields,
)
