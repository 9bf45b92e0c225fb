"""Columns → the layout of a file."""

from __future__ import annotations

from typing import Any

import pytest
from dpo_ray.config.layouts import Layout, fields_of, layout_of, recognise

from dpo_ray.config import Columns
from dpo_ray.errors import DataError


def found(columns: list[str], option: Any = "auto", **renamed: str) -> Layout:
    return recognise(columns, "f.parquet", option=option, names=Columns(**renamed).in_files())


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["source", "rejected", "chosen"], "paired"),
        (["prompt", "chosen", "rejected"], "paired"),
        (["label", "completion", "prompt", "source"], "unpaired"),
        (["prompt", "completions", "scores", "tools"], "ranked"),
        # Pairs that also have columns of those names are pairs.
        (["prompt", "chosen", "rejected", "completion", "label", "completions", "scores"], "paired"),
        (["prompt", "completion", "label", "chosen"], "unpaired"),
        (["prompt", "completion"], None),
        (["completion", "label"], None),
        (["prompt", "completions"], None),
        ([], None),
    ],
)
def test_a_layout_is_seen_by_its_columns(columns: list[str], layout: Layout | None):
    assert layout_of(columns) == layout
    if layout is not None:
        assert found(columns) == layout


@pytest.mark.parametrize("option", ["paired", "implicit_prompt", "unpaired", "ranked"])
def test_a_layout_that_is_named_is_taken_whatever_else_is_there(option: Layout):
    columns = ["prompt", "chosen", "rejected", "completion", "label", "completions", "scores"]
    assert found(columns, option) == option
    assert fields_of(option)[-1] == "tools"


def test_the_prompt_of_an_implicit_prompt_is_not_read():
    assert "prompt" in fields_of("paired") and "prompt" not in fields_of("implicit_prompt")


def test_columns_may_have_other_names():
    assert found(["question", "a", "b"], prompt="question", chosen="a", rejected="b") == "paired"
    assert found(["prompt", "answers", "scores"], completions="answers") == "ranked"
    # What is named counts, not what is called so.
    assert found(["prompt", "completion", "chosen", "rejected"], chosen="completion") == "paired"


@pytest.mark.parametrize(
    ("columns", "option", "renamed", "missing"),
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
        (["chosen", "rejected"], "auto", {"tools": "functions"}, "no column functions (data.columns.tools)"),
    ],
)
def test_a_file_without_the_columns_fails_with_its_name_and_what_is_missing(
    columns: list[str], option: Any, renamed: dict[str, str], missing: str
):
    with pytest.raises(DataError) as caught:
        found(columns, option, **renamed)
    said = str(caught.value)
    assert said.startswith("f.parquet has no column") and missing in said
    assert "prompt, completion and label" in said and "data.columns.chosen=" in said


def test_a_name_for_a_column_of_another_layout_is_not_asked_for():
    assert found(["chosen", "rejected"], completion="answer") == "paired"
