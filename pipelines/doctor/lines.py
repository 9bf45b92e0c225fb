"""What the looks find, as lines for a person and as JSON for programs."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from dpo_ray.errors import ConfigError, DpoRayError

Status = Literal["ok", "warning", "failed"]
Found = tuple[Status, str]
Check = Callable[[], Iterator[Found]]


@dataclass(frozen=True)
class Line:
    """What one look found."""

    check: str
    status: Status
    said: str
    """With the way out where it is not ok."""
    exit_code: int
    """That a run would end with; 0 where it would not end by this."""

    def __str__(self) -> str:
        return f"{self.status:8}{self.check}: {self.said}"


def looked_at(name: str, check: Check) -> Iterator[Line]:
    """The lines of a check, whatever it raises."""
    try:
        for status, said in check():
            yield Line(name, status, said, ConfigError.exit_code if status == "failed" else 0)
    except DpoRayError as error:
        yield Line(name, "failed", str(error), error.exit_code)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = (
            f"This check itself ended with {type(error).__name__}: {' '.join(str(error).split())} ({last.filename}:"
            f"{last.lineno}). What it looks at may be in order or not; a run would meet the same there. It is worth "
            "reporting, with this line."
        )
        yield Line(name, "failed", said, DpoRayError.exit_code)


def exit_code(lines: Sequence[Line]) -> int:
    """That of the first failure, which a run would meet first; 0 where nothing failed."""
    return next((line.exit_code for line in lines if line.status == "failed"), 0)


def as_told(lines: Sequence[Line]) -> str:
    """For programs."""
    return json.dumps({"exit_code": exit_code(lines), "lines": [asdict(line) for line in lines]}, ensure_ascii=False)


def last_words(lines: Sequence[Line]) -> str:
    """What it comes to."""
    failed, warned = (sum(line.status == status for line in lines) for status in ("failed", "warning"))
    if not failed:
        return f"Nothing failed in {len(lines)} looks; {warned} warnings."
    return f"{failed} of {len(lines)} looks failed, {warned} warned. A run would end with exit code {exit_code(lines)}."
