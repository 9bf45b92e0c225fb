"""The pool of shards of a kind: what names say, and what is found out about files that no manifest tells of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import publish, read_shard, write_shard
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import Finished, ShardPool, finished_in, has_quarantine, read_whole_shard, task_of

TABLE = pa.table({"x": [1, 2, 3]})
BAD = pa.table({"row": [7]})
TASK = "0123456789abcdef"


@pytest.fixture
def pool(tmp_path: Path) -> ShardPool:
    return ShardPool(Location.of(tmp_path) / "artifacts" / "pairs")


@pytest.mark.parametrize("quarantine", [None, BAD])
def test_what_is_written_is_what_is_found_of_it_afterwards(pool: ShardPool, quarantine: pa.Table | None):
    made = pool.write(TASK, TABLE, {"read": 4, "bad": 1}, quarantine)
    assert (made.task, made.shard.rows, made.shard.counters) == (TASK, 3, {"read": 4, "bad": 1})
    assert read_shard(pool.folder / made.shard.name).equals(TABLE)
    for entry in (made.shard, made.quarantine):
        if entry is not None:
            data = (pool.folder / entry.name).read_bytes()
            assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert pool.inspect(made.shard.name, quarantine is not None) == made
    assert Finished.model_validate_json(made.model_dump_json()) == made
    present = pool.present()
    assert present.holds(made) and present.files.keys() == set(made.files)
    assert present.by_task == {TASK: [made.shard.name]}
    assert has_quarantine(made.shard.name, present.files) == (quarantine is not None)
    assert pool.write(TASK, TABLE, {"read": 4, "bad": 1}, quarantine) == made  # the same bytes, the same name


def test_other_rows_or_another_quarantine_make_another_name_of_the_same_task(pool: ShardPool):
    tables = [(TABLE, None), (TABLE.slice(1), None), (TABLE, BAD), (TABLE, pa.table({"row": [8]}))]
    made = [pool.write(TASK, table, {}, quarantine) for table, quarantine in tables]
    assert len({one.shard.name for one in made}) == 4
    assert made[0].shard.sha256 == made[2].shard.sha256  # what is made of the rows does not depend on what they lack
    assert pool.present().by_task == {TASK: sorted(one.shard.name for one in made)}
    for one in made:
        assert pool.inspect(one.shard.name, one.quarantine is not None) == one


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no parquet"])
def test_a_damaged_file_is_not_taken_for_a_shard(pool: ShardPool, damage):
    made = pool.write(TASK, TABLE, {}, BAD)
    assert made.quarantine is not None
    for name in made.files:
        place = pool.folder / name
        content = place.read_bytes()
        place.write_bytes(damage(content))
        assert pool.inspect(made.shard.name, True) is None
        place.write_bytes(content)
    assert pool.inspect(made.shard.name, True) == made


def test_no_changed_byte_of_a_shards_end_is_an_error(pool: ShardPool):
    made = pool.write(TASK, TABLE, {"read": 3}, None)
    place = pool.folder / made.shard.name
    content = place.read_bytes()
    for at in range(len(content) - 600, len(content)):
        place.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        assert pool.inspect(made.shard.name, False) is None


def test_another_shard_under_its_name_is_none(pool: ShardPool):
    made, other = pool.write(TASK, TABLE, {}), pool.write(TASK, TABLE.slice(1), {})
    (pool.folder / other.shard.name).copy_to(pool.folder / made.shard.name)
    assert pool.inspect(made.shard.name, False) is None


def test_a_shard_without_its_quarantine_is_unfinished(pool: ShardPool):
    made = pool.write(TASK, TABLE, {}, BAD)
    assert made.quarantine is not None
    (pool.folder / made.quarantine.name).remove()
    assert not pool.present().holds(made)
    assert pool.inspect(made.shard.name, False) is None
    assert pool.inspect(made.shard.name, True) is None  # it has gone since one looked


def test_one_listing_tells_manifests_newest_first_and_what_lies_beside_them(pool: ShardPool):
    made = pool.write(TASK, TABLE, {"read": 3}, BAD)
    assert made.quarantine is not None
    files = [made.shard, made.quarantine]
    for n, name in enumerate(("b", "a", "c")):
        publish(pool.folder / name, "pairs", identity={}, inputs={}, files=files)
        os.utime((pool.folder / name / "manifest.json").uri, (n, n))
    (pool.folder / "d" / "isolated" / "x.json").write_bytes(b"{}")
    (Path(pool.folder.uri) / "shards" / ".half.parquet.partial").write_bytes(b"PAR")
    present = pool.present()
    assert [place.name for place in present.manifests] == ["c", "a", "b"]
    assert present.beside["d"] == [pool.folder / "d" / "isolated" / "x.json"]
    assert present.files.keys() == set(made.files)


def test_the_shards_of_a_manifest_are_those_of_the_pool(pool: ShardPool):
    one, two = pool.write(TASK, TABLE, {"read": 3}, BAD), pool.write("f" * 16, TABLE, {})
    assert one.quarantine is not None
    own = one.shard.model_copy(update={"name": "own.parquet"})
    files = [one.shard, two.shard, own, one.quarantine]
    artifact = publish(pool.folder / "a", "pairs", identity={}, inputs={}, files=files)
    assert finished_in(artifact.manifest) == [one, two]
    assert [task_of(name) for name in (one.quarantine.name, two.shard.name)] == [TASK, "f" * 16]


def flipped(place: Location) -> None:
    """The bits of its middle byte."""
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 0xFF
    place.write_bytes(bytes(data))


@pytest.mark.parametrize("quarantine", [None, BAD])
def test_a_shard_whose_bytes_are_its_own_is_read(pool: ShardPool, quarantine: pa.Table | None):
    made = pool.write(TASK, TABLE, {}, quarantine)
    assert read_whole_shard(pool.folder / made.shard.name).equals(TABLE)
    assert pool.present().holds(made)


@pytest.mark.parametrize("which", [0, 1])
def test_one_with_other_bytes_is_told_and_removed_so_that_it_is_made_again(pool: ShardPool, which: int):
    made = pool.write(TASK, TABLE, {}, BAD)
    shard = pool.folder / made.shard.name
    flipped(pool.folder / made.files[which])
    with pytest.raises(DataError, match=r"was damaged: .* It has been removed, and the same command makes it again"):
        read_whole_shard(shard)
    assert not pool.present().files
    with pytest.raises(DataError, match=r"is not there any more: .* The same command makes it again"):
        read_whole_shard(shard)


def test_what_comes_wrong_once_is_read_again(pool: ShardPool, monkeypatch: pytest.MonkeyPatch):
    made = pool.write(TASK, TABLE, {})
    read, times = Location.read_bytes, []

    def wrong_at_first(place: Location) -> bytes:
        times.append(place)
        return read(place) if len(times) > 1 else read(place)[:-1] + b"?"

    monkeypatch.setattr(Location, "read_bytes", wrong_at_first)
    assert read_whole_shard(pool.folder / made.shard.name).equals(TABLE)


def test_a_shard_that_no_pool_has_named_is_read_as_it_is(tmp_path: Path):
    place = Location.of(tmp_path) / "shards" / "part-0.parquet"
    write_shard(place, TABLE, {})
    assert read_whole_shard(place).equals(TABLE)


def test_a_shard_that_was_cut_off_is_not_held(pool: ShardPool):
    made = pool.write(TASK, TABLE, {})
    place = pool.folder / made.shard.name
    place.write_bytes(place.read_bytes()[:-1])
    assert not pool.present().holds(made)
