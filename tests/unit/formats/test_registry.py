"""Columns and first rows → the format of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dpo_ray.config import Columns
from dpo_ray.errors import DataError
from dpo_ray.formats.format import CUT, CUT_LIST, cut
from dpo_ray.formats.joined import joined
from dpo_ray.formats.layout import Layout, fields_of
from dpo_ray.formats.registry import formats, recognise, renamed
from tests.unit.formats.known.cards import CARDS

WHY = [{"role": "user", "content": "Why?"}]
SO = [{"role": "assistant", "content": "So."}]


def found(columns: Sequence[str], *rows: dict[str, Any], option: str = "auto", **names: str) -> str:
    return recognise(columns, rows, "f.parquet", option=option, names=Columns(**names).renamed()).name


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["source", "rejected", "chosen"], "paired"),
        (["prompt", "chosen", "rejected"], "paired"),
        (["label", "completion", "prompt", "source"], "unpaired"),
        (["prompt", "completions", "scores", "tools"], "ranked"),
        (["prompt", "answers"], "nectar"),
        (["instruction", "completions"], "ultrafeedback"),
    ],
)
def test_without_rows_the_columns_decide(columns: list[str], name: str):
    assert found(columns) == name


def test_columns_of_several_formats_are_told_apart_by_the_rows():
    row = {
        "prompt": "Why?",
        "chosen": "So.",
        "rejected": "No.",
        "completion": "So.",
        "label": None,
        "completions": None,
    }
    assert found([*row, "scores"], {**row, "scores": None}) == "paired"
    single = {**row, "chosen": None, "rejected": None, "label": True}
    assert found(list(single), single) == "unpaired"


def test_two_formats_that_fit_are_an_error_that_names_both_and_the_option():
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "completion": "So.", "label": True}
    with pytest.raises(
        DataError, match=r"f\.parquet may be read in 2 ways.*-o data\.layout=paired, or data\.layout=unp"
    ):
        found(list(row), row)
    assert found(list(row), row, option="unpaired") == "unpaired"


def test_a_file_whose_rows_are_of_two_formats_is_taken_for_the_larger_part_and_halves_are_an_error():
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    whole = {"prompt": "Why?", "chosen": [*WHY, *SO], "rejected": [*WHY, {"role": "assistant", "content": "No."}]}
    assert found(list(pair), pair, pair, whole) == "paired"
    assert found(list(pair), pair, whole, whole) == "implicit_prompt"
    with pytest.raises(DataError, match=r"implicit_prompt \(.*paired \("):
        found(list(pair), pair, whole)


def test_where_most_rows_are_broken_the_others_decide_and_else_the_columns():
    transcript = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    broken = {"chosen": None, "rejected": 4}
    assert found(list(broken), broken, broken, transcript) == "hh_rlhf"
    assert found(list(broken), broken, broken) == "paired"
    with pytest.raises(DataError, match=r"columns of nectar, but none of its first 1 rows .*data\.layout=nectar"):
        found(["prompt", "answers"], {"prompt": "Why?", "answers": ["So."]})


@pytest.mark.parametrize("option", ["paired", "implicit_prompt", "unpaired", "ranked"])
def test_a_format_that_is_named_is_taken_whatever_else_is_there(option: Layout):
    columns = ["prompt", "chosen", "rejected", "completion", "label", "completions", "scores"]
    assert found(columns, option=option) == option
    assert fields_of(option)[-1] == "tools"


def test_the_prompt_of_an_implicit_prompt_is_not_read():
    assert "prompt" in formats()["paired"].reads and "prompt" not in formats()["implicit_prompt"].reads


def test_columns_may_have_other_names():
    assert found(["question", "a", "b"], prompt="question", chosen="a", rejected="b") == "paired"
    assert found(["prompt", "answers", "scores"], completions="answers") == "ranked"
    # What is named counts, not what is called so.
    row = {"prompt": "Why?", "completion": "So.", "chosen": 4, "rejected": "No."}
    assert found(list(row), row, chosen="completion") == "paired"
    assert renamed(row, {"chosen": "completion"}) == {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


@pytest.mark.parametrize(
    ("columns", "option", "names", "missing"),
    [
        (["prompt", "chosen"], "auto", {}, "no column rejected ("),
        (["text"], "auto", {}, "no column chosen and no column rejected ("),
        (["prompt", "completion"], "auto", {}, "no column chosen"),
        ([], "auto", {}, "it has none"),
        (["chosen", "rejected"], "ranked", {}, "no column prompt and no column completions and no column scores"),
        (["prompt", "completion", "label"], "paired", {}, "no column chosen and no column rejected"),
        (["a", "rejected"], "auto", {"chosen": "b"}, "no column b (data.columns.chosen)"),
        # A prompt that is named and absent is no implicit prompt.
        (["prompt", "chosen", "rejected"], "auto", {"prompt": "qestion"}, "no column qestion (data.columns.prompt)"),
        (["prompt", "chosen", "rejected"], "paired", {"prompt": "qestion"}, "no column qestion (data.columns.prompt)"),
        (["chosen", "rejected"], "auto", {"tools": "functions"}, "no column functions (data.columns.tools)"),
        (["prompt", "response_0", "response_1"], "auto", {}, "nearest formats pku_saferlhf lacks better_response_id"),
    ],
)
def test_a_file_without_the_columns_fails_with_its_name_and_what_is_missing(
    columns: list[str], option: str, names: dict[str, str], missing: str
):
    with pytest.raises(DataError) as caught:
        found(columns, option=option, **names)
    said = str(caught.value)
    assert said.startswith("f.parquet has no column") and missing in said
    assert "prompt, completion and label" in said and "data.columns.chosen=" in said


def test_a_look_is_given_the_beginnings_of_long_values():
    long = {"a": ["x" * 1000] * 100, "b": {"c": "y" * 1000}, "d": 4}
    assert cut(long) == {"a": ["x" * CUT] * CUT_LIST, "b": {"c": "y" * CUT}, "d": 4}
    assert len(cut(dict.fromkeys(map(str, range(999))))) == 999, "each column stays"
    nested: Any = "bottom"
    for _ in range(99):
        nested = [nested]
    assert len(str(cut({"a": nested}))) < 40


def test_what_stands_beside_prompt_and_answers_is_passed_on_by_every_format():
    tools = [{"name": "look_up"}]
    for name, cards in CARDS.items():
        format_ = formats()[name]
        row = {column: value for column, value in cards[0].rows[0].items() if column in format_.reads}
        row["tools"] = tools
        if format_.joins:
            [(_, row)] = joined([(0, row), (1, row)], format_.joins)
        assert "tools" in format_.reads
        assert format_.row(row)["tools"] == tools, name


def test_a_name_for_a_column_of_another_layout_is_not_asked_for():
    assert found(["chosen", "rejected"], completion="answer") == "paired"
