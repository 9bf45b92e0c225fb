"""A clock that is wrong, for single processes: libfaketime, which Debian and others have as a package."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

_PLACES = "usr/lib/*/faketime/libfaketimeMT.so.1"


@dataclass(frozen=True)
class WrongClock:
    """Of all processes that have its environment."""

    file: Path
    library: Path

    @property
    def env(self) -> dict[str, str]:
        """Files keep the times of whoever stores them, and the monotonic clock never jumps."""
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, seconds: int) -> None:
        """Within a second it is off by so many."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(f"{seconds:+d}s\n")
        partial.replace(self.file)


def wrong_clock(file: Path, seconds: int = 0) -> WrongClock:
    """One that is off by so many seconds at first. Skips a test where there is no libfaketime."""
    named = os.environ.get("DPO_RAY_FAKETIME")
    found = [Path(named)] if named else sorted(Path("/").glob(_PLACES))
    if not found:
        pytest.skip(
            "there is no libfaketime: apt-get install libfaketime, or name its libfaketimeMT.so.1 by DPO_RAY_FAKETIME"
        )
    made = WrongClock(file, found[0])
    made.set(seconds)
    return made
