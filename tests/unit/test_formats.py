"""Raw rows → canonical pairs or the rule that they break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_ray.errors import DataError
from dpo_ray.formats import canonical_pair, canonical_prompt, check_columns, is_unpaired
from dpo_ray.pairs import PreferencePair
from dpo_ray.quality import BadRow, Reason


def user(text: Any = "Why?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def row(**fields: Any) -> dict[str, Any]:
    """A good row with an explicit prompt, with fields laid over it."""
    return {"prompt": [user()], "chosen": [assistant("Because.")], "rejected": [assistant("No idea.")], **fields}


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in row().items() if k != name}


EXPECTED = PreferencePair((user(),), "Because.", "No idea.")  # type: ignore[arg-type]

IMPLICIT = {"chosen": [user(), assistant("Because.")], "rejected": [user(), assistant("No idea.")]}


@pytest.mark.parametrize(
    "layout",
    [
        row(),
        IMPLICIT,
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        row(source="web", score=3.5, meta={"a": None}),
    ],
    ids=["explicit", "implicit", "text", "more_columns"],
)
def test_every_layout_of_a_pair_makes_the_same_pair(layout: dict[str, Any]):
    assert canonical_pair(layout) == EXPECTED


def single(**fields: Any) -> dict[str, Any]:
    """A good row of a single answer, with fields laid over it."""
    return {"prompt": [user()], "completion": [assistant("Because.")], "label": True, **fields}


@pytest.mark.parametrize("prompt", ["Why?", [user()]], ids=["text", "messages"])
@pytest.mark.parametrize("completion", ["Because.", [assistant("Because.")]], ids=["text", "message"])
@pytest.mark.parametrize("label", [True, 1, False, 0])
def test_a_desirable_answer_is_chosen_and_an_undesirable_one_rejected(prompt: Any, completion: Any, label: Any):
    expected = PreferencePair(EXPECTED.prompt, *(("Because.", None) if label else (None, "Because.")))
    assert canonical_pair({"prompt": prompt, "completion": completion, "label": label, "source": "web"}) == expected


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (single(label="yes"), "bad_label"),
        (single(label=2), "bad_label"),
        (single(label=0.5), "bad_label"),
        (single(label=None), "null_field"),
        (single(prompt=None), "null_field"),
        (single(completion=None), "null_field"),
        (single(prompt={"role": "user"}), "non_string_content"),
        (single(completion=assistant("x")), "non_string_content"),
        (single(completion=7), "non_string_content"),
        (single(prompt=[]), "empty_prompt"),
        (single(prompt=" "), "empty_prompt"),
        (single(prompt=[assistant("x")]), "role_order"),
        (single(completion=[]), "empty_response"),
        (single(completion=""), "empty_response"),
        (single(completion=[assistant("\n")], label=False), "empty_response"),
        (single(completion=[user("x")]), "bad_completion"),
        (single(completion=[assistant("a"), assistant("b")]), "bad_completion"),
        (single(completion=[user(), assistant("x")]), "prompt_repeated"),
        (single(prompt="Why?", completion=[user(), assistant("x")]), "prompt_repeated"),
        (single(completion="\ud800"), "invalid_unicode"),
    ],
)
def test_a_bad_single_answer_is_rejected_for_the_rule_that_it_breaks(raw: dict[str, Any], reason: Reason):
    with pytest.raises(BadRow) as caught:
        canonical_pair(raw)
    assert caught.value.reason == reason


def test_an_implicit_prompt_keeps_all_its_turns():
    turns = [{"role": "system", "content": "Be brief."}, user("Hi."), assistant("Hello."), user()]
    pair = canonical_pair({"chosen": [*turns, assistant("a")], "rejected": [*turns, assistant("b")]})
    assert list(pair.prompt) == turns
    assert (pair.chosen, pair.rejected) == ("a", "b")


def test_text_is_kept_character_by_character():
    text = "  \u200fcafe\u0301 👩‍👩‍👧‍👦 \x00\r\n"
    assert canonical_pair(row(chosen=[assistant(text)])).chosen == text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (without("chosen"), "missing_field"),
        (without("rejected"), "missing_field"),
        ({"chosen": "a", "rejected": "b"}, "missing_field"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "missing_field"),
        ({}, "missing_field"),
        (row(prompt=[{"role": "user"}]), "missing_field"),
        (row(prompt=None), "null_field"),
        (row(chosen=None), "null_field"),
        (row(rejected=[None]), "null_field"),
        (row(prompt=[user(None)]), "null_field"),
        (row(prompt=[{"role": None, "content": "x"}]), "null_field"),
        (row(chosen=[assistant(4)]), "non_string_content"),
        (row(chosen=[assistant(True)]), "non_string_content"),
        (row(chosen=[assistant([{"type": "text", "text": "x"}])]), "non_string_content"),
        (row(chosen=assistant("x")), "non_string_content"),
        (row(prompt=["Why?"]), "non_string_content"),
        ({"prompt": 1, "chosen": 2, "rejected": 3}, "non_string_content"),
        (row(prompt="Why?"), "mixed_types"),
        (row(chosen="Because."), "mixed_types"),
        (row(prompt=[]), "empty_prompt"),
        (row(prompt=[user(" \n")]), "empty_prompt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        (row(chosen=[]), "empty_response"),
        (row(rejected=[]), "empty_response"),
        (row(chosen=[assistant("")]), "empty_response"),
        (row(rejected=[assistant("\t\n")]), "empty_response"),
        ({"prompt": "Why?", "chosen": "", "rejected": "b"}, "empty_response"),
        (row(chosen=[assistant("No idea.")]), "identical_pair"),
        (row(chosen=[assistant(" No idea.\n")]), "identical_pair"),
        (row(prompt=[{"role": "human", "content": "x"}]), "unknown_role"),
        (row(prompt=[user(), assistant("x")]), "role_order"),
        (row(prompt=[user(), user()]), "role_order"),
        (row(prompt=[assistant("x"), user()]), "role_order"),
        (row(prompt=[user(), {"role": "system", "content": "x"}, user()]), "role_order"),
        (row(chosen=[user("x")]), "bad_completion"),
        (row(chosen=[assistant("a"), user("b"), assistant("c")]), "bad_completion"),
        ({"chosen": [user(), user("x")], "rejected": [user(), user("y")]}, "bad_completion"),
        (
            {
                "chosen": [user("a"), assistant("x"), user("b"), assistant("c")],
                "rejected": [user("a"), assistant("y"), user("b"), assistant("d")],
            },
            "diverging_prefix",
        ),
        ({"prompt": [user()], **IMPLICIT}, "prompt_repeated"),
        (row(chosen=[assistant("\ud800")]), "invalid_unicode"),
        (row(prompt=[user("\udfff")]), "invalid_unicode"),
    ],
)
def test_a_bad_row_is_rejected_for_the_rule_that_it_breaks(raw: dict[str, Any], reason: Reason):
    with pytest.raises(BadRow) as caught:
        canonical_pair(raw)
    assert caught.value.reason == reason


_TEXT = st.text(st.characters(), max_size=4) | st.sampled_from(["user", "assistant", "system", "Why?"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_MESSAGE = st.fixed_dictionaries({}, optional={"role": _TEXT | _JSON, "content": _TEXT | _JSON})
_FIELD = _JSON | st.lists(_MESSAGE | _JSON, max_size=4)
_ROW = st.dictionaries(_TEXT, _JSON, max_size=2).flatmap(
    lambda other: st.fixed_dictionaries(
        {}, optional={**dict.fromkeys(("prompt", "chosen", "rejected", "completion"), _FIELD), "label": _JSON}
    ).map(lambda fields: {**other, **fields})
)


@given(_ROW)
@example(row())
@example({"prompt": "Why?", "chosen": "a", "rejected": "b"})
@example(single(label=False))
def test_any_row_makes_a_good_pair_or_is_a_bad_row_and_nothing_else(raw: dict[str, Any]):
    try:
        pair = canonical_pair(raw)
    except BadRow as error:
        assert error.reason in get_args(Reason)
        return
    assert pair.prompt[-1]["role"] == "user"
    json.dumps([pair.prompt, pair.chosen, pair.rejected], ensure_ascii=False).encode()
    assert len(pair.pair_id) == 16
    if pair.chosen is None or pair.rejected is None:
        text = pair.chosen if pair.rejected is None else pair.rejected
        assert text is not None and text.strip()
        again = {"prompt": list(pair.prompt), "completion": text, "label": pair.rejected is None}
        assert is_unpaired(raw) and canonical_pair(again) == pair
        return
    assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen.strip() != pair.rejected.strip()
    assert (
        canonical_pair(
            {"prompt": list(pair.prompt), "chosen": [assistant(pair.chosen)], "rejected": [assistant(pair.rejected)]}
        )
        == pair
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Why?", [user()]),
        ([user()], [user()]),
        ([user("a"), assistant("b"), user()], [user("a"), assistant("b"), user()]),
    ],
)
def test_a_prompt_is_text_or_messages(value: Any, expected: list[dict[str, Any]]):
    assert canonical_prompt(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null_field"),
        (3, "non_string_content"),
        ("", "empty_prompt"),
        ([], "empty_prompt"),
        ([assistant("x")], "role_order"),
        (["x"], "non_string_content"),
        ("\ud800", "invalid_unicode"),
    ],
)
def test_what_is_no_prompt_is_rejected(value: Any, reason: Reason):
    with pytest.raises(BadRow) as caught:
        canonical_prompt(value)
    assert caught.value.reason == reason


def test_columns_that_hold_pairs_pass():
    check_columns(["source", "rejected", "chosen"], "f.parquet")
    check_columns(["label", "completion", "prompt", "source"], "f.parquet")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "completion", "label", "id"], True),
        (["prompt", "completion"], False),
        (["completion", "label"], False),
        (["prompt", "chosen", "rejected"], False),
        # Pairs that also have columns of those names are pairs.
        (["prompt", "chosen", "rejected", "completion", "label"], False),
    ],
)
def test_a_file_is_unpaired_by_its_columns(columns: list[str], expected: bool):
    assert is_unpaired(columns) is expected


@pytest.mark.parametrize(
    ("columns", "missing"),
    [(["prompt", "chosen"], "rejected"), (["text"], "chosen"), (["prompt", "completion"], "chosen"), ([], "chosen")],
)
def test_a_file_without_the_columns_fails_with_its_name_and_what_is_missing(columns: list[str], missing: str):
    with pytest.raises(DataError) as caught:
        check_columns(columns, "f.parquet")
    assert "f.parquet" in str(caught.value) and f"no column {missing}" in str(caught.value)
    assert "prompt, completion and label" in str(caught.value)


# Rules on files, lines and rows among each other; a row alone cannot break them.
_NOT_OF_A_ROW = {
    "too_long",
    "duplicate",
    "contradiction",
    "invalid_utf8",
    "malformed_json",
    "blank_line",
    "not_an_object",
}


def _expected(real_data: Path, file: str) -> list[dict[str, Any]]:
    listed = json.loads((real_data / "dirty" / "expected.json").read_text())["files"][file]["expect"]
    return [entry for entry in listed if not _NOT_OF_A_ROW & set(entry["reasons"])]


def _reasons(raw: dict[str, Any]) -> list[str]:
    try:
        canonical_pair(raw)
    except BadRow as error:
        return [error.reason]
    return []


def test_the_rows_of_the_dirty_parquet_file_are_judged_as_expected(real_data: Path):
    rows = pq.read_table(real_data / "dirty" / "dirty.parquet").to_pylist()
    expected = {entry["row_id"]: entry["reasons"] for entry in _expected(real_data, "dirty.parquet")}
    assert len(expected) == 28
    found = {raw["pair_id"]: _reasons(raw) for raw in rows if raw["pair_id"] in expected}
    assert found == expected


def test_the_rows_of_the_dirty_json_lines_are_judged_as_expected(real_data: Path):
    lines = (real_data / "dirty" / "dirty.jsonl").read_bytes().split(b"\n")
    entries = _expected(real_data, "dirty.jsonl")
    assert len(entries) == 39
    found = {entry["row_id"]: _reasons(json.loads(lines[entry["line"] - 1])) for entry in entries}
    assert found == {entry["row_id"]: entry["reasons"] for entry in entries}


@pytest.mark.parametrize("name", ["string_columns.parquet", "other_types.parquet", "implicit_prompt.parquet"])
def test_the_other_layouts_are_recognised(real_data: Path, name: str):
    rows = pq.read_table(real_data / "dirty" / name).to_pylist()
    about = json.loads((real_data / "dirty" / "expected.json").read_text())["files"][name]
    assert sum(not _reasons(raw) for raw in rows) == about["valid"]
    if "expect" in about:
        assert [_reasons(raw) for raw in rows] == [entry["reasons"] for entry in about["expect"]]
