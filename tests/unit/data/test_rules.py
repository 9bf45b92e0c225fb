"""The rules one by one; tests of whole rows are in test_formats.py."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.data.rules import (
    MEANING,
    REASONS,
    BadRow,
    Reason,
    check_label,
    check_length,
    check_message,
    check_pair,
    check_prompt,
    check_scores,
    check_text,
    check_tools,
    reject,
)
from dpo_ray.pairs import Message, PreferencePair


def dialogue(*roles: str) -> list[Message]:
    return [Message(role=role, content="x") for role in roles]


@pytest.mark.parametrize(
    "roles",
    [
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
        ["user", "assistant", "tool"],
        ["user", "assistant", "tool", "tool", "assistant", "user"],
    ],
)
def test_a_dialogue_that_ends_with_the_user_is_a_prompt(roles: list[str]):
    check_prompt(dialogue(*roles))


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant"],
        ["system"],
        ["user", "assistant"],
        ["user", "user"],
        ["assistant", "user"],
        ["user", "system", "user"],
        ["system", "system", "user"],
        ["user", "tool"],
        ["tool"],
        ["user", "assistant", "tool", "user"],
    ],
)
def test_turns_out_of_order_are_no_prompt(roles: list[str]):
    with pytest.raises(BadRow) as caught:
        check_prompt(dialogue(*roles))
    assert caught.value.reason == "role_order"


@pytest.mark.parametrize("text", ["", "é", "\x00", "👩‍👩‍👧‍👦", "\u200f"])
def test_text_passes_unchanged(text: str):
    assert check_text(text) == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null_field"),
        (1, "non_string_content"),
        (True, "non_string_content"),
        ([{"type": "text", "text": "x"}], "non_string_content"),
        (b"x", "non_string_content"),
        ("\ud83d", "invalid_unicode"),
    ],
)
def test_what_is_no_text_is_rejected_and_never_turned_into_text(value: Any, reason: Reason):
    with pytest.raises(BadRow) as caught:
        check_text(value)
    assert caught.value.reason == reason


def test_unknown_keys_of_a_message_are_left_out():
    assert check_message({"role": "user", "content": "x", "name": "Ann"}) == {"role": "user", "content": "x"}


@pytest.mark.parametrize("role", ["human", "gpt", "User", "ipython", ""])
def test_only_four_roles_are_known(role: str):
    with pytest.raises(BadRow) as caught:
        check_message({"role": role, "content": "x"})
    assert caught.value.reason == "unknown_role"


def more(message: Message) -> Any:
    return json.loads(message.get("more") or "null")


@pytest.mark.parametrize("call", [{"name": "f"}, {"id": "1", "type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize(
    ("arguments", "known"), [({"a": 1}, {"a": 1}), ('{"a": 1}', {"a": 1}), ("", {}), ("[1]", "[1]"), ("f(", "f(")]
)
def test_calls_of_tools_go_with_their_message_their_arguments_as_an_object(call: Any, arguments: Any, known: Any):
    def calling(value: Any) -> Any:
        arguments = {"arguments": value}
        return {**call, "function": {**call["function"], **arguments}} if "function" in call else {**call, **arguments}

    message = check_message({"role": "assistant", "content": "Let me look.", "tool_calls": [calling(arguments)]})
    assert (message["role"], message["content"]) == ("assistant", "Let me look.")
    assert more(message) == {"tool_calls": [calling(known)]}


def test_a_message_that_calls_tools_needs_no_text_and_a_call_no_arguments():
    calls = [{"name": "f"}]
    for message in ({}, {"content": None}, {"content": ""}):
        checked = check_message({"role": "assistant", "tool_calls": calls, **message})
        assert (checked["content"], more(checked)) == ("", {"tool_calls": [{"name": "f", "arguments": {}}]})


def test_what_is_null_in_a_column_of_structs_is_left_out_of_a_message():
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "a", "tool_calls": [{"name": "g", "arguments": {"day": "May 1"}}]},
    ]
    column = pa.array([messages])
    checked = [check_message(message) for message in column.to_pylist()[0]]
    assert [more(message) for message in checked] == [
        {"tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}]},
        {"tool_call_id": "1", "name": "f"},
        {"tool_calls": [{"name": "g", "arguments": {"day": "May 1"}}]},
    ]


def test_reasoning_goes_with_the_assistants_message_alone():
    for role, known in (("assistant", {"reasoning_content": "hm"}), ("user", None)):
        assert more(check_message({"role": role, "content": "x", "reasoning_content": "hm"})) == known
    assert more(check_message({"role": "assistant", "content": "x", "reasoning_content": None})) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "x", "tool_calls": "f()"}, "tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}, "tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"name": "f", "arguments": b"x"}]}, "tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"name": "\ud800"}]}, "invalid_unicode"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "tool_calls"),
        ({"role": "assistant", "content": 7, "tool_calls": [{"name": "f"}]}, "non_string_content"),
        ({"role": "assistant", "content": "x", "reasoning_content": 7}, "non_string_content"),
        ({"role": "tool", "content": None}, "null_field"),
    ],
)
def test_what_no_template_could_write_is_a_bad_message(message: dict[str, Any], reason: Reason):
    with pytest.raises(BadRow) as caught:
        check_message(message)
    assert caught.value.reason == reason


@pytest.mark.parametrize("calls", [None, []])
def test_a_message_that_calls_no_tools_passes(calls: Any):
    message = {"role": "assistant", "content": "Yes."}
    assert check_message({**message, "tool_calls": calls}) == message


def test_after_calls_of_tools_come_their_results():
    calling = check_message({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]})
    user, result = dialogue("user", "tool")
    check_prompt([user, calling, result])
    for turns in ([user, calling, user], [user, calling, {**result, "role": "assistant"}, user]):
        with pytest.raises(BadRow, match="role_order"):
            check_prompt(turns)


def test_a_result_of_a_tool_may_be_empty():
    user, said, result = dialogue("user", "assistant", "tool")
    check_prompt([user, said, {**result, "content": ""}])
    with pytest.raises(BadRow, match="empty_prompt"):
        check_prompt([user, {**said, "content": ""}, result])


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["assistant", "user", "assistant"], None),
        (["assistant", "tool", "assistant"], None),
        (["assistant"], None),
        ([], "bad_completion"),
        (["user", "assistant"], "bad_completion"),
        (["assistant", "user"], "bad_completion"),
        (["assistant", "tool"], "bad_completion"),
        (["assistant", "assistant"], "role_order"),
        (["assistant", "system", "assistant"], "role_order"),
    ],
)
def test_an_answer_of_turns_begins_and_ends_with_the_assistant(roles: list[str], reason: Reason | None):
    pair = PreferencePair(tuple(dialogue("user")), tuple(dialogue(*roles)), "other")
    if reason is None:
        assert check_pair(pair) is pair
    else:
        with pytest.raises(BadRow, match=reason):
            check_pair(pair)


def test_an_answer_that_only_calls_a_tool_is_one_and_an_empty_turn_is_none():
    calling = check_message({"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]})
    pair = PreferencePair(tuple(dialogue("user")), (calling,), None)
    assert check_pair(pair) is pair
    with pytest.raises(BadRow, match="identical_pair"):
        check_pair(replace(pair, rejected=(dict(calling),)))
    with pytest.raises(BadRow, match="empty_response"):
        check_pair(replace(pair, rejected=(Message(role="assistant", content=" "), *dialogue("user", "assistant"))))


def test_a_good_pair_passes_unchanged():
    pair = PreferencePair(tuple(dialogue("user")), " a ", "b")
    assert check_pair(pair) is pair


@pytest.mark.parametrize("pair", [PreferencePair((), "a", None), PreferencePair((), None, "a")])
def test_an_absent_side_breaks_no_rule(pair: PreferencePair):
    whole = replace(pair, prompt=tuple(dialogue("user")))
    assert check_pair(whole) is whole


@pytest.mark.parametrize("pair", [PreferencePair((), " ", None), PreferencePair((), None, "")])
def test_a_side_alone_must_not_be_blank(pair: PreferencePair):
    with pytest.raises(BadRow) as caught:
        check_pair(replace(pair, prompt=tuple(dialogue("user"))))
    assert caught.value.reason == "empty_response"


@pytest.mark.parametrize(
    ("label", "desirable"), [(True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)]
)
def test_a_label_is_a_bool_or_0_or_1(label: Any, desirable: bool):
    assert check_label(label) is desirable


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (None, "null_field"),
        (2, "bad_label"),
        (-1, "bad_label"),
        (0.5, "bad_label"),
        (float("nan"), "bad_label"),
        ("true", "bad_label"),
        ("", "bad_label"),
        ([True], "bad_label"),
    ],
)
def test_any_other_label_is_rejected_and_never_taken_for_true_or_false(label: Any, reason: Reason):
    with pytest.raises(BadRow) as caught:
        check_label(label)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("scores", "numbers"), [([1, 2.5], [1.0, 2.5]), ([-1, 0], [-1.0, 0.0]), ([10**300, 0], [1e300, 0.0])]
)
def test_scores_are_finite_numbers(scores: Any, numbers: list[float]):
    assert check_scores(scores, 2) == numbers


@pytest.mark.parametrize(
    "scores",
    [
        [1],
        [1, 2, 3],
        [1, None],
        [1, "2"],
        [True, False],
        [1, float("nan")],
        [float("inf"), 1],
        [10**400, 1],
        "12",
        {"a": 1, "b": 2},
        1,
    ],
)
def test_what_is_not_a_finite_number_for_each_completion_is_rejected(scores: Any):
    with pytest.raises(BadRow, match="bad_scores"):
        check_scores(scores, 2)


TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"properties": {"a": {"default": None}}}}}


@pytest.mark.parametrize("tools", [None, "", " \n", [], "[]", "null"])
def test_no_tools_are_none(tools: Any):
    assert check_tools(tools) is None


@pytest.mark.parametrize("tool", [{"name": "f"}, {"type": "function", "function": {"name": "f"}}])
def test_a_tool_has_a_name_of_its_own_or_in_its_function(tool: Any):
    assert check_tools([tool]) == check_tools(json.dumps([tool])) == json.dumps([tool])


def test_tools_as_text_are_kept_as_they_are_but_for_white_space():
    text = json.dumps([TOOL], indent=4)
    assert check_tools(text) == json.dumps([TOOL], ensure_ascii=False)


def test_what_is_null_in_a_column_of_structs_is_left_out_of_the_tools():
    column = pa.array([[{"name": "f", "p": {"a": 1}}], [{"name": "g", "p": {"b": [None, 2]}}]])
    assert [check_tools(row) for row in column.to_pylist()] == [
        '[{"name": "f", "p": {"a": 1}}]',
        '[{"name": "g", "p": {"b": [null, 2]}}]',
    ]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("look_up", "bad_tools"),
        ('[{"name": "f"}', "bad_tools"),
        ('[{"name": "f", "x": NaN}]', "bad_tools"),
        ('[{"name": "f", "x": 1e999}]', "bad_tools"),
        ("[" * 100_000, "bad_tools"),
        ({"name": "f"}, "bad_tools"),
        (["f"], "bad_tools"),
        ([None], "bad_tools"),
        ([{"name": ""}], "bad_tools"),
        ([{"name": 1}], "bad_tools"),
        ([{"function": "f"}], "bad_tools"),
        ([{"name": "f"}, {"description": "no name"}], "bad_tools"),
        ([{"name": "f", "x": b"y"}], "bad_tools"),
        ([{"name": "f", "x": float("nan")}], "bad_tools"),
        (7, "bad_tools"),
        (b"[]", "bad_tools"),
        ([{"name": "\ud800"}], "invalid_unicode"),
        ('[{"name": "\\ud800"}]', "invalid_unicode"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_are_no_tools_is_rejected(tools: Any, reason: Reason):
    with pytest.raises(BadRow) as caught:
        check_tools(tools)
    assert caught.value.reason == reason


def test_characters_are_counted_over_all_the_text_of_a_row():
    row = {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": "yes",
        "label": 1,
        "more": [["a", None], {"k": b"b"}],
    }
    check_length(row, 13)
    with pytest.raises(BadRow, match="too_long"):
        check_length(row, 12)


def test_a_row_nested_beyond_recursion_is_counted_all_the_same():
    nested: Any = "abc"
    for _ in range(100_000):
        nested = [nested]
    check_length({"prompt": nested}, 3)
    with pytest.raises(BadRow, match="too_long"):
        check_length({"prompt": nested}, 2)


def test_every_reason_has_a_meaning_in_words():
    assert set(MEANING) == set(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_a_rejection_carries_its_reason(reason: Reason):
    with pytest.raises(BadRow) as caught:
        reject(reason)
    assert caught.value.reason == str(caught.value) == reason
