"""Raw rows → canonical pairs or the rule that they break."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_ray.config import Pairing
from dpo_ray.data.canonical import canonical_pairs, canonical_prompt
from dpo_ray.data.rules import REASONS, BadRow, Reason
from dpo_ray.formats.layout import Layout, required_of
from dpo_ray.pairs import PreferencePair


def user(text: Any = "Why?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def row(**fields: Any) -> dict[str, Any]:
    """A good row with an explicit prompt, with fields laid over it."""
    return {"prompt": [user()], "chosen": [assistant("Because.")], "rejected": [assistant("No idea.")], **fields}


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in row().items() if k != name}


def layout_of(raw: dict[str, Any]) -> Layout:
    """The first layout whose fields a row has."""
    fitting: list[Layout] = [layout for layout in get_args(Layout) if set(required_of(layout)) <= set(raw)]
    return fitting[0] if fitting else "paired"


def canonical_pair(raw: dict[str, Any]) -> PreferencePair:
    """The one pair of a row, whose layout is seen by its fields."""
    [pair] = canonical_pairs(raw, layout_of(raw), Pairing())
    return pair


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
        (single(completion=[assistant("a"), assistant("b")]), "role_order"),
        (single(completion=[assistant("a"), user("b")]), "bad_completion"),
        (single(completion=[assistant("a"), user("b"), assistant(" ")]), "empty_response"),
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


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "raw",
    [
        row(system="Be brief."),
        row(prompt=[SYSTEM, user()]),
        row(prompt=[SYSTEM, user()], system="Be brief."),
        {**IMPLICIT, "system": "Be brief."},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea.", "system": "Be brief."},
        {"prompt": "Why?", "completions": ["Because.", "No idea."], "scores": [2, 1], "system": "Be brief."},
    ],
)
def test_a_system_column_begins_the_dialogue_that_has_no_such_message(raw: dict[str, Any]):
    assert canonical_pair(raw).prompt == (SYSTEM, user())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (row(prompt=[SYSTEM, user()], system="Be long."), "other_system"),
        (row(system=[SYSTEM]), "non_string_content"),
        (row(system="\ud800"), "invalid_unicode"),
    ],
)
def test_a_system_column_that_says_otherwise_is_rejected(raw: dict[str, Any], reason: Reason):
    with pytest.raises(BadRow) as error:
        canonical_pair(raw)
    assert error.value.reason == reason


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
        (row(chosen=[assistant("a"), user("b")]), "bad_completion"),
        (row(chosen=[assistant("a"), assistant("b")]), "role_order"),
        (row(chosen=[assistant("a"), user("b"), assistant("")]), "empty_response"),
        ({"chosen": [user(), user("x")], "rejected": [user(), user("y")]}, "bad_completion"),
        (
            {
                "chosen": [user("a"), assistant("x"), user("b"), assistant("c")],
                "rejected": [user("z"), assistant("x"), user("b"), assistant("d")],
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


@pytest.mark.parametrize("prompt", ["Why?", [user()], None], ids=["text", "messages", "null"])
def test_a_prompt_beside_whole_dialogues_is_passed_over_on_request(prompt: Any):
    assert canonical_pairs({"prompt": prompt, **IMPLICIT}, "implicit_prompt", Pairing()) == [EXPECTED]


def ranked(**fields: Any) -> dict[str, Any]:
    """A good row of ranked answers, with fields laid over it."""
    return {"prompt": "Why?", "completions": ["No idea.", "Because.", "Who?"], "scores": [1, 3.5, 2], **fields}


@pytest.mark.parametrize("prompt", ["Why?", [user()]], ids=["text", "messages"])
@pytest.mark.parametrize(
    "completions",
    [["No idea.", "Because.", "Who?"], [[assistant("No idea.")], [assistant("Because.")], "Who?"]],
    ids=["text", "messages"],
)
def test_ranked_answers_become_the_pair_of_the_best_and_the_worst(prompt: Any, completions: Any):
    assert canonical_pairs(ranked(prompt=prompt, completions=completions), "ranked", Pairing()) == [EXPECTED]


def test_ranked_answers_become_several_pairs_on_request_and_ties_end_them():
    raw = ranked(completions=list("abcdef"), scores=[1, 6, 2, 5, 3, 4])
    of_row = [(p.chosen, p.rejected) for p in canonical_pairs(raw, "ranked", Pairing(pairs_per_prompt=9))]
    assert of_row == [("b", "a"), ("d", "c"), ("f", "e")]
    wide = Pairing(pairs_per_prompt=9, min_score_gap=3)
    assert [(p.chosen, p.rejected) for p in canonical_pairs(raw, "ranked", wide)] == [("b", "a"), ("d", "c")]


def test_a_ranked_answer_without_text_or_for_the_second_time_is_passed_over():
    raw = ranked(completions=["", "No idea.", "Because.", [], "Because."], scores=[9, 1, 3, 9, 9])
    assert canonical_pairs(raw, "ranked", Pairing()) == [EXPECTED]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"prompt": "Why?", "completions": ["a", "b"]}, "missing_field"),
        (ranked(prompt=None), "null_field"),
        (ranked(completions=None), "null_field"),
        (ranked(scores=None), "null_field"),
        (ranked(completions=["a", None, "b"]), "null_field"),
        (ranked(prompt=[]), "empty_prompt"),
        (ranked(completions="abc"), "non_string_content"),
        (ranked(completions=["a", 7, "b"]), "non_string_content"),
        (ranked(completions=[assistant("a"), assistant("b"), assistant("c")]), "non_string_content"),
        (ranked(completions=["a", [user("b")], "c"]), "bad_completion"),
        (ranked(completions=["a", [user(), assistant("b")], "c"]), "prompt_repeated"),
        (ranked(completions=["a", "b"]), "bad_scores"),
        (ranked(scores=[1, None, 2]), "bad_scores"),
        (ranked(completions=["", " ", "\n"]), "empty_response"),
        (ranked(completions=[], scores=[]), "empty_response"),
        (ranked(completions=["a", "a ", ""]), "too_few_distinct"),
        (ranked(completions=["a"], scores=[1]), "too_few_distinct"),
        (ranked(scores=[2, 2, 2.05]), "small_gap"),
        (ranked(scores=[2, 2, 2]), "tie"),
    ],
)
def test_a_ranked_row_without_a_pair_is_bad_for_the_rule_that_it_breaks(raw: dict[str, Any], reason: Reason):
    with pytest.raises(BadRow) as caught:
        canonical_pairs(raw, "ranked", Pairing())
    assert caught.value.reason == reason


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("raw", [row(), IMPLICIT, single(), ranked()], ids=["paired", "implicit", "unpaired", "ranked"])
def test_rows_of_every_layout_may_have_tools(raw: dict[str, Any]):
    plain, with_tools = canonical_pair(raw), canonical_pair({**raw, "tools": TOOLS})
    assert plain.tools is None
    assert with_tools.tools is not None and json.loads(with_tools.tools) == TOOLS
    assert (with_tools.prompt, with_tools.chosen, with_tools.rejected) == (plain.prompt, plain.chosen, plain.rejected)
    assert canonical_pair({**raw, "tools": json.dumps(TOOLS, indent=2)}) == with_tools
    with pytest.raises(BadRow, match="bad_tools"):
        canonical_pair({**raw, "tools": "look_up"})


_TEXT = st.text(st.characters(), max_size=4) | st.sampled_from(["user", "assistant", "system", "Why?"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_MESSAGE = st.fixed_dictionaries({}, optional={"role": _TEXT | _JSON, "content": _TEXT | _JSON})
_FIELD = _JSON | st.lists(_MESSAGE | _JSON, max_size=4)
_FIELDS = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), _FIELD),
    "label": _JSON,
    "completions": st.lists(_FIELD, max_size=4) | _JSON,
    "scores": st.lists(_JSON, max_size=4) | _JSON,
    "tools": _JSON,
}
_ROW = st.dictionaries(_TEXT, _JSON, max_size=2).flatmap(
    lambda other: st.fixed_dictionaries({}, optional=_FIELDS).map(lambda fields: {**other, **fields})
)


@given(_ROW)
@example(row())
@example({"prompt": "Why?", "chosen": "a", "rejected": "b"})
@example(single(label=False))
@example(ranked(tools=TOOLS))
def test_any_row_makes_good_pairs_or_is_a_bad_row_and_nothing_else(raw: dict[str, Any]):
    layout = layout_of(raw)
    try:
        pairs = canonical_pairs(raw, layout, Pairing(pairs_per_prompt=2))
    except BadRow as error:
        assert error.reason in REASONS
        return
    assert pairs and (len(pairs) == 1 or layout == "ranked")
    for pair in pairs:
        assert pair.prompt[-1]["role"] == "user"
        json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.tools], ensure_ascii=False).encode()
        assert len(pair.pair_id) == 16
        assert (pair.chosen is None or pair.rejected is None) == (layout == "unpaired")
        again: dict[str, Any] = {"prompt": list(pair.prompt), "tools": pair.tools}
        if layout == "unpaired":
            text = pair.chosen if pair.rejected is None else pair.rejected
            assert text is not None and text.strip()
            again |= {"completion": text, "label": pair.rejected is None}
        else:
            assert pair.chosen and pair.rejected and "" != pair.chosen.strip() != pair.rejected.strip() != ""
            again |= {"chosen": [assistant(pair.chosen)], "rejected": [assistant(pair.rejected)]}
        assert canonical_pair(again) == pair


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
