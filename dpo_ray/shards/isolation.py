"""Finding the rows of a shard that an engine cannot do, without losing the others.

Some rows make an engine raise. Others end its process: by a segmentation fault, or because it is killed for its memory.
A dead process cannot report its row. So each range of rows is noted in a file beside the shards before it is done, and
the next attempt at the shard reads there what was in flight. A range that failed is split and done again, until the
rows are found that fail alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import DataError, DpoRayError, EngineDied
from dpo_ray.storage.location import Location

Value = TypeVar("Value")


Failure = Literal["engine_error", "engine_crash"]
"""What came of a row that the engine cannot do: an exception, or the end of its process."""


FAILURES: tuple[Failure, ...] = get_args(Failure)


# A failed range is split into this many parts: each crash costs an engine restart, running healthy rows again is cheap.
_PARTS = 8
MAX_ATTEMPTS = 64
"""A shard is an error after this many attempts. A row that kills its process costs about six, in a shard of 512."""
# The engine is at fault after this many crashes without a range that came through.
_HOPELESS = 6
# As many rows tell whether the engine works at all: a batch, and few enough to hold none of some bad rows of a shard of
# any size.
_SAMPLE = 64
_MESSAGE_BOUND = 500  # characters that are kept of an engine's message


class FailedRow(BaseModel):
    """A row that the engine cannot do."""

    model_config = ConfigDict(frozen=True)

    place: int
    """0-based row of the shard."""
    reason: Failure
    message: str


class _Range(BaseModel):
    """Rows [first, first + count) that are done together."""

    first: int
    count: int
    deaths: int = 0
    well: bool = False
    """It came through once; its results were lost when a later range crashed."""


class _Notes(BaseModel):
    """What is known of a shard. Its ranges and its failed rows are all of its rows."""

    model_config = ConfigDict(extra="forbid")

    ranges: list[_Range]
    failed: list[FailedRow] = []
    in_flight: int | None = None
    """First row of the range that is being done."""
    message: str = ""
    """What the engine said last of the range in flight."""
    attempts: int = 0
    deaths: int = 0
    came_through: bool = False
    """Some range came through, so the engine works."""


@dataclass(frozen=True)
class Attempts:
    """The notes on one shard, in a file that is there only while the shard is unfinished."""

    location: Location

    def read(self) -> _Notes | None:
        """The notes of an attempt that did not finish. Raises DataError where they are damaged."""
        try:
            data = self.location.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _Notes.model_validate_json(data)
        except ValidationError as error:
            raise DataError(f"{self.location} is damaged. Remove it; its shard will then be done anew.") from error

    def write(self, notes: _Notes) -> None:
        self.location.write_bytes(notes.model_dump_json().encode())

    def clear(self) -> None:
        """Remove the notes: the shard is written, or its next attempt begins anew."""
        self.location.remove()


def isolate(
    num_rows: int, work: Callable[[int, int], Sequence[Value]], attempts: Attempts
) -> tuple[dict[int, Value], list[FailedRow]]:
    """Do all rows of a shard except those that the engine cannot do.

    A healthy shard takes one call and one note. After the first crash of a shard all its rows are done together again,
    for the cause may lie outside of it. A row is given up when it raised alone, or when it ended two processes alone.

    Args:
        work: (first, count) → a result for each of these rows. An exception means that one of the rows fails. The end
            of the process, or EngineDied, which is raised again, means that one of them kills.
        attempts: the notes. The caller clears them once it has written the shard.

    Returns the results by row, and the rows without one.

    Raises DpoRayError where the engine is at fault and not a row: no row can be done, or the crashes do not end.
    """
    if num_rows == 0:
        return {}, []
    notes = attempts.read() or _Notes(ranges=[_Range(first=0, count=num_rows)])
    notes.attempts += 1
    _account_for_death(notes, num_rows)
    _require_hope(notes, num_rows, attempts)
    results: dict[int, Value] = {}
    while (rows := _next(notes, results)) is not None:
        notes.in_flight, notes.message = rows.first, ""
        attempts.write(notes)
        try:
            values = work(rows.first, rows.count)
        except EngineDied as error:
            notes.message = _told(error.__cause__ or error)
            attempts.write(notes)
            raise
        except Exception as error:
            notes.message = _told(error)
            _fail(notes, rows, "engine_error")
            if len(notes.failed) == num_rows > 1:
                _give_up(attempts, notes, f"all its {num_rows} rows failed", error)
            continue
        rows.well = notes.came_through = True
        results.update(zip(range(rows.first, rows.first + rows.count), values, strict=True))
    if notes.attempts > 1:
        # A crash after this line is not due to the range that was done last.
        notes.in_flight = None
        attempts.write(notes)
    return results, sorted(notes.failed, key=lambda row: row.place)


def _account_for_death(notes: _Notes, num_rows: int) -> None:
    """Blame the range that was in flight when the last attempt crashed."""
    rows = next((r for r in notes.ranges if r.first == notes.in_flight), None)
    notes.in_flight = None
    if rows is None:
        return
    notes.deaths += 1
    if rows.well:
        rows.well = False  # these rows came through before, so the cause is elsewhere
        return
    rows.deaths += 1
    if rows.deaths >= 2 or 1 < rows.count < num_rows:
        notes.message = notes.message or "the process died"
        _fail(notes, rows, "engine_crash")


def _fail(notes: _Notes, rows: _Range, reason: Failure) -> None:
    """Split the range, or give up its only row."""
    notes.ranges.remove(rows)
    if rows.count == 1:
        notes.failed.append(FailedRow(place=rows.first, reason=reason, message=notes.message))
        return
    parts = min(_PARTS, rows.count)
    cuts = [rows.first + rows.count * part // parts for part in range(parts + 1)]
    if not notes.came_through:
        cuts = sorted({*cuts, *(min(first + _SAMPLE, end) for first, end in pairwise(cuts))})
    notes.ranges += [_Range(first=a, count=b - a) for a, b in pairwise(cuts)]


def _next(notes: _Notes, results: dict[int, Value]) -> _Range | None:
    """The largest range whose outcome is unknown; until it is known that the engine works, one like the sample.

    Those that came through before are last: a crash would lose them.
    """

    def order(rows: _Range) -> tuple[bool, int, int]:
        return rows.well, -rows.count if notes.came_through else abs(rows.count - _SAMPLE), rows.first

    return min((r for r in notes.ranges if r.first not in results), key=order, default=None)


def _require_hope(notes: _Notes, num_rows: int, attempts: Attempts) -> None:
    if len(notes.failed) == num_rows > 1:
        _give_up(attempts, notes, f"the process died at each of its {num_rows} rows")
    if notes.deaths >= _HOPELESS and not notes.came_through:
        _give_up(attempts, notes, f"the process died {notes.deaths} times, whichever of its rows it did")
    if notes.attempts > MAX_ATTEMPTS:
        found = f"; {len(notes.failed)} rows were found that it cannot do" if notes.failed else ""
        _give_up(attempts, notes, f"{MAX_ATTEMPTS} attempts did not finish it{found}")


def _give_up(attempts: Attempts, notes: _Notes, what: str, cause: Exception | None = None) -> NoReturn:
    last = notes.message or next((row.message for row in reversed(notes.failed)), "")
    attempts.clear()
    raise DpoRayError(
        f"The engine failed on the shard {attempts.location.name.removesuffix('.json')}: {what}"
        f"{f' (the last time: {last})' if last else ''}. So it is the engine that is at fault, and no row was left "
        "out. Look for its own words in the workers' logs (/tmp/ray/session_latest/logs); too little memory is the "
        "common cause: lower vllm.max_num_batched_tokens, vllm.gpu_memory_utilization or data.rows_per_shard."
    ) from cause


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MESSAGE_BOUND]
