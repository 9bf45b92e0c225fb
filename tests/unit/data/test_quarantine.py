"""Rows that make no pair: what is kept of them, the account of all rows, and when there are too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.data.quarantine import bad_rows, quarantine_table, quarantined, require_enough_kept
from dpo_ray.data.raw.json_lines import RAW_BOUND
from dpo_ray.data.rules import REASONS, Reason
from dpo_ray.data.tally import Tally
from dpo_ray.errors import DataError
from dpo_ray.pairs import QUARANTINE
from dpo_ray.storage.artifact import Artifact, FileEntry, publish, write_shard
from dpo_ray.storage.location import Location


def raw_of(value: Any) -> str:
    return quarantined("f", 0, "null_field", value)["raw"]


def test_a_row_is_kept_as_json_and_text_as_it_stood():
    row = {"prompt": [{"role": "user", "content": "é"}], "label": None, "when": b"\xff"}
    assert json.loads(raw_of(row)) == {**row, "when": str(b"\xff")}
    assert raw_of('{"prompt": ') == '{"prompt": '


@pytest.mark.parametrize("value", ["x" * 9000, ["x" * 900] * 9, {str(i): "é" * 99 for i in range(99)}, [7] * 10**6])
def test_what_is_kept_is_the_beginning(value: Any):
    whole = value if isinstance(value, str) else json.dumps(value)
    assert raw_of(value) == whole[:RAW_BOUND]


def test_what_is_nested_beyond_recursion_is_cut():
    nested: Any = "bottom"
    for _ in range(100_000):
        nested = [nested]
    assert raw_of({"prompt": nested}) == '{"prompt": ' + "[" * 31 + '"\\u2026"' + "]" * 31 + "}"


def test_no_bad_rows_are_no_table():
    assert quarantine_table([]) is None
    table = quarantine_table([quarantined("f", 3, "tie", {})])
    assert table is not None and table.schema.equals(QUARANTINE)


def test_rows_are_counted_and_not_pairs():
    counters = {"read": 10, "kept": 12, "more_pairs": 5, "tie": 2, "null_field": 1, "other": 9}
    assert bad_rows(Tally.of(counters)) == {"tie": 2, "null_field": 1}


def test_counters_that_do_not_add_up_are_an_error():
    with pytest.raises(DataError, match="Of 10 rows 8 were kept and 1 quarantined"):
        bad_rows(Tally.of({"read": 10, "kept": 8, "tie": 1}))


@pytest.fixture
def ingested(tmp_path: Path):
    """An artifact of pairs with so many kept rows and these bad ones, one file of the quarantine for each list."""

    def make(kept: int, *bad: list[tuple[str, int, Reason]], **more: int) -> Artifact:
        location, files = Location.of(tmp_path / "pairs"), [FileEntry(name="s", rows=kept, bytes=0, sha256="")]
        for i, rows in enumerate(bad):
            table = quarantine_table([quarantined(source, number, reason, {}) for source, number, reason in rows])
            assert table is not None
            entry = write_shard(location / "quarantine" / f"{i}.parquet", table, {})
            files.append(entry.model_copy(update={"name": f"quarantine/{i}.parquet", "rows": None}))
        counted: dict[str, int] = {r: sum(row[2] == r for rows in bad for row in rows) for r in REASONS}
        counters = {"read": kept + sum(counted.values()), "kept": kept, **{k: v for k, v in counted.items() if v}}
        return publish(location, "pairs", identity={}, inputs={}, files=files, counters={**counters, **more})

    return make


def test_bad_rows_up_to_the_limit_are_let_through(ingested):
    require_enough_kept(ingested(95, [("f", i, "null_field") for i in range(5)]), 0.05)
    require_enough_kept(ingested(1), 0.0)


def test_ties_are_no_bad_rows_for_the_limit(ingested):
    require_enough_kept(ingested(1, [("f", i, "tie") for i in range(9)]), 0.0)
    with pytest.raises(
        DataError, match=r"1 of 11 rows \(9\.1%\) make no preference pair.*null_field 1 \(.* row 9 of f\)\."
    ):
        require_enough_kept(ingested(1, [("f", i, "tie") for i in range(9)], [("f", 9, "null_field")]), 0.05)


def test_too_many_bad_rows_are_an_error_with_the_reasons_that_dominate_and_an_example_of_each(ingested):
    pairs = ingested(
        6,
        [("a", 1, "not_an_object"), ("a", 4, "null_field"), ("a", 7, "null_field")],
        [
            ("b", 0, "bad_label"),
            ("b", 2, "bad_tools"),
            *[("b", i, "null_field") for i in (3, 5)],
            ("b", 9, "not_an_object"),
        ],
        [("c", 8, "bad_label"), ("c", 9, "bad_label")],
    )
    with pytest.raises(DataError) as caught:
        require_enough_kept(pairs, 0.5)
    said = str(caught.value)
    assert "10 of 16 rows (62.5%)" in said and "data.max_quarantined_fraction=0.5" in said
    assert "null_field 4 (a field, a role or a content is null; the first: row 4 of a), bad_label 3 (" in said
    assert "the first: row 0 of b), not_an_object 2 (" in said and "the first: row 1 of a), bad_tools 1." in said
    assert f"{pairs.location}/quarantine/0.parquet and 2 more" in said and "\n" not in said


def test_no_pair_at_all_is_an_error_whatever_the_limit(ingested):
    with pytest.raises(DataError, match=r"None of the 2 rows .* tie 2 .*row 0 of f"):
        require_enough_kept(ingested(0, [("f", 0, "tie"), ("f", 1, "tie")]), 1.0)
