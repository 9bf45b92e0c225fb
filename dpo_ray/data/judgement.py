"""How a pair was judged, beside which answer is the better one: its weight, its margin, its preference.

What says no more than a pair without it is left out of the pair: a weight of 1, a margin of 0, a preference of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from dpo_ray.data.rules import Reason, reject
from dpo_ray.pairs import TIE, PreferencePair


def judged(pair: PreferencePair, row: Mapping[str, Any], ties: Literal["drop", "keep"]) -> PreferencePair:
    """A pair with what its row says of it: `weight` above 0, `margin` of 0 or more, `preference` from 0 to 1.

    The answer with a preference of .5 or more is chosen: sides that are the other way round change places. Of a tie the
    sides have an order of their own, so that the same tie is the same pair whichever answer came first.

    Raises rules.BadRow on other values, and on a tie where these are dropped.
    """
    weight = _number(row.get("weight"), "bad_weight")
    margin = _number(row.get("margin"), "bad_margin")
    preference = _number(row.get("preference"), "bad_preference") if pair.preference is None else pair.preference
    if weight is not None and weight <= 0:
        reject("bad_weight")
    if margin is not None and margin < 0:
        reject("bad_margin")
    if preference is not None and not 0 <= preference <= 1:
        reject("bad_preference")
    if preference == TIE and ties == "drop":
        reject("tie")
    swapped = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    if preference is not None and preference < TIE:
        pair, preference = swapped, 1 - preference
    elif preference == TIE:
        pair = min(pair, swapped, key=lambda one: replace(one, preference=None).pair_id)
    return replace(pair, weight=_or_none(weight, 1), margin=_or_none(margin, 0), preference=_or_none(preference, 1))


def _number(value: Any, reason: Reason) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        reject(reason)
    try:
        number = float(value)
    except OverflowError:
        reject(reason)
    if not math.isfinite(number):
        reject(reason)
    return number


def _or_none(value: float | None, nothing: float) -> float | None:
    return None if value == nothing else value
