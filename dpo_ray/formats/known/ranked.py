"""Several answers to a prompt, each with a score."""

from __future__ import annotations

from dpo_ray.formats.format import Row, is_text, is_turns, layout_format


def _fits(row: Row) -> bool:
    prompt, completions, scores = row["prompt"], row["completions"], row["scores"]
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        return False
    return all(is_text(value) or is_turns(value) for value in (prompt, *completions))


FORMAT = layout_format("ranked", "prompt, completions, scores", _fits, typed=("completions", "scores"))
