"""What a judge says of two answers: the first, the second, or a tie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.formats.format import TIE, no_pair

_FIRST = frozenset({"model_a", "a", "response_a", "left"})
_SECOND = frozenset({"model_b", "b", "response_b", "right"})
_TIES = frozenset({"tie", "both_bad", "bothbad", "tie (bothbad)", "tie (both bad)"})
COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")
"""Instead of a column `winner`: 1 in one of them."""


def _spelled(winner: Any) -> str:
    return winner.strip().lower() if isinstance(winner, str) else ""


def is_verdict(row: Mapping[str, Any]) -> bool:
    """Whether a row tells one."""
    if "winner" in row:
        return _spelled(row["winner"]) in _FIRST | _SECOND | _TIES
    return _of_columns(row) is not None


def first_is_better(row: Mapping[str, Any]) -> float:
    """1, 0 or TIE. Raises NoPair where there is no verdict."""
    said = _spelled(row["winner"]) if "winner" in row else _of_columns(row)
    if said in _TIES:
        return TIE
    if said not in _FIRST and said not in _SECOND:
        no_pair("null_field" if "winner" in row and row["winner"] is None else "no_winner")
    return said in _FIRST


def _of_columns(row: Mapping[str, Any]) -> str | None:
    said = [name for name in COLUMNS if isinstance(row.get(name), int) and row[name] == 1]
    return said[0].removeprefix("winner_") if len(said) == 1 else None
