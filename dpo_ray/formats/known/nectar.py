"""A prompt with ranked answers (Nectar): rank 1 is the best."""

from __future__ import annotations

import math
from typing import Any

from dpo_ray.formats.format import Format, Row, is_text, is_transcript, no_pair, present, text
from dpo_ray.formats.transcript import question


def _fits(row: Row) -> bool:
    answers = row["answers"]
    return is_text(row["prompt"]) and isinstance(answers, list) and bool(answers) and all(map(_is_ranked, answers))


def _is_ranked(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("answer"), str) and "rank" in value


def _fields(row: Row) -> dict[str, Any]:
    prompt, answers = text(row, "prompt"), present(row, "answers")
    if not isinstance(answers, list) or not all(isinstance(entry, dict) for entry in answers):
        no_pair("non_string_content")
    return {
        "prompt": question(prompt) if is_transcript(prompt) else prompt,
        "completions": [entry.get("answer") for entry in answers],
        "scores": [-_rank(entry.get("rank")) for entry in answers],
    }


def _rank(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        no_pair("bad_scores")
    return value


FORMAT = Format(
    name="nectar",
    about="prompt, and answers with answer and rank, of which 1 is the best",
    layout="ranked",
    columns=(("prompt", "answers"),),
    fits=_fits,
    fields=_fields,
)
