"""A single answer with a label (TRL's unpaired preference)."""

from __future__ import annotations

from dpo_ray.formats.format import Row, is_text, is_turns, layout_format


def is_label(value: object) -> bool:
    """Whether it may say that an answer is desirable."""
    return isinstance(value, bool) or value in (0, 1)


def _fits(row: Row) -> bool:
    prompt, completion = row["prompt"], row["completion"]
    return is_label(row["label"]) and all(is_text(value) or is_turns(value) for value in (prompt, completion))


FORMAT = layout_format("unpaired", "prompt, completion, label", _fits, typed=("label",))
