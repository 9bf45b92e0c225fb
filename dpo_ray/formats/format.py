"""What a format declares, and the looks at values that its functions share.

A look is at one row, and says whether it is written as the format has it. Long values come cut (see CUT): a look goes
by how a value begins and of what type it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from dpo_ray.formats.layout import Layout, beside, fields_of, required_of

Row = Mapping[str, Any]
CUT = 400
"""Characters of a text that a look is given, at most."""
CUT_LIST = 8
"""Entries of a list that a look is given, at most: its first ones."""
TIE = 0.5
"""The preference between two answers that are said to be equally good."""
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
_ROLE = re.compile(r"""(["'])(?:role|from)\1\s*:\s*(["'])(?:system|user|assistant|tool|human|gpt)\2""")
_CUT_KEYS, _CUT_DEPTH = 64, 8  # of what is inside of a column


class NoPair(Exception):
    """A row that makes no pair; `reason` is a name of dpo_ray.data.rules.REASONS."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def no_pair(reason: str) -> NoReturn:
    """Raise NoPair."""
    raise NoPair(reason)


def _as_it_is(row: Row) -> Row:
    return row


@dataclass(frozen=True)
class Format:
    """How preference data are written in one place or another."""

    name: str
    about: str
    """Whose it is, and its columns, in a line."""
    layout: Layout
    """Of the rows that `fields` makes."""
    columns: tuple[tuple[str, ...], ...]
    """The columns that make a file one of these: all of one of these groups."""
    fits: Callable[[Row], bool]
    """The look at a row that has the columns."""
    fields: Callable[[Row], Row] = _as_it_is
    """A row of this format as a row of the layout. Raises NoPair."""
    optional: tuple[str, ...] = ()
    """Columns that are read where they are there."""
    absent: tuple[str, ...] = ()
    """Columns that make a file another format's."""
    joins: str | None = None
    """A column: rows that follow each other with the same value in it are one row, with lists of what is in the others.
    A look is at a row as it lies."""
    typed: tuple[str, ...] = ()
    """Columns of numbers, truth values or lists. Where one comes as text, as from CSV, it is read as JSON."""

    @property
    def is_layout(self) -> bool:
        """Whether its rows are those of a layout already, with the layout's own fields."""
        return self.fields is _as_it_is

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The columns that are read of a row."""
        if self.is_layout:
            return fields_of(self.layout)
        grouped = [column for group in self.columns for column in group]
        return tuple(dict.fromkeys([*grouped, *self.optional, *beside(self.layout)]))

    def has(self, columns: Collection[str]) -> bool:
        """Whether a file with these columns may be one of these."""
        return not self.missing(columns) and not any(column in columns for column in self.absent)

    def missing(self, columns: Collection[str]) -> tuple[str, ...]:
        """What these columns lack; of several groups, of the one that they lack least of."""
        lacking = [tuple(column for column in group if column not in columns) for group in self.columns]
        return min(lacking, key=len)

    def looks_so(self, row: Row) -> bool:
        """Whether a row is written as this format has it."""
        return self.has(row) and self.fits(self._decoded(row))

    def row(self, row: Row) -> dict[str, Any]:
        """A row as a row of the layout. Raises NoPair."""
        row = self._decoded(row)
        if self.is_layout:
            return dict(row)
        passed_on = {field: row[field] for field in beside(self.layout) if field in row}
        if self.joins is not None:  # of rows that are one, the first one's
            passed_on = {field: values[0] for field, values in passed_on.items()}
        return {**passed_on, **self.fields(row)}

    def _decoded(self, row: Row) -> Row:
        numbers = [field for field in beside(self.layout) if field not in {"system", "tools"}]
        found = {name: json_value(row[name]) for name in (*self.typed, *numbers) if isinstance(row.get(name), str)}
        return {**row, **found} if found else row


def json_value(text: str) -> Any:
    """What a text says as JSON, true and false in any case; the text itself where it is none."""
    lowered = text.strip().lower()
    try:
        return json.loads(lowered if lowered in {"true", "false"} else text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def cut(row: Row) -> dict[str, Any]:
    """A row as a look is given it: long texts and lists cut, and what is nested deep left out."""
    return {column: _cut(value, _CUT_DEPTH) for column, value in row.items()}


def _cut(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value[:CUT]
    if isinstance(value, list | dict) and not depth:
        return None
    if isinstance(value, list):
        return [_cut(entry, depth - 1) for entry in value[:CUT_LIST]]
    if isinstance(value, dict):
        return {key: _cut(inner, depth - 1) for key, inner in list(value.items())[:_CUT_KEYS]}
    return value


def layout_format(layout: Layout, about: str, fits: Callable[[Row], bool], typed: tuple[str, ...] = ()) -> Format:
    """The format whose columns are a layout's own fields."""
    return Format(layout, about, layout, (required_of(layout),), fits, typed=typed)


def is_text(*values: Any) -> bool:
    """Whether all are text, and none of it is a list of messages written as text."""
    return all(isinstance(value, str) and not is_written_out(value) for value in values)


def is_written_out(value: Any, *, whole: bool = False) -> bool:
    """Whether a text begins as a list of messages does: JSON in a cell, or Python, as pandas writes it.

    whole: the text is not cut, so that a role must stand somewhere in it.
    """
    if not isinstance(value, str) or _WRITTEN_OUT.match(value) is None:
        return False
    return (len(value) >= CUT and not whole) or _ROLE.search(value) is not None


def is_turns(value: Any, role: str = "role", content: str = "content") -> bool:
    """Whether it is a list of messages, with such keys."""
    return isinstance(value, list) and bool(value) and all(is_turn(turn, role, content) for turn in value)


def is_turn(value: Any, role: str = "role", content: str = "content") -> bool:
    """Whether it is a message with such keys."""
    return isinstance(value, dict) and isinstance(value.get(role), str) and content in value


def is_transcript(value: Any) -> bool:
    """Whether a text begins as the transcripts of HH-RLHF do, also stripped of white space or with CRLF."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def text(row: Row, column: str) -> str:
    """The text of a column. Raises NoPair where there is none."""
    value = present(row, column)
    if not isinstance(value, str):
        no_pair("non_string_content")
    return value


def present(row: Row, column: str) -> Any:
    """What is in a column. Raises NoPair where it is null or absent."""
    if column not in row:
        no_pair("missing_field")
    if row[column] is None:
        no_pair("null_field")
    return row[column]


def asked(question: Any) -> list[dict[str, Any]]:
    """A question as a dialogue."""
    return [{"role": "user", "content": question}]


def answered(answer: Any) -> list[dict[str, Any]]:
    """An answer as a list of one message."""
    return [{"role": "assistant", "content": answer}]


def compared(first: Any, second: Any, first_is_better: float) -> dict[str, Any]:
    """The answers of a row of the layout paired. first_is_better: 1, 0, or TIE, which is a preference of its own."""
    chosen, rejected = (first, second) if first_is_better else (second, first)
    return {"chosen": chosen, "rejected": rejected, **({"preference": TIE} if first_is_better == TIE else {})}
