"""The rules one by one; tests of whole rows are in test_formats.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from dpo_ray.pairs import Message, PreferencePair
from dpo_ray.quality import BadRow, Reason, check_label, check_message, check_pair, check_prompt, check_text, reject


def dialogue(*roles: str) -> list[Message]:
    return [Message(role=role, content="x") for role in roles]


@pytest.mark.parametrize(
    "roles",
    [
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
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


@pytest.mark.parametrize("role", ["human", "gpt", "User", "tool", ""])
def test_only_three_roles_are_known(role: str):
    with pytest.raises(BadRow) as caught:
        check_message({"role": role, "content": "x"})
    assert caught.value.reason == "unknown_role"


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


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (False, False), (1, True), (0, False)])
def test_a_label_is_a_bool_or_the_integer_0_or_1(label: Any, desirable: bool):
    assert check_label(label) is desirable


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (None, "null_field"),
        (2, "bad_label"),
        (-1, "bad_label"),
        (1.0, "bad_label"),
        ("true", "bad_label"),
        ("", "bad_label"),
        ([True], "bad_label"),
    ],
)
def test_any_other_label_is_rejected_and_never_taken_for_true_or_false(label: Any, reason: Reason):
    with pytest.raises(BadRow) as caught:
        check_label(label)
    assert caught.value.reason == reason


@pytest.mark.parametrize("reason", get_args(Reason))
def test_a_rejection_carries_its_reason(reason: Reason):
    with pytest.raises(BadRow) as caught:
        reject(reason)
    assert caught.value.reason == str(caught.value) == reason
