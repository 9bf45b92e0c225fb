"""The pointer of a published name: moved by hand and back, recorded, and never naming what is not there."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import ConfigError, DataError
from dpo_ray.storage import published
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import (
    CARD,
    LATEST,
    compared_version,
    history,
    last_other,
    latest,
    move,
    promote,
    rollback,
    was_latest,
)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    """With the versions a, b and c of the name n, and one that is not complete."""
    for version in "abc":
        (tmp_path / "models/n" / version).mkdir(parents=True)
        (tmp_path / "models/n" / version / CARD).write_text("card")
    (tmp_path / "models/n/partial").mkdir()
    return Location.of(tmp_path)


def publish(output: Location, version: str) -> None:
    move(
        output / "models/n",
        version,
        action="publish",
        why="past the gate",
        run_id=f"run-{version}",
        data={"d": version},
    )


def now(output: Location) -> str | None:
    found = latest(output / "models/n")
    return found.version if found else None


def test_the_pointer_says_what_who_when_and_from_which_data(output: Location):
    assert now(output) is None
    publish(output, "a")
    publish(output, "b")
    found = latest(output / "models/n")
    assert found is not None
    assert (found.version, found.path, found.run_id) == ("b", (output / "models/n/b").uri, "run-b")
    assert (found.data, found.previous, found.action) == ({"d": "b"}, "a", "publish")
    assert "@" in found.by and found.published.endswith("+00:00")
    assert [(one.version, one.previous) for one in history(output / "models/n")] == [("a", None), ("b", "a")]


def test_a_rollback_goes_back_each_time_and_is_recorded(output: Location):
    for version in "abc":
        publish(output, version)
    assert rollback(output, "n", "it swears").version == "b"
    assert rollback(output, "n", "so does this").version == "a"
    with pytest.raises(ConfigError, match=r"no earlier version of n .*versions of n: a, b, c"):
        rollback(output, "n", "still")
    last = history(output / "models/n")[-1]
    assert (last.action, last.why, last.version, last.previous) == ("rollback", "so does this", "a", "b")
    assert (last.run_id, last.data) == ("run-a", {"d": "a"})
    publish(output, "c")
    assert rollback(output, "n", "again").version == "a"


def test_a_clock_that_is_set_back_does_not_turn_the_order_of_the_moves_around(
    output: Location, monkeypatch: pytest.MonkeyPatch
):
    times = iter([datetime(2026, 11, 1, 3, tzinfo=UTC), *[datetime(2026, 11, 1, 2, tzinfo=UTC)] * 3])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return next(times)

    monkeypatch.setattr(published, "datetime", Clock)
    for version in "abc":
        publish(output, version)
    assert [one.version for one in history(output / "models/n")] == ["a", "b", "c"]
    assert rollback(output, "n", "worse").version == "b"


def test_a_version_is_promoted_by_hand(output: Location):
    publish(output, "a")
    publish(output, "b")
    made = promote(output, "n", "a", "better after all")
    assert (now(output), made.run_id, made.why, made.action) == ("a", "run-a", "better after all", "promote")
    assert rollback(output, "n", "no").version == "b"


@pytest.mark.parametrize("version", ["partial", "other", "history"])
def test_what_is_no_whole_version_is_never_promoted(output: Location, version: str):
    publish(output, "a")
    with pytest.raises(ConfigError, match=r"is no published model\. Name one of the versions of n: a, b, c"):
        promote(output, "n", version, "why not")
    assert now(output) == "a"


def test_a_name_that_is_not_there_is_told_with_those_that_are(output: Location):
    for by_hand in (lambda: promote(output, "m", "a", ""), lambda: rollback(output, "m", "")):
        with pytest.raises(ConfigError, match=r"m holds no published model \(names there: n\)"):
            by_hand()
    with pytest.raises(ConfigError, match="nothing was published there"):
        rollback(output / "nowhere", "n", "")


def test_a_pointer_of_before_the_record_is_read(output: Location):
    (output / "models/n" / LATEST).write_bytes(
        b'{"version": "a", "path": "p", "run_id": "r", "published": "2026-01-01T00:00:00+00:00"}'
    )
    publish(output, "b")
    found = latest(output / "models/n")
    assert found is not None and found.previous == "a"


def test_a_damaged_pointer_is_told_and_written_anew(output: Location):
    (output / "models/n" / LATEST).write_bytes(b"{")
    with pytest.raises(DataError, match="dpo-ray promote"):
        latest(output / "models/n")
    assert promote(output, "n", "a", "").previous is None
    assert now(output) == "a"


@given(
    st.lists(st.sampled_from(["publish a", "publish b", "publish c", "promote a", "promote b", "back"]), max_size=12)
)
def test_after_any_moves_the_pointer_names_a_whole_version_and_the_last_record(tmp_path_factory, moves: list[str]):
    folder = tmp_path_factory.mktemp("moves")
    for version in "abc":
        (folder / "models/n" / version).mkdir(parents=True)
        (folder / "models/n" / version / CARD).write_text("card")
    output = Location.of(folder)
    for one in moves:
        before = now(output)
        if one == "back":
            try:
                made = rollback(output, "n", "")
            except ConfigError:
                assert now(output) == before
                continue
            assert made.version != before
        elif one.startswith("publish"):
            publish(output, one[-1])
        else:
            promote(output, "n", one[-1], "")
        assert latest(output / "models/n") == history(output / "models/n")[-1]


@pytest.mark.parametrize("version", ["../n/a", "a/.", "/a", "partial"])
def test_a_version_is_a_folder_of_the_name_and_no_path(output: Location, version: str):
    publish(output, "b")
    with pytest.raises(ConfigError, match="no published model"):
        promote(output, "n", version, "by hand")
    assert now(output) == "b"


@pytest.mark.parametrize("name", ["../models/n", "..", "", "n/.."])
def test_a_name_is_no_path(output: Location, name: str):
    publish(output, "b")
    for ask in (lambda: promote(output, name, "a", "by hand"), lambda: rollback(output, name, "by hand")):
        with pytest.raises(ConfigError, match="is no name of a published model"):
            ask()


def test_a_move_that_was_recorded_and_never_made_is_no_move(output: Location, monkeypatch: pytest.MonkeyPatch):
    publish(output, "a")
    publish(output, "b")
    write = Location.write_bytes

    def killed(self: Location, data: bytes) -> None:
        if self.name == LATEST:
            raise KeyboardInterrupt
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(output, "c")
    assert (now(output), len(history(output / "models/n"))) == ("b", 3)
    assert not was_latest(output / "models/n", "c")
    assert rollback(output, "n", "by hand").version == "a"
    publish(output, "c")
    assert was_latest(output / "models/n", "c") and was_latest(output / "models/n", "b")
    assert rollback(output, "n", "by hand").version == "a"


def test_a_version_is_compared_with_the_latest_and_never_with_itself(output: Location):
    folder = output / "models/n"
    assert compared_version(folder, "a") is None
    publish(output, "a")
    assert compared_version(folder, "a") is None and compared_version(folder, "b") == "a"
    publish(output, "b")
    publish(output, "b")
    assert compared_version(folder, "b") == "a" and compared_version(folder, "c") == "b"
    rollback(output, "n", "by hand")
    assert compared_version(folder, "b") == "a" and compared_version(folder, "a") is None
    (output / "models/n/a" / CARD).remove()
    publish(output, "c")
    publish(output, "b")
    assert compared_version(folder, "b") == "c"


def test_the_last_other_version_is_found_with_its_run_and_without_reading_all_moves(output: Location):
    folder = output / "models/n"
    assert last_other(folder, "a") is None
    publish(output, "a")
    assert last_other(folder, "a") is None
    publish(output, "b")
    publish(output, "c")
    publish(output, "c")
    found = last_other(folder, "")
    assert found is not None and (found.version, found.run_id) == ("c", "run-c")
    [oldest, *_] = sorted((folder / "history").children(), key=lambda file: file.name)
    oldest.write_bytes(b"{")  # it is not asked for
    found = last_other(folder, "c")
    assert found is not None and (found.version, found.run_id) == ("b", "run-b")


def test_a_pointer_that_has_gone_is_told_and_written_anew_by_hand(output: Location):
    folder = output / "models/n"
    publish(output, "a")
    (folder / LATEST).remove()
    assert latest(folder) is None  # a kill before the first move leaves this
    publish(output, "a")
    publish(output, "b")
    (folder / LATEST).remove()
    with pytest.raises(DataError, match=r"latest\.json is not there, .* 3 moves .*`dpo-ray promote` writes it anew"):
        latest(folder)
    promote(output, "n", "b", "it had gone")
    assert now(output) == "b"


def test_a_damaged_record_of_a_move_is_named(output: Location):
    folder = output / "models/n"
    publish(output, "a")
    publish(output, "b")
    first, _ = sorted((folder / "history").children(), key=lambda file: file.name)
    first.write_bytes(b'{"version": ')
    with pytest.raises(DataError, match=rf"{first.name} is damaged .* Take it out"):
        rollback(output, "n", "")
    first.remove()
    promote(output, "n", "a", "")
    assert now(output) == "a"


def test_what_else_lies_beside_the_records_is_none(output: Location):
    (output / "models/n/history/notes.txt").write_bytes(b"kept by hand")
    publish(output, "a")
    publish(output, "b")
    assert [one.version for one in history(output / "models/n")] == ["a", "b"]
    assert rollback(output, "n", "").version == "a"
