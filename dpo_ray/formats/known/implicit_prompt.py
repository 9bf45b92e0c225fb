"""chosen and rejected are whole dialogues, and a prompt repeats what they begin with (UltraFeedback binarized)."""

from __future__ import annotations

from dpo_ray.formats.format import Row, is_text, is_turns, layout_format


def repeats_prompt(row: Row) -> bool:
    """Whether the prompt of a row of messages stands in an answer again."""
    prompt = row["prompt"]
    return any(row[side][: len(prompt)] == prompt for side in ("chosen", "rejected"))


def _fits(row: Row) -> bool:
    sides = (row["chosen"], row["rejected"])
    if "prompt" not in row or not all(is_turns(side) and len(side) > 1 for side in sides):
        return False
    return is_text(row["prompt"]) or (is_turns(row["prompt"]) and repeats_prompt(row))


FORMAT = layout_format(
    "implicit_prompt", "chosen and rejected as whole dialogues beside a prompt that they repeat", _fits
)
