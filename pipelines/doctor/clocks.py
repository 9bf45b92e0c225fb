"""Clocks: how far another one may be from this machine's."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.doctor.lines import Found

_SKEW_REFUSED = 900.0  # seconds: S3 answers RequestTimeTooSkewed beyond
_SKEW_TOLD = 10.0  # seconds between two heartbeats of a lease


def clock(whose: str, ahead: float) -> Iterator[Found]:
    """Nothing where the two agree well enough.

    Args:
        ahead: seconds of that clock before this machine's.
    """
    if abs(ahead) <= _SKEW_TOLD:
        return
    said = f"{whose} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    failed = abs(ahead) >= _SKEW_REFUSED
    yield (
        "failed" if failed else "warning",
        f"{said}: object stores refuse requests that are {_SKEW_REFUSED:.0f} s off, and `dpo-ray gc` goes by the times "
        "of files. Have both set their clocks by NTP (chrony, timedatectl set-ntp true).",
    )
