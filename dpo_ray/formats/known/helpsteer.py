"""An answer a row, judged by attributes (HelpSteer, HelpSteer2): the answers to a prompt follow each other."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, is_text, json_value, no_pair, present, text
from dpo_ray.formats.transcript import marked_turns

_SCORE = "helpfulness"


def _fits(row: Row) -> bool:
    return is_text(row["prompt"], row["response"]) and isinstance(row[_SCORE], int | float)


def _fields(row: Row) -> dict[str, Any]:
    responses, scores = present(row, "response"), present(row, _SCORE)
    if not isinstance(responses, list) or not isinstance(scores, list):
        no_pair("non_string_content")
    numbers = [json_value(score) if isinstance(score, str) else score for score in scores]
    return {"prompt": marked_turns(text(row, "prompt")), "completions": responses, "scores": numbers}


FORMAT = Format(
    name="helpsteer",
    about="prompt, response, helpfulness: a row for each answer, ranked by helpfulness",
    layout="ranked",
    columns=(("prompt", "response", _SCORE),),
    absent=("completion", "chosen", "rejected"),
    joins="prompt",
    typed=(_SCORE,),
    fits=_fits,
    fields=_fields,
)
