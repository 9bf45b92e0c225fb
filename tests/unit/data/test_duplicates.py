"""Exact duplicates, contradictions and prompts on both sides: found from ids, whatever the buckets."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.duplicates import (
    LEFT_OUT,
    REASONS,
    PairsShard,
    by_shard,
    find,
    left_out_table,
    num_buckets,
    read_kept,
)
from dpo_ray.data.judgement import judged
from dpo_ray.data.row_ids import RowIds, read_bucket, row_ids
from dpo_ray.errors import DataError
from dpo_ray.pairs import PAIRS, Message, PreferencePair, Split, pair_row
from dpo_ray.storage import artifact
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from tests.left_out import Rows, left_out, rows_of

Row = tuple[PreferencePair, Split]


def pair(prompt: str, chosen: str | None, rejected: str | None) -> PreferencePair:
    return PreferencePair((Message(role="user", content=prompt),), chosen, rejected)


def table_of(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist([pair_row(p, split) for p, split in rows], schema=PAIRS)


def write(folder: Path, shards: list[list[Row]]) -> list[Location]:
    places = [Location.of(folder) / f"{number}.parquet" for number in range(len(shards))]
    for place, rows in zip(places, shards, strict=True):
        write_shard(place, table_of(rows), {})
    return places


def groups(places: list[Location], size: int = 2) -> list[Location]:
    """Their ids, so many shards a file."""
    files = []
    for first in range(0, len(places), size):
        file = Location.of(f"{places[0].uri}-ids") / f"{first}.parquet"
        write_shard(file, row_ids(places[first : first + size]), {})
        files.append(file)
    return files


def found_in(places: list[Location], buckets: int = 1, group_size: int = 2) -> dict[str, Rows]:
    files = groups(places, group_size)
    read = [read_bucket(files, bucket, buckets) for bucket in range(buckets)]
    found = by_shard(left_out_table(rows, find(rows), names) for rows, names in read)
    return {shard: rows_of(of_shard) for shard, of_shard in found.items()}


def naive(shards: list[list[Row]]) -> dict[str, Rows]:
    """The same rules, on the texts themselves."""
    rows = [(f"{s}.parquet", r, p, split) for s, shard in enumerate(shards) for r, (p, split) in enumerate(shard)]
    judgements = defaultdict(set)
    for _, _, p, _ in rows:
        judgements[p.prompt[0]["content"], frozenset({p.chosen, p.rejected} - {None})].add((p.chosen, p.rejected))
    held_out = {p.prompt[0]["content"] for _, _, p, split in rows if split == "eval"}
    seen = set()
    result: dict[str, Rows] = {}
    for shard, row, p, split in rows:
        prompt = p.prompt[0]["content"]
        if len(judgements[prompt, frozenset({p.chosen, p.rejected} - {None})]) > 1:
            reason = "contradiction"
        elif split == "train" and prompt in held_out:
            reason = "prompt_in_eval"
        elif (prompt, p.chosen, p.rejected) in seen:
            reason = "duplicate"
        else:
            seen.add((prompt, p.chosen, p.rejected))
            continue
        result.setdefault(shard, {}).setdefault(reason, []).append(row)
    return result


A_OVER_B, B_OVER_A = pair("Why?", "a", "b"), pair("Why?", "b", "a")


def test_of_equal_pairs_the_first_stays_across_shards(tmp_path: Path):
    other = pair("Why?", "a", "c")
    shards: list[list[Row]] = [
        [(other, "train"), (A_OVER_B, "train"), (A_OVER_B, "train")],
        [],
        [(A_OVER_B, "train"), (pair("How?", "a", "b"), "train"), (other, "train")],
    ]
    assert found_in(write(tmp_path, shards)) == {
        "0.parquet": {"duplicate": [2]},
        "2.parquet": {"duplicate": [0, 2]},
    }


def test_of_a_contradiction_no_row_stays_however_often_each_side_was_said(tmp_path: Path):
    shards: list[list[Row]] = [
        [(A_OVER_B, "train"), (pair("Why?", "a", "c"), "train")],
        [(A_OVER_B, "train"), (B_OVER_A, "train"), (pair("How?", "b", "a"), "train")],
    ]
    assert found_in(write(tmp_path, shards)) == {
        "0.parquet": {"contradiction": [0]},
        "1.parquet": {"contradiction": [0, 1]},
    }


@pytest.mark.parametrize("question", ["Why?", "How?", "Who?", "When?"])  # a tie's sides are ordered by their hash
@pytest.mark.parametrize("better", ["a", "b"])
def test_a_tie_and_a_verdict_on_the_same_answers_are_a_contradiction(tmp_path: Path, question: str, better: str):
    ties = [judged(pair(question, *sides), {"preference": 0.5}, "keep") for sides in (("a", "b"), ("b", "a"))]
    verdict = judged(pair(question, "a", "b"), {"preference": 1.0 if better == "a" else 0.0}, "keep")
    rows: list[Row] = [(ties[0], "train"), (verdict, "train")]
    assert found_in(write(tmp_path / "both", [rows])) == {"0.parquet": {"contradiction": [0, 1]}}
    rows = [(ties[0], "train"), (ties[1], "train")]
    assert found_in(write(tmp_path / "ties", [rows])) == {"0.parquet": {"duplicate": [1]}}


def test_a_single_answer_judged_both_ways_is_a_contradiction(tmp_path: Path):
    rows: list[Row] = [
        (pair("Why?", "a", None), "train"),
        (pair("Why?", None, "b"), "train"),
        (pair("Why?", None, "a"), "train"),
        (pair("Why?", None, "b"), "train"),
    ]
    assert found_in(write(tmp_path, [rows])) == {"0.parquet": {"duplicate": [3], "contradiction": [0, 2]}}


def test_a_training_row_whose_prompt_is_held_out_gives_way(tmp_path: Path):
    shards: list[list[Row]] = [
        [(A_OVER_B, "train"), (pair("Why?", "c", "d"), "train"), (pair("How?", "a", "b"), "train")],
        [(A_OVER_B, "eval"), (pair("Who?", "a", "b"), "eval"), (A_OVER_B, "eval")],
    ]
    # The held-out pair stays, though a training row with the same pair came first.
    assert found_in(write(tmp_path, shards)) == {
        "0.parquet": {"prompt_in_eval": [0, 1]},
        "1.parquet": {"duplicate": [2]},
    }


def test_a_prompt_is_held_out_also_by_a_row_that_is_left_out(tmp_path: Path):
    shards: list[list[Row]] = [
        [(B_OVER_A, "train"), (pair("Why?", "c", "d"), "train")],
        [(A_OVER_B, "eval")],
    ]
    assert found_in(write(tmp_path, shards)) == {
        "0.parquet": {"contradiction": [0], "prompt_in_eval": [1]},
        "1.parquet": {"contradiction": [0]},
    }


SIDES = st.sampled_from(["a", "b", "c"])
PAIR = st.one_of(
    st.tuples(SIDES, SIDES).filter(lambda sides: sides[0] != sides[1]),
    st.tuples(SIDES, st.none()),
    st.tuples(st.none(), SIDES),
)
ROWS = st.lists(
    st.builds(
        lambda prompt, sides, split: (pair(prompt, *sides), split),
        st.sampled_from(["p", "q", "r", "s", "t"]),
        PAIR,
        st.sampled_from(["train", "train", "eval"]),
    ),
    max_size=30,
)


@given(shards=st.lists(ROWS, min_size=1, max_size=4), buckets=st.integers(1, 7), group_size=st.integers(1, 4))
def test_the_same_rows_are_found_as_by_comparing_texts_whatever_the_buckets_and_groups(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[Row]], buckets: int, group_size: int
):
    places = write(tmp_path_factory.mktemp("shards"), shards)
    found = found_in(places, buckets, group_size)
    assert found == naive(shards)
    kept = 0
    for place in places:
        table, counters = read_kept(PairsShard(place.uri, left_out(found[place.name]) if place.name in found else None))
        kept += table.num_rows
        assert table.num_rows + sum(counters[reason] for reason in REASONS) == counters["read"]
    # What stays has nothing more to find.
    assert found_in(write(tmp_path_factory.mktemp("kept"), [_kept(shards, found)]), buckets) == {}
    assert kept == len(_kept(shards, found))


def _kept(shards: list[list[Row]], found: dict[str, Rows]) -> list[Row]:
    gone = {(shard, row) for shard, reasons in found.items() for rows in reasons.values() for row in rows}
    return [row for s, rows in enumerate(shards) for r, row in enumerate(rows) if (f"{s}.parquet", r) not in gone]


@pytest.mark.parametrize(("rows", "buckets"), [(0, 1), (1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_buckets_are_as_many_as_hold_the_rows(rows: int, buckets: int):
    assert num_buckets(rows, rows_per_bucket=10) == buckets


@pytest.mark.parametrize("buckets", [1, 2, 5, 16])
def test_every_row_is_in_one_bucket_and_rows_of_a_prompt_in_the_same(tmp_path: Path, buckets: int):
    rows: list[Row] = [(pair(f"Question {n % 40}", f"{n}", "x"), "train") for n in range(100)]
    places = write(tmp_path, [rows[:70], rows[70:]])
    files = groups(places, 1)
    parts = [read_bucket(files, bucket, buckets)[0] for bucket in range(buckets)]
    seen = [(int(s), int(r)) for part in parts for s, r in zip(part.shard, part.row, strict=True)]
    assert sorted(seen) == [(0, r) for r in range(70)] + [(1, r) for r in range(30)]
    prompts = [set(part.prompt.tolist()) for part in parts]
    assert sum(map(len, prompts)) == 40 == len(set().union(*prompts))


def test_ids_are_read_as_the_numbers_that_they_are(tmp_path: Path):
    rows: list[Row] = [(pair(f"Question {n}", "a", "b"), "eval" if n % 2 else "train") for n in range(9)]
    ids, names = read_bucket(groups(write(tmp_path, [rows])), 0, 1)
    assert names == ["0.parquet"] and ids.row.tolist() == np.argsort([int(p.prompt_id, 16) for p, _ in rows]).tolist()
    rows = [rows[place] for place in ids.row]
    assert ids.pair.tolist() == [int(p.pair_id, 16) for p, _ in rows]
    assert ids.prompt.tolist() == [int(p.prompt_id, 16) for p, _ in rows]
    assert ids.couple.tolist() == [int(p.couple_id, 16) for p, _ in rows]
    assert ids.held_out.tolist() == [split == "eval" for _, split in rows]


def test_memory_of_a_row_does_not_depend_on_its_text(tmp_path: Path):
    short, _ = read_bucket(groups(write(tmp_path / "short", [[(pair("p", "a", "b"), "train")]])), 0, 1)
    texts = pair("p" * 100_000, "a" * 100_000, "b")
    long, _ = read_bucket(groups(write(tmp_path / "long", [[(texts, "train")]])), 0, 1)
    assert size(short) == size(long) < 40


def size(rows: RowIds) -> int:
    return sum(column.nbytes for column in vars(rows).values())


def test_the_table_names_shard_row_and_reason(tmp_path: Path):
    places = write(tmp_path, [[(A_OVER_B, "train")], [(A_OVER_B, "train")]])
    ids, names = read_bucket(groups(places), 0, 1)
    table = left_out_table(ids, find(ids), names)
    assert table.schema.equals(LEFT_OUT)
    assert table.to_pylist() == [{"shard": "1.parquet", "row": 0, "reason": "duplicate"}]
    nothing = left_out_table(ids, np.full(2, -1, dtype=np.int8), names)
    assert nothing.num_rows == 0 and nothing.schema.equals(LEFT_OUT)


def test_reading_leaves_out_and_counts(tmp_path: Path):
    [place] = write(tmp_path, [[(pair(f"Question {n}", "a", "b"), "train") for n in range(6)]])
    whole, counters = read_kept(PairsShard(place.uri))
    assert (whole.num_rows, counters) == (6, Counter(read=6))
    table, counters = read_kept(PairsShard(place.uri, left_out({"duplicate": [5], "contradiction": [0, 2]})))
    assert table["prompt_id"].to_pylist() == [whole["prompt_id"][n].as_py() for n in (1, 3, 4)]
    assert counters == Counter(read=6, duplicate=1, contradiction=2)


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "0.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"0\.parquet"):
        read_bucket([Location.of(tmp_path) / "0.parquet"], 0, 1)
    with pytest.raises(DataError, match=r"0\.parquet"):
        row_ids([Location.of(tmp_path) / "0.parquet"])


def test_a_bucket_fetches_the_row_groups_of_its_prompts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artifact, "_ROWS_PER_ROW_GROUP", 50)
    places = write(tmp_path, [[(pair(f"Question {n}", "a", "b"), "train") for n in range(2000)]])
    [file] = groups(places)
    read: list[int] = []
    one_group = pq.ParquetFile(file.uri).metadata.row_group(0).total_byte_size
    assert pq.ParquetFile(file.uri).num_row_groups == 40

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(-1 if size is None else size)
            read.append(len(data))
            return data

    monkeypatch.setattr(pa, "memory_map", lambda uri: pa.PythonFile(Counted(uri)))
    rows, _ = read_bucket([file], 3, 20)
    assert 50 < len(rows.row) < 150
    # Its own two or three row groups, one at each edge, and the footer with what lies where.
    assert sum(read) < 8 * one_group + 64_000 < file.size()


def test_the_repetition_and_the_contradiction_of_the_dirty_set_are_found(real_data: Path, tmp_path: Path):
    expected = json.loads((real_data / "dirty" / "expected.json").read_text())["files"]["dirty.parquet"]["expect"]
    raw = pq.read_table(real_data / "dirty" / "dirty.parquet").to_pylist()
    across = {"duplicate", "contradiction"}
    whole = [e for e in expected if e["valid"] or set(e["reasons"]) <= across]
    rows: list[Row] = []
    for e in whole:
        row = raw[e["index"]]
        answers = (row[side][0]["content"] for side in ("chosen", "rejected"))
        rows.append((PreferencePair(tuple(row["prompt"]), *answers), "train"))
    place = {e["row_id"]: number for number, e in enumerate(whole)}
    [duplicate] = [e for e in whole if e["reasons"] == ["duplicate"]]
    [second] = [e for e in whole if e["reasons"] == ["contradiction"]]
    assert found_in(write(tmp_path, [rows])) == {
        "0.parquet": {
            "duplicate": [place[duplicate["row_id"]]],
            "contradiction": [place[second["pair_with"]], place[second["row_id"]]],
        }
    }
