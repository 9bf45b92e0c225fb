"""Raw rows → canonical pairs, a part of a file at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import Columns, Pairing
from dpo_ray.data.raw.json_lines import Unreadable
from dpo_ray.data.raw.parts import Part, RawPart
from dpo_ray.data.rules import REASONS
from dpo_ray.formats.layout import Layout
from dpo_ray.pairs import CARRIED, PAIRS, QUARANTINE, PreferencePair, Split, split_of
from dpo_ray.shards.ingest import IngestShard, RawShard
from tests.dialogues import stored

Write = Callable[..., Path]


def raw(number: int, **fields: Any) -> dict[str, Any]:
    row = {
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "chosen": [{"role": "assistant", "content": f"Good {number}"}],
        "rejected": [{"role": "assistant", "content": f"Bad {number}"}],
    }
    return {**row, **fields}


def source(
    path: Path, first: int = 0, count: int = 100, split: Split | None = "train", layout: Layout = "paired"
) -> RawShard:
    return RawShard(RawPart(str(path), Part(first, count)), layout, split)


def ingested(path: Path, **options: Any) -> list[str]:
    return IngestShard(0.1, 0)(source(path, **options)).table["chosen"].to_pylist()


def test_good_rows_become_canonical_pairs(tmp_path: Path, write_preferences: Write):
    output = IngestShard(0.1, 0)(source(write_preferences(tmp_path, [raw(0), raw(1)])))
    assert output.table.schema.equals(PAIRS)
    assert output.quarantine is None
    assert output.counters == {"read": 2}
    first = output.table.to_pylist()[0]
    pair = PreferencePair(tuple(raw(0)["prompt"]), "Good 0", "Bad 0")
    assert first == {
        "pair_id": pair.pair_id,
        "prompt_id": pair.prompt_id,
        "couple_id": pair.couple_id,
        "split": "train",
        "prompt": stored(raw(0)["prompt"]),
        "chosen": "Good 0",
        "rejected": "Bad 0",
        "tools": None,
        "chosen_turns": None,
        "rejected_turns": None,
        **dict.fromkeys(CARRIED),
    }


def test_bad_rows_go_to_quarantine_with_reason_and_row_number(tmp_path: Path, write_preferences: Write):
    rows = [raw(0), raw(1, chosen=[]), raw(2), raw(3, prompt=None), raw(4, rejected=[])]
    path = write_preferences(tmp_path, rows)
    output = IngestShard(0.1, 0)(source(path))
    assert output.counters == {"read": 5, "empty_response": 2, "null_field": 1}
    assert output.table["chosen"].to_pylist() == ["Good 0", "Good 2"]
    assert output.quarantine is not None and output.quarantine.schema.equals(QUARANTINE)
    quarantined = output.quarantine.to_pylist()
    assert [(q["row"], q["reason"]) for q in quarantined] == [
        (1, "empty_response"),
        (3, "null_field"),
        (4, "empty_response"),
    ]
    assert {q["source"] for q in quarantined} == {str(path)}
    assert json.loads(quarantined[1]["raw"]) == rows[3]


def test_single_answers_become_pairs_with_one_side_and_bad_labels_go_to_quarantine(tmp_path: Path):
    prompts = [raw(i)["prompt"] for i in range(4)]
    labels = pa.array([1, 0, 2, None])
    table = pa.table({"prompt": prompts, "completion": [f"Answer {i}" for i in range(4)], "label": labels})
    pq.write_table(table, tmp_path / "f.parquet")
    output = IngestShard(0.1, 0)(source(tmp_path / "f.parquet", layout="unpaired"))
    assert output.table.schema.equals(PAIRS)
    assert output.table["chosen"].to_pylist() == ["Answer 0", None]
    assert output.table["rejected"].to_pylist() == [None, "Answer 1"]
    assert output.table["pair_id"][1].as_py() == PreferencePair(tuple(prompts[1]), None, "Answer 1").pair_id
    assert output.counters == {"read": 4, "bad_label": 1, "null_field": 1}
    assert output.quarantine is not None
    assert json.loads(output.quarantine["raw"][0].as_py())["completion"] == "Answer 2"


def test_ranked_rows_make_several_pairs_or_none_and_the_counters_add_up(tmp_path: Path):
    rows = [
        {"prompt": "One?", "completions": ["a", "b", "c", "d"], "scores": [1.0, 2.0, 3.0, 4.0]},
        {"prompt": "Two?", "completions": ["a", "b", "c", "d"], "scores": [1.0, 1.0, 1.0, 1.0]},
        {"prompt": "Three?", "completions": ["a", "b"], "scores": [1.0, 2.0]},
        {"prompt": "Four?", "completions": ["a"], "scores": [1.0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    ingest = IngestShard(0.1, 0, pairing=Pairing(pairs_per_prompt=3))
    output = ingest(source(tmp_path / "f.parquet", layout="ranked"))
    found = [(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in output.table.to_pylist()]
    assert found == [("One?", "d", "a"), ("One?", "c", "b"), ("Three?", "b", "a")]
    assert output.counters == {"read": 4, "more_pairs": 1, "tie": 1, "too_few_distinct": 1}
    assert output.quarantine is not None
    assert output.quarantine.select(["row", "reason"]).to_pylist() == [
        {"row": 1, "reason": "tie"},
        {"row": 3, "reason": "too_few_distinct"},
    ]


def test_columns_are_read_by_the_names_that_they_have_in_the_files(tmp_path: Path):
    table = pa.table({"question": ["Why?"], "answer_a": ["Yes."], "answer_b": ["No."], "prompt": ["never read"]})
    pq.write_table(table, tmp_path / "f.parquet")
    columns = Columns(prompt="question", chosen="answer_a", rejected="answer_b")
    [row] = IngestShard(0.1, 0, columns=columns)(source(tmp_path / "f.parquet")).table.to_pylist()
    assert row["pair_id"] == PreferencePair(question("Why?"), "Yes.", "No.").pair_id


def test_a_column_that_another_field_is_named_after_is_not_the_field_of_its_own_name(tmp_path: Path):
    prompt = raw(0)["prompt"]
    whole = {side: [[*prompt, *raw(0)[side]]] for side in ("chosen", "rejected")}
    pq.write_table(pa.table({"prompt": whole["chosen"], "rejected": whole["rejected"]}), tmp_path / "f.parquet")
    [row] = IngestShard(0.1, 0, columns=Columns(chosen="prompt"))(source(tmp_path / "f.parquet")).table.to_pylist()
    assert (row["prompt"], row["chosen"], row["rejected"]) == (stored(prompt), "Good 0", "Bad 0")


def test_tools_go_with_the_pair_as_json_text(tmp_path: Path, write_preferences: Write):
    tools = [{"name": "look_up", "parameters": {"type": "object"}}]
    path = write_preferences(tmp_path, [raw(0, tools=tools), raw(1, tools=None), raw(2, tools=[{"name": None}])])
    output = IngestShard(0.1, 0)(source(path))
    assert output.table["tools"].to_pylist() == [json.dumps(tools), None]
    assert output.table["pair_id"][1] == IngestShard(0.1, 0)(source(path, first=1, count=1)).table["pair_id"][0]
    assert output.counters == {"read": 3, "bad_tools": 1}


def test_a_row_of_too_many_characters_is_bad(tmp_path: Path, write_preferences: Write):
    long = raw(1, chosen=[{"role": "assistant", "content": "x" * 1000}])
    path = write_preferences(tmp_path, [raw(0), long])
    assert IngestShard(0.1, 0, max_characters=1000)(source(path)).counters == {"read": 2, "too_long": 1}
    assert IngestShard(0.1, 0, max_characters=1200)(source(path)).counters == {"read": 2}


def test_a_row_that_could_not_be_parsed_is_quarantined_as_it_stood(monkeypatch: pytest.MonkeyPatch):
    rows = [(3, Unreadable("malformed_json", '{"prompt": ')), (7, raw(0))]
    monkeypatch.setattr("dpo_ray.shards.ingest.read_rows", lambda source, columns: iter(rows))
    output = IngestShard(0.1, 0)(source(Path("f.jsonl")))
    assert output.counters == {"read": 2, "malformed_json": 1} and output.table.num_rows == 1
    assert output.quarantine is not None
    assert output.quarantine.to_pylist() == [
        {"source": "f.jsonl", "row": 3, "reason": "malformed_json", "raw": '{"prompt": '}
    ]


def rows_of(layout: Layout, number: int) -> dict[str, Any]:
    """A good row of a layout, with a prompt of its own."""
    answers = raw(number)
    whole = {side: [*answers["prompt"], *answers[side]] for side in ("chosen", "rejected")}
    return {
        "paired": answers,
        "implicit_prompt": whole,
        "unpaired": {"prompt": answers["prompt"], "completion": f"Good {number}", "label": number % 2 == 0},
        "ranked": {"prompt": answers["prompt"], "completions": list("abcd"), "scores": [1, 2, 3, number % 5]},
    }[layout]


_ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.text(max_size=2))


_BROKEN = st.tuples(
    st.sampled_from(get_args(Layout)),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "completion", "scores", "tools"]), _ANY),
)


_READ = st.lists(
    st.sampled_from(get_args(Layout)) | _BROKEN | st.sampled_from(REASONS[:3]).map(lambda r: Unreadable(r, "{")),
    max_size=12,
)


@given(_READ, st.sampled_from(get_args(Layout)))
def test_every_row_is_kept_or_quarantined_with_a_reason_none_lost_none_twice(kinds: list[Any], layout: Layout):
    def read(kind: Any, number: int) -> dict[str, Any] | Unreadable:
        if isinstance(kind, Unreadable):
            return kind
        if isinstance(kind, tuple):
            return {**rows_of(kind[0], number), **kind[1]}
        return rows_of(kind, number)

    numbered = [(3 * i + 1, read(kind, i)) for i, kind in enumerate(kinds)]
    ingest = IngestShard(0.3, 0, pairing=Pairing(pairs_per_prompt=2), max_characters=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_ray.shards.ingest.read_rows", lambda source, columns: iter(numbered))
        output, again = (ingest(source(Path("f"), split=None, layout=layout)) for _ in range(2))
        alone = []
        for one in numbered:
            patch.setattr("dpo_ray.shards.ingest.read_rows", lambda source, columns, one=one: iter([one]))
            alone.append(ingest(source(Path("f"), split=None, layout=layout)))
    assert output == again

    bad = output.quarantine.to_pylist() if output.quarantine is not None else []
    assert {row["reason"] for row in bad} <= set(REASONS)
    assert output.counters["read"] == len(kinds)
    assert output.table.num_rows - output.counters["more_pairs"] + len(bad) == len(kinds)
    assert Counter(row["reason"] for row in bad) == {k: v for k, v in output.counters.items() if k in REASONS}
    # What a row becomes depends on no other row, and the order is that of the rows.
    assert output.table.equals(pa.concat_tables([PAIRS.empty_table(), *(part.table for part in alone)]))
    assert bad == [row for part in alone if part.quarantine is not None for row in part.quarantine.to_pylist()]
    assert [bool(part.table.num_rows) != bool(part.quarantine) for part in alone] == [True] * len(kinds)


@pytest.mark.parametrize("row_group_size", [2, 100])
def test_row_numbers_are_those_of_the_file_whatever_part_is_read(tmp_path: Path, row_group_size: int):
    rows = [raw(i, chosen=[] if i % 3 == 0 else raw(i)["chosen"]) for i in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet", row_group_size=row_group_size)
    output = IngestShard(0.1, 0)(source(tmp_path / "f.parquet", first=5, count=3))
    assert output.counters == {"read": 3, "empty_response": 1}
    assert output.quarantine is not None and output.quarantine["row"].to_pylist() == [6]


def test_a_file_without_rows_gives_none(tmp_path: Path):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_pylist([raw(0)]).slice(0, 0), path)
    output = IngestShard(0.1, 0)(source(path))
    assert output.table.num_rows == 0 and output.counters["read"] == 0


def test_the_split_is_by_the_hash_of_the_prompt_unless_the_file_has_a_side(tmp_path: Path, write_preferences: Write):
    path = write_preferences(tmp_path, [raw(i) for i in range(40)])
    rows = IngestShard(0.5, 3)(source(path, split=None)).table.to_pylist()
    assert [row["split"] for row in rows] == [split_of(row["prompt_id"], 0.5, 3) for row in rows]
    assert {row["split"] for row in rows} == {"train", "eval"}
    assert set(IngestShard(0.5, 3)(source(path, split="eval")).table["split"].to_pylist()) == {"eval"}


def test_columns_that_are_not_asked_for_do_not_matter(tmp_path: Path, write_preferences: Write):
    path = write_preferences(tmp_path, [raw(0, blob=b"\xff", score=1.5)])
    assert ingested(path) == ["Good 0"]


def not_utf8(*values: bytes) -> pa.Array:
    """A column of text that holds any bytes; Parquet files of careless writers have such."""
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value))
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), len(values), [None, offsets, pa.py_buffer(b"".join(values))])


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path: Path):
    table = pa.table({"prompt": ["Why?", "Why?"], "chosen": not_utf8(b"\xff\xfe", b"ok"), "rejected": ["a", "b"]})
    pq.write_table(table, tmp_path / "f.parquet")
    output = IngestShard(0.1, 0)(source(tmp_path / "f.parquet"))
    assert output.table["chosen"].to_pylist() == ["ok"]
    assert output.counters == {"read": 2, "invalid_utf8": 1}
    assert output.quarantine is not None
    raw = '{"prompt": "Why?", "chosen": "\\\\xff\\\\xfe", "rejected": "a"}'
    assert output.quarantine.to_pylist() == [
        {"source": str(tmp_path / "f.parquet"), "row": 0, "reason": "invalid_utf8", "raw": raw}
    ]


def test_lines_that_cannot_be_parsed_go_to_quarantine_with_their_line_numbers(tmp_path: Path):
    lines = [json.dumps(raw(0)).encode(), b"", b"{", b'{"a": "\xff"}', json.dumps(raw(1)).encode(), b"[]"]
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    output = IngestShard(0.1, 0)(RawShard(RawPart(str(tmp_path / "f.jsonl")), "paired", "train"))
    assert output.table["chosen"].to_pylist() == ["Good 0", "Good 1"]
    assert output.counters == {"read": 5, "malformed_json": 1, "invalid_utf8": 1, "not_an_object": 1}
    assert output.quarantine is not None
    assert [(q["row"], q["reason"], q["raw"]) for q in output.quarantine.to_pylist()] == [
        (3, "malformed_json", "{"),
        (4, "invalid_utf8", '{"a": "\\xff"}'),
        (6, "not_an_object", "[]"),
    ]


def question(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)
