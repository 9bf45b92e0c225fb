"""No format takes another one's rows, whatever they say and whatever stands beside."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.rules import REASONS
from dpo_ray.errors import DataError
from dpo_ray.formats.format import NoPair, cut
from dpo_ray.formats.joined import joined
from dpo_ray.formats.registry import formats, recognise
from tests.unit.formats.known.cards import CARDS

ALL = [(name, card, row) for name, cards in CARDS.items() for card in cards for row in card.rows]
READ = {column for format_ in formats().values() for column in format_.reads}
SPELLED = {"role", "from", "winner"}  # keys whose values are words of the format

TEXT = st.text(max_size=6) | st.sampled_from(["\n\nHuman: a", "\n\nAssistant: b", " [1]", "Why?"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 4) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
BESIDE = st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name not in READ), JSON, max_size=3)


def longer(value: Any, text: str, key: str = "") -> Any:
    """A value whose texts go on with another one."""
    if isinstance(value, str):
        return value if key in SPELLED or value.startswith("[") else value + text
    if isinstance(value, list):
        return [longer(entry, text) for entry in value]
    return {k: longer(v, text, k) for k, v in value.items()} if isinstance(value, dict) else value


def looking_so(row: dict[str, Any]) -> set[str]:
    return {name for name, format_ in formats().items() if format_.looks_so(row)}


def test_every_format_has_a_card_and_is_called_as_its_file():
    assert set(CARDS) == set(formats())
    assert all(format_.name == name for name, format_ in formats().items())


@given(st.sampled_from(ALL), TEXT, BESIDE, st.data())
def test_a_row_is_written_as_one_format_has_it_and_as_no_other(
    one: tuple[str, Any, dict[str, Any]], text: str, beside: dict[str, Any], data: st.DataObject
):
    name, _, row = one
    row = {**longer(row, text, "" if "winner" not in row else "winner"), **beside}
    emptied = data.draw(st.lists(st.sampled_from(sorted(row)), max_size=2))
    assert looking_so({**row, **dict.fromkeys(emptied)}) <= {name}


@given(st.sampled_from(ALL), TEXT, BESIDE)
def test_a_file_is_what_its_rows_are(one: tuple[str, Any, dict[str, Any]], text: str, beside: dict[str, Any]):
    name, card, _ = one
    rows = [{**longer(row, text), **beside} if "winner" not in row else {**row, **beside} for row in card.rows]
    columns = [*card.types, *beside]
    assert recognise(columns, [cut(row) for row in rows], "f", option="auto", names={}).name == name


@given(st.sampled_from(ALL), st.sampled_from(ALL))
def test_a_file_that_two_formats_claim_is_an_error_that_names_both(one: Any, other: Any):
    row = {**one[2], **other[2]}
    found = looking_so(row)
    assert found <= {name for name, format_ in formats().items() if format_.has(row)}
    if len(found) == 1:
        assert recognise(list(row), [row], "f", option="auto", names={}).name in found
    elif found:
        with pytest.raises(DataError) as caught:
            recognise(list(row), [row], "f", option="auto", names={})
        said = str(caught.value)
        assert said.startswith(f"f may be read in {len(found)} ways")
        assert all(f"{name} (" in said and f"data.layout={name}" in said for name in found)


@given(st.sampled_from(sorted(CARDS)), st.data())
def test_any_row_becomes_a_row_of_the_layout_or_has_a_reason(name: str, data: st.DataObject):
    format_ = formats()[name]
    rows = [row for card in CARDS[name] for row in card.rows]
    spoilt = st.dictionaries(st.sampled_from(sorted(format_.reads)), JSON, max_size=4)
    row = {**data.draw(st.sampled_from(rows)), **data.draw(spoilt)}
    gone = data.draw(st.lists(st.sampled_from(sorted(row)), max_size=2))
    row = {column: value for column, value in row.items() if column not in gone and column in format_.reads}
    assert format_.looks_so(row) in {True, False}
    if format_.joins:
        [(_, row)] = joined([(0, row)], format_.joins)
    try:
        made = format_.row(row)
    except NoPair as error:
        assert error.reason in REASONS
        return
    assert set(made) <= {*format_.reads, "prompt", "chosen", "rejected", "completion", "completions", "label", "scores"}
