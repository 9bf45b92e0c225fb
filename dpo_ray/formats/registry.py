"""All formats, and which of them a file is: by its columns and its first rows.

Every module of dpo_ray.formats.known is a format. A file that is to be read may fit one only: what two of them claim is
for whoever knows the data to say.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from dpo_ray.errors import DataError
from dpo_ray.formats import known
from dpo_ray.formats.format import Format, Row

AUTO = "auto"


@cache
def formats() -> dict[str, Format]:
    """Name → format, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(known.__path__))
    found: list[Format] = [importlib.import_module(f"{known.__name__}.{name}").FORMAT for name in names]
    return {format_.name: format_ for format_ in found}


def renamed(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    """A row, or a mapping of columns, with the columns that are given as fields called by the fields' names.

    A column that is called as a field which is another column is not that field, and is left out.

    Args:
        names: field → column, of those fields whose column has another name.
    """
    if not names:
        return dict(row)
    by_column = {column: field for field, column in names.items()}
    return {by_column.get(c, c): value for c, value in row.items() if c in by_column or c not in names}


def recognise(
    columns: Collection[str], rows: Sequence[Row], source: str, *, option: str, names: Mapping[str, str]
) -> Format:
    """The format of a file: the one that data.layout names, or the only one that fits it.

    A format fits where its columns are there and at least half of the first rows are written as it has them. Where that
    is so of none, it is the one that most of them fit, and the rows are left to be judged one by one.

    Args:
        columns: of the file.
        rows: its first ones, as `cut` leaves them.
        option: data.layout.
        names: data.columns, field → column.

    Raises DataError, naming the file, where a column of the format or one that data.columns names is absent, where no
    format has such columns, and where several fit.
    """
    fields = renamed(dict.fromkeys(columns), names)
    named = [formats()[option]] if option != AUTO else []
    candidates = named or [format_ for format_ in formats().values() if format_.has(fields)]
    read = {column for format_ in candidates or formats().values() for column in format_.reads}
    lost = [f for f, column in names.items() if column not in columns and f in read]
    missing = [f for format_ in named for f in format_.missing(fields) if f not in lost]
    if lost or missing:
        raise _missing([*missing, *(f"{names[f]} (data.columns.{f})" for f in lost)], columns, source)
    if named:
        return named[0]
    if not candidates:
        raise _unknown(fields, columns, source)
    looked = [renamed(row, names) for row in rows]
    fitting = {format_: sum(format_.looks_so(row) for row in looked) for format_ in candidates}
    found = [format_ for format_, number in fitting.items() if number and 2 * number >= len(looked)]
    if not found:
        return _mostly_broken(fitting, len(rows), source)
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{format_.name} ({format_.about})" for format_ in found)
    raise DataError(
        f"{source} may be read in {len(found)} ways, and its first {len(rows)} rows do not tell which is meant: "
        f"{listed}. Say it with -o data.layout={found[0].name}, or "
        f"{' or '.join(f'data.layout={format_.name}' for format_ in found[1:])}; or put rows of each kind into "
        "files of their own."
    )


_ORDER = {"paired": 0, "unpaired": 1, "ranked": 2}


def _mostly_broken(fitting: Mapping[Format, int], rows: int, source: str) -> Format:
    """Of a file whose first rows are mostly broken, or that has none: by the rows that are not, or by its columns."""
    most = max(fitting.values())
    best = [format_ for format_, number in fitting.items() if number == most]
    if most and len(best) == 1:
        return best[0]
    plain = [format_ for format_ in best if format_.is_layout]
    if plain or not rows:
        return min(plain or best, key=lambda format_: _ORDER.get(format_.name, len(_ORDER)))
    claimed = "; ".join(f"{format_.name}: {format_.about}" for format_ in best)
    raise DataError(
        f"{source} has the columns of {' and of '.join(format_.name for format_ in best)}, but none of its first "
        f"{rows} rows is written so ({claimed}). See why with `dpo-ray data FILE -o data.layout={best[0].name}`, and "
        "write the rows as that format has them."
    )


_WAY_OUT = (
    "A preference file holds chosen and rejected, and prompt where they are not whole dialogues; or prompt, "
    "completions and scores; or, with single answers for train.loss.type=kto, prompt, completion and label; or what "
    "one of these formats has: {formats}. Say what its columns are called with -o data.columns.chosen=…, rename them, "
    "or leave the file out of data.train and data.eval."
)


def _missing(missing: Collection[str], columns: Collection[str], source: str, near: str = "") -> DataError:
    way_out = _WAY_OUT.format(formats=", ".join(formats()))
    return DataError(
        f"{source} has no column {' and no column '.join(missing)} (it has {', '.join(columns) or 'none'}). "
        f"{near}{way_out}"
    )


def _unknown(fields: Collection[str], columns: Collection[str], source: str) -> DataError:
    """Where no format has these columns: what the nearest ones ask for."""
    lacking = {format_: format_.missing(fields) for format_ in formats().values()}
    has = {format_: max(sum(c in fields for c in group) for group in format_.columns) for format_ in lacking}
    partly = [format_ for format_ in lacking if has[format_] and not format_.is_layout]
    near = sorted(partly, key=lambda format_: (len(lacking[format_]), -has[format_]))[:3]
    said = "; ".join(f"{format_.name} lacks {' and '.join(lacking[format_]) or 'nothing'}" for format_ in near)
    missing = formats()["paired"].missing(fields)
    return _missing(missing, columns, source, f"Of the nearest formats {said}. " if near else "")
