"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: float, digits: int = 3) -> str:
    """To so many digits that count, without an exponent where there is no need for one."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{min(decimals, 6)}f}"
    return f"{value:.{digits - 1}e}"


def estimate(found: Mapping[str, Any]) -> str:
    """Value, 95% interval and n."""
    return f"{found['value']:.3f} {interval(found)} (n={found['n']:,})"


def interval(found: Mapping[str, Any]) -> str:
    return f"[{found['low']:.3f}, {found['high']:.3f}]"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(counts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {count:,}" if isinstance(count, int) else f"{name} {count}" for name, count in counts.items()
    )
