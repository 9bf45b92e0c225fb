"""The index of the rows: what each side has, what is asked of all of it, and that it travels by name."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.pairs import CARRIED, steers
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.claim import CLAIM, Claim
from dpo_ray.storage.location import Location
from dpo_ray.training.index import Facts, index_in_use, index_of, num_judging
from tests.indexed import artifact_of, indices, with_lengths
from tests.object_store import BUCKET, ObjectStore, object_store
from tests.unit.training.test_plan import index_of as index_in_memory


def rows(*given: tuple[str, str], **carried: Any) -> pa.Table:
    """A tokenized shard of (prompt_id, split); the i-th row has lengths 1, i + 1 and i + 2. carried: columns that all
    rows have alike."""
    return with_lengths(
        [
            {
                "pair_id": str(i),
                "prompt_id": prompt,
                "split": split,
                "prompt_ids": [0],
                "chosen_ids": [0] * (i + 1),
                "rejected_ids": [0] * (i + 2),
                **carried,
            }
            for i, (prompt, split) in enumerate(given)
        ]
    )


SHARDS = [
    rows(("p", "train"), ("q", "eval"), ("p", "train")),
    rows(),
    rows(("r", "train")),
]


def test_the_index_names_where_the_pairs_of_one_side_lie(tmp_path: Path):
    index, held_out = indices(tmp_path, SHARDS)
    assert [Path(shard).name for shard in index.shards] == ["0.parquet", "1.parquet", "2.parquet"]
    assert index.offsets.tolist() == [0, 2, 2, 3]
    assert index.shard_of(np.arange(3)).tolist() == [0, 0, 2]
    assert index.row.tolist() == [0, 2, 0]
    assert index.lengths.tolist() == [[1, 1, 2], [1, 3, 4], [1, 1, 2]]
    assert (len(index), index.read) == (3, 4)
    assert (held_out.row.tolist(), held_out.offsets.tolist()) == ([1], [0, 1, 1, 1])


def test_an_index_of_nothing_is_empty(tmp_path: Path):
    for index in indices(tmp_path, []):
        assert len(index) == 0 and index.lengths.shape == (0, 3)


def test_a_pair_takes_16_bytes_and_what_plans_maps_them(tmp_path: Path):
    index, _ = indices(tmp_path, [rows(*[("p", "train")] * 50)] * 3)
    assert (index.row.nbytes + index.lengths.nbytes) / len(index) == 16
    assert isinstance(index.row, np.memmap) and isinstance(index.lengths, np.memmap)


def test_an_index_travels_by_name_and_is_the_same_where_it_arrives(tmp_path: Path):
    index, _ = indices(tmp_path, [rows(*[("p", "train")] * 500)] * 3)
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    for name in ("offsets", "row", "lengths"):
        assert np.array_equal(getattr(there, name), getattr(index, name))
    assert (there.shards, there.read, there.facts) == (index.shards, index.read, index.facts)
    # One that is in memory only travels as it is.
    few = pickle.loads(pickle.dumps(index.drawn(7)))
    assert len(few) == 7 and np.array_equal(few.row, index.drawn(7).row)
    assert type(few.row) is np.ndarray


def test_the_index_knows_whose_shards_are_and_what_is_said_of_pairs(tmp_path: Path):
    two = [("p", "train"), ("q", "train"), ("r", "eval")]
    index, held_out = indices(
        tmp_path,
        [
            rows(*two, source="math", weight=2.0),
            rows(),
            rows(*two, source="chat", preference=0.5),
            rows(("s", "train"), source="math"),
        ],
    )
    assert index.sources == held_out.sources == ("math", "chat")
    assert index.source.tolist() == held_out.source.tolist() == [0, -1, 1, 0]
    assert index.by_source() == {"math": 3, "chat": 2} and held_out.by_source() == {"math": 1, "chat": 1}
    assert index.shards_of("math").tolist() == [0, 3] and index.shards_of("code").tolist() == []
    assert index.pairs_of(index.shards_of("math")).tolist() == [0, 1, 4]
    assert index.facts.says == held_out.facts.says == ["weight", "preference"]
    assert (index.facts.judged, held_out.facts.judged) == ((2, 0, 2), (1, 0, 1))
    there = pickle.loads(pickle.dumps(index))
    assert (there.sources, there.source.tolist(), there.facts) == (index.sources, index.source.tolist(), index.facts)


def test_rows_of_an_earlier_version_say_nothing_of_their_pairs(tmp_path: Path):
    index, _ = indices(tmp_path, [table.drop_columns(list(CARRIED)) for table in SHARDS])
    assert index.sources == () and index.source.tolist() == [-1, -1, -1] and index.facts.says == []


def test_a_shard_of_two_sources_is_no_shard_of_ours(tmp_path: Path):
    mixed = pa.concat_tables([rows(("p", "train"), source=source) for source in ("a", "b")])
    with pytest.raises(ValueError, match="the rows of one shard are of 2 sources"):
        indices(tmp_path, [mixed])


def test_a_part_of_the_held_out_prompts_steers(tmp_path: Path):
    given = [(f"prompt {n // 2}", "eval" if n % 4 < 2 else "train") for n in range(400)]
    train, some = indices(tmp_path, [rows(*given)], 0.5)
    expected = [n for n, (prompt, side) in enumerate(given) if side == "eval" and steers(prompt, 0.5)]
    assert some.row.tolist() == expected and 50 < len(expected) < 150
    assert len(train) == 200  # the training side is whole
    artifact = artifact_of(tmp_path, [rows(*given)])
    output = Location.of(tmp_path / "out")
    assert num_judging(output, artifact, 0.5) == 200 - len(expected)
    assert num_judging(output, artifact, 1.0) == 200


def test_rows_of_which_a_shard_was_made_again_are_indexed_again(tmp_path: Path):
    first = artifact_of(tmp_path, [rows(*[("p", "train")] * 3)])
    output = Location.of(tmp_path / "out")
    assert len(index_of(output, first)[0]) == 3
    # The same artifact, whose one shard was lost; made again, it lacks a row.
    file = write_shard(first.location / "again.parquet", rows(*[("p", "train")] * 2), {})
    again = publish(first.location, "tokenized", identity={}, inputs={}, files=[file])
    assert again.fingerprint == first.fingerprint
    index, _ = index_of(output, again)
    assert len(index) == 2 and index.shards == (file_uri(again),)


def file_uri(rows: Artifact) -> str:
    [shard] = rows.shards()
    return shard.uri


LENGTHS = st.lists(st.tuples(*[st.integers(0, 9)] * 3), max_size=20)


@given(parts=st.lists(LENGTHS, max_size=4))
def test_facts_of_parts_are_those_of_the_whole(parts: list[list[tuple[int, int, int]]]):
    arrays = [np.array(part, dtype=np.int32).reshape(-1, 3) for part in parts]
    whole = np.concatenate([np.zeros((0, 3), dtype=np.int32), *arrays])
    found = Facts.of(whole[:0])
    for part in arrays:
        found = Facts.of(part, found)
    assert found == Facts.of(whole)
    assert found.num_pairs == len(whole)
    assert found.tokens == tuple(whole.sum(axis=0).tolist())
    assert found.num_unpaired == sum(min(chosen, rejected) == 0 for _, chosen, rejected in whole.tolist())
    sums = whole.sum(axis=1).tolist()
    assert (found.longest, found.longest_tokens) == ((sums.index(max(sums)), max(sums)) if sums else (None, 0))
    padded = [(prompt + max(sides)) * sum(side > 0 for side in sides) for prompt, *sides in whole.tolist()]
    assert (found.widest, found.widest_tokens) == ((padded.index(max(padded)), max(padded)) if sums else (None, 0))


def test_some_pairs_of_an_index_are_an_index_of_pairs_from_all_of_it():
    index = index_in_memory(1000, num_shards=7)
    of = {
        (shard, row): n for n, (shard, row) in enumerate(zip(index.shard_of(np.arange(1000)), index.row, strict=True))
    }
    some = index.drawn(100)
    places = [of[place] for place in zip(some.shard_of(np.arange(100)), some.row, strict=True)]
    assert places == sorted(set(places)) and len(some) == 100
    assert np.array_equal(some.lengths, index.lengths[places])
    assert some.facts == Facts.of(index.lengths[places])
    assert some.offsets[-1] == 100 and set(some.shard_of(np.arange(100))) == set(range(7))
    # Of ten parts each has about its share: they are not the first ones.
    assert np.histogram(places, bins=10, range=(0, 1000))[0].min() >= 3
    assert index.drawn(1000) is index
    assert np.array_equal(index.drawn(100).row, some.row)


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def test_what_lies_in_an_object_store_is_mapped_from_a_copy_that_is_made_once(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    index, held_out = indices(Location.of(f"s3://{BUCKET}/index"), SHARDS)
    assert (index.row.tolist(), held_out.row.tolist()) == ([0, 2, 0], [1])
    for array in (index.row, held_out.lengths):
        assert isinstance(array, np.memmap) and str(array.filename).startswith(str(tmp_path / "cache"))


def test_an_index_that_is_used_is_claimed_with_the_rows_that_it_was_made_from(tmp_path: Path):
    made = artifact_of(tmp_path, SHARDS)
    index, _ = index_of(Location.of(tmp_path / "out"), made)
    assert index.file is not None
    place = index.file.folder / CLAIM
    place.remove()
    with index_in_use(index, made):
        assert Claim.model_validate_json(place.read_bytes()).inputs == {"tokenized": made.fingerprint}
