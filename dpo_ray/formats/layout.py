"""The layouts: what the pairs are made of, whatever a file calls it.

    paired           chosen and rejected, and prompt where they are not whole dialogues
    implicit_prompt  chosen and rejected are whole dialogues; a field `prompt` is not read
    unpaired         prompt, completion, label: one answer, desirable or not
    ranked           prompt, completions, scores: several answers, each with a number; the higher, the better

Rows of any layout may have `system`, `tools` and `weight`, and pairs `margin` and `preference`. A format
(dpo_ray.formats.format) says how rows become rows of a layout.
"""

from __future__ import annotations

from typing import Literal

Layout = Literal["paired", "implicit_prompt", "unpaired", "ranked"]

_REQUIRED: dict[Layout, tuple[str, ...]] = {
    "paired": ("chosen", "rejected"),
    "implicit_prompt": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "ranked": ("prompt", "completions", "scores"),
}
_OPTIONAL: dict[Layout, tuple[str, ...]] = {
    "paired": ("prompt", "system", "weight", "margin", "preference", "tools"),
    "implicit_prompt": ("system", "weight", "margin", "preference", "tools"),
    "unpaired": ("system", "weight", "tools"),
    "ranked": ("system", "weight", "tools"),
}


def required_of(layout: Layout) -> tuple[str, ...]:
    """The fields that every row of this layout has."""
    return _REQUIRED[layout]


def fields_of(layout: Layout) -> tuple[str, ...]:
    """The fields that are read of a row of this layout."""
    return _REQUIRED[layout] + _OPTIONAL[layout]


def beside(layout: Layout) -> tuple[str, ...]:
    """Those of the fields that stand beside prompt and answers: they are called the same in every format."""
    return tuple(field for field in _OPTIONAL[layout] if field != "prompt")


def texts_of(layout: Layout) -> tuple[str, ...]:
    """Those of the fields that are text or messages."""
    return tuple(field for field in fields_of(layout) if field in {"prompt", "chosen", "rejected", "completion"})
