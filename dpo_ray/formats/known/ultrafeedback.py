"""An instruction with scored completions (UltraFeedback)."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, is_text, no_pair, present, text


def _fits(row: Row) -> bool:
    completions = row["completions"]
    return is_text(row["instruction"]) and isinstance(completions, list) and all(map(_is_scored, completions))


def _is_scored(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("response"), str) and "overall_score" in value


def _fields(row: Row) -> dict[str, Any]:
    completions = present(row, "completions")
    if not isinstance(completions, list) or not all(isinstance(entry, dict) for entry in completions):
        no_pair("non_string_content")
    return {
        "prompt": text(row, "instruction"),
        "completions": [entry.get("response") for entry in completions],
        "scores": [entry.get("overall_score") for entry in completions],
    }


FORMAT = Format(
    name="ultrafeedback",
    about="instruction, and completions with response and overall_score",
    layout="ranked",
    columns=(("instruction", "completions"),),
    fits=_fits,
    fields=_fields,
)
