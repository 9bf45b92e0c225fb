"""The input layouts, and which columns make a file one of them.

    paired           chosen and rejected, and prompt where they are not whole dialogues
    implicit_prompt  chosen and rejected are whole dialogues; a column `prompt` is not read
    unpaired         prompt, completion, label: one answer, desirable or not
    ranked           prompt, completions, scores: several answers, each with a number; the higher, the better

Rows of any layout may have `tools` and `weight`, and pairs `margin` and `preference`. Fields are called by these names;
what they are called in the files is given as `names`, a mapping of field → column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

from dpo_ray.errors import DataError

Layout = Literal["paired", "implicit_prompt", "unpaired", "ranked"]

_REQUIRED: dict[Layout, tuple[str, ...]] = {
    "paired": ("chosen", "rejected"),
    "implicit_prompt": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "ranked": ("prompt", "completions", "scores"),
}
_OPTIONAL: dict[Layout, tuple[str, ...]] = {
    "paired": ("prompt", "weight", "margin", "preference", "tools"),
    "implicit_prompt": ("weight", "margin", "preference", "tools"),
    "unpaired": ("weight", "tools"),
    "ranked": ("weight", "tools"),
}


def fields_of(layout: Layout) -> tuple[str, ...]:
    """The fields that are read of a row of this layout."""
    return _REQUIRED[layout] + _OPTIONAL[layout]


def texts_of(layout: Layout) -> tuple[str, ...]:
    """Those of the fields that are text or messages."""
    return tuple(field for field in fields_of(layout) if field in {"prompt", "chosen", "rejected", "completion"})


def layout_of(fields: Collection[str]) -> Layout | None:
    """The first layout whose required fields are all there; None where there is none.

    Whether the prompt of paired rows is implicit is seen row by row, so these are `paired` either way.
    """
    return next((layout for layout in get_args(Layout) if set(_REQUIRED[layout]) <= set(fields)), None)


def recognise(
    columns: Collection[str], source: str, *, option: Literal["auto"] | Layout, names: Mapping[str, str]
) -> Layout:
    """The layout of a file with these columns: the one that data.layout names, or by its columns.

    Raises DataError, naming the file, where a column of the layout or one that data.columns names is absent.
    """
    fields = [field for field, column in names.items() if column in columns]
    layout = layout_of(fields) if option == "auto" else option
    wanted = _REQUIRED[layout or "paired"]
    read = wanted if layout is None else fields_of(layout)
    renamed = [field for field, column in names.items() if field != column and (layout is None or field in read)]
    missing = [field for field in dict.fromkeys([*wanted, *renamed]) if field not in fields]
    if layout is not None and not missing:
        return layout
    said = " and no column ".join(_called(field, names) for field in missing)
    raise DataError(
        f"{source} has no column {said} (it has {', '.join(columns) or 'none'}). A preference file holds chosen and "
        "rejected, and prompt where they are not whole dialogues; or prompt, completions and scores; or, with single "
        "answers for train.loss.type=kto, prompt, completion and label. Say what its columns are called with "
        "-o data.columns.chosen=…, rename them, or leave the file out of data.train and data.eval."
    )


def _called(field: str, names: Mapping[str, str]) -> str:
    column = names.get(field, field)
    return column if column == field else f"{column} (data.columns.{field})"
