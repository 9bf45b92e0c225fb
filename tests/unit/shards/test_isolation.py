"""Rows that an engine cannot do are found exactly, whatever kills it and when; the others are done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import DataError, DpoRayError, EngineDied
from dpo_ray.shards.isolation import MAX_ATTEMPTS, Attempts, FailedRow, _Notes, isolate
from dpo_ray.storage.location import Location

Work = Callable[[int, int], Sequence[int]]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Memory:
    """Attempts whose file is kept in memory, and counted."""

    location = Location("/nowhere/shard.json")

    def __init__(self) -> None:
        self.kept: str | None = None
        self.writes = 0

    def read(self):
        return None if self.kept is None else _Notes.model_validate_json(self.kept)

    def write(self, notes) -> None:
        self.kept = notes.model_dump_json()
        self.writes += 1

    def clear(self) -> None:
        self.kept = None


def engine(raises: set[int] = frozenset(), kills: set[int] = frozenset(), asked: list | None = None) -> Work:
    """Gives each row its square; some rows make it raise, some end its process."""

    def work(first: int, count: int) -> list[int]:
        rows = range(first, first + count)
        if asked is not None:
            asked.append((first, count))
        if kills & set(rows):
            raise Killed
        if bad := raises & set(rows):
            raise ValueError(f"row {min(bad)} is bad")
        return [row * row for row in rows]

    return work


def until_done(num_rows: int, work: Work, attempts: Attempts | Memory) -> tuple[dict[int, int], list[FailedRow], int]:
    """Begin again after each death; also how often it died."""
    deaths = 0
    while True:
        try:
            return *isolate(num_rows, work, attempts), deaths
        except (Killed, EngineDied):
            deaths += 1
            assert deaths <= MAX_ATTEMPTS


def squares(num_rows: int, without: set[int]) -> dict[int, int]:
    return {row: row * row for row in range(num_rows) if row not in without}


def test_where_nothing_is_wrong_all_rows_are_done_at_once_with_one_note():
    attempts, asked = Memory(), []
    results, failed = isolate(300, engine(asked=asked), attempts)
    assert results == squares(300, set()) and failed == []
    assert asked == [(0, 300)]
    assert attempts.writes == 1


def test_no_rows_need_no_note():
    attempts = Memory()
    assert isolate(0, engine(), attempts) == ({}, [])
    assert attempts.writes == 0


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_rows_that_raise_are_found_and_all_others_done(case: tuple[int, set[int]]):
    num_rows, bad = case
    results, failed = isolate(num_rows, engine(raises=bad), Memory())
    assert results == squares(num_rows, bad)
    assert [(row.place, row.reason, row.message) for row in failed] == [
        (place, "engine_error", f"ValueError: row {place} is bad") for place in sorted(bad)
    ]


@given(
    st.integers(12, 600).flatmap(
        lambda n: st.tuples(
            st.just(n), st.sets(st.integers(0, n - 1), max_size=3), st.sets(st.integers(0, n - 1), max_size=3)
        )
    )
)
def test_rows_that_kill_are_found_beside_rows_that_raise(case: tuple[int, set[int], set[int]]):
    num_rows, kills, raises = case
    raises -= kills
    results, failed, deaths = until_done(num_rows, engine(raises, kills), Memory())
    assert results == squares(num_rows, kills | raises)
    assert {row.place: row.reason for row in failed} == {
        **dict.fromkeys(raises, "engine_error"),
        **dict.fromkeys(kills, "engine_crash"),
    }
    # Twice together, once in each smaller range, twice alone.
    assert deaths <= 2 + len(kills) * (1 + math.ceil(math.log(num_rows, 8)))


@given(
    st.integers(20, 300),
    st.sets(st.integers(0, 19), max_size=2),
    st.sets(st.integers(0, 19), max_size=2),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_what_is_found_does_not_depend_on_deaths_from_outside(
    num_rows: int, kills: set[int], raises: set[int], outside: list[int]
):
    raises -= kills
    calls = 0
    due = sorted(set(outside))

    def work(first: int, count: int) -> list[int]:
        nonlocal calls
        calls += 1
        # A node is lost while a range of several rows is done; that it hits one row alone twice is left out.
        if due and calls >= due[0] and count > 1:
            due.pop(0)
            raise Killed
        return engine(raises, kills)(first, count)

    results, failed, _ = until_done(num_rows, work, Memory())
    assert results == squares(num_rows, kills | raises)
    assert {row.place for row in failed} == kills | raises


def test_after_one_death_from_outside_the_shard_is_done_in_one_piece_again():
    attempts, asked = Memory(), []
    with pytest.raises(Killed):
        isolate(40, engine(kills={7}), attempts)
    results, failed = isolate(40, engine(asked=asked), attempts)
    assert asked == [(0, 40)] and failed == []
    assert results == squares(40, set())


@pytest.mark.parametrize("place", [0, 7, 39])
def test_one_row_alone_is_given_up_after_its_second_death_only(place: int):
    asked: list[tuple[int, int]] = []
    _, failed, deaths = until_done(40, engine(kills={place}, asked=asked), Memory())
    assert asked.count((place, 1)) == 2
    assert [row.place for row in failed] == [place] and deaths == 5
    assert failed[0].message == "the process died"


def test_a_row_that_was_done_before_is_not_blamed_for_deaths_from_outside():
    attempts, done = Memory(), []

    def work(first: int, count: int) -> list[int]:
        if first in done:
            done.clear()
            raise Killed  # while it does a single row that it had done already
        if count == 1 and first == 3:
            done.append(3)
        return engine(kills={9})(first, count)

    results, failed, _ = until_done(10, work, attempts)
    assert [row.place for row in failed] == [9]
    assert results == squares(10, {9})


def test_what_the_engine_said_when_it_died_is_kept():
    def work(first: int, count: int) -> list[int]:
        if first <= 2 < first + count:
            raise EngineDied from RuntimeError("an illegal\nmemory access")
        return [0] * count

    _, failed, _ = until_done(16, work, Memory())
    assert [row.message for row in failed] == ["RuntimeError: an illegal memory access"]


def test_when_all_rows_raise_the_engine_is_at_fault():
    attempts = Memory()
    with pytest.raises(DpoRayError, match=r"shard: all its 30 rows failed .*row \d+ is bad.* no row was left out"):
        isolate(30, engine(raises=set(range(30))), attempts)
    assert attempts.kept is None  # the next run begins anew


@pytest.mark.parametrize("num_rows", [2, 3, 8, 9, 512, 65_536])
def test_when_all_ranges_kill_the_engine_is_at_fault_and_that_is_seen_soon(num_rows: int):
    attempts = Memory()
    with pytest.raises(DpoRayError, match="the process died"):
        until_done(num_rows, engine(kills=set(range(num_rows))), attempts)
    assert attempts.kept is None


def test_some_rows_that_kill_all_over_a_large_shard_are_not_blamed_on_the_engine():
    num_rows = 65_536
    kills = {num_rows * part // 8 + 4_000 for part in range(8)}
    results, failed, deaths = until_done(num_rows, engine(kills=kills), Memory())
    assert results == squares(num_rows, kills)
    assert {row.place for row in failed} == kills
    assert deaths <= 2 + len(kills) * 7


def test_the_only_row_of_a_shard_can_be_given_up():
    assert isolate(1, engine(raises={0}), Memory())[1][0].reason == "engine_error"
    _, failed, deaths = until_done(1, engine(kills={0}), Memory())
    assert failed[0].reason == "engine_crash" and deaths == 2


def test_a_shard_that_kills_again_and_again_is_an_error_at_last():
    attempts, begun = Memory(), 0

    def leaks(first: int, count: int) -> list[int]:
        # It dies of the number of rows it has done: no row is at fault.
        nonlocal begun
        begun += count
        if begun > 100:
            begun = 0
            raise Killed
        return [0] * count

    with pytest.raises(DpoRayError, match=f"{MAX_ATTEMPTS} attempts did not finish it"):
        deaths = 0
        while deaths <= MAX_ATTEMPTS:
            try:
                isolate(512, leaks, attempts)
            except Killed:
                deaths += 1
    assert attempts.kept is None


def test_a_death_after_the_last_row_blames_no_row():
    attempts = Memory()
    for _ in range(5):
        results, failed = isolate(20, engine(raises={4}), attempts)  # each time it dies before it can clear
        assert results == squares(20, {4}) and [row.place for row in failed] == [4]


def test_notes_in_a_file(tmp_path: Path):
    attempts = Attempts(Location.of(tmp_path) / "attempts" / "a.json")
    assert attempts.read() is None
    with pytest.raises(Killed):
        isolate(5, engine(kills={1}), attempts)
    assert attempts.location.exists()
    results, failed, _ = until_done(5, engine(kills={1}), attempts)
    assert results == squares(5, {1}) and failed[0].place == 1
    attempts.clear()
    attempts.clear()
    assert not attempts.location.exists()
    attempts.location.write_bytes(b'{"ranges": 3}')
    with pytest.raises(DataError, match=r"a\.json is damaged\. Remove it"):
        isolate(5, engine(), attempts)
