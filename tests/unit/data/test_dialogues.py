"""Where two dialogues part, and what is an answer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import Pairing
from dpo_ray.data.canonical import canonical_pair, canonical_pairs
from dpo_ray.data.dialogues import as_answer, num_shared, parted
from dpo_ray.data.rules import BadRow, check_message, check_pair
from dpo_ray.pairs import Message, PreferencePair

SYSTEM = Message(role="system", content="Be brief.")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
RESULT = {"role": "tool", "content": "4"}


def user(text: str) -> Message:
    return Message(role="user", content=text)


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


def test_dialogues_that_differ_at_the_end_alone_are_a_prompt_and_two_texts():
    shared = [SYSTEM, user("a"), said("b"), user("c")]
    prompt, *sides = parted([*shared, said("d")], [*shared, said("e")])
    assert (prompt, [as_answer(side) for side in sides]) == (shared, ["d", "e"])


def test_dialogues_that_part_at_an_earlier_turn_of_the_assistants_share_what_is_before_it():
    chosen = [SYSTEM, user("a"), said("b"), user("c"), said("d")]
    rejected = [SYSTEM, user("a"), said("x")]
    assert parted(chosen, rejected) == ([SYSTEM, user("a")], chosen[2:], rejected[2:])


def test_dialogues_that_part_at_the_users_words_share_the_answer_before_them_but_not_as_prompt():
    chosen, rejected = ([user("a"), said("b"), user(text), said("d")] for text in ("c", "x"))
    prompt, good, bad = parted(chosen, rejected)
    assert (prompt, good, bad) == ([user("a")], chosen[1:], rejected[1:])
    assert num_shared([as_answer(good), as_answer(bad)]) == 1


@pytest.mark.parametrize(
    ("answers", "shared"),
    [
        (["a", "b"], 0),
        (["a", (said("a"), user("b"), said("c"))], 0),
        ([(said("a"), user("b"), said("c"))], 0),
        ([(said("a"), user("b"), said("c")), (said("a"), user("b"), said("d"))], 2),
        ([(said("a"), user("b"), said("c")), (said("a"),)], 0),
        ([(said("a"), user("b"), said("c")), (said("a"), user("b"), said("c"), user("d"), said("e"))], 2),
    ],
)
def test_of_turns_that_two_answers_share_each_keeps_at_least_its_last(answers: list[Any], shared: int):
    assert num_shared(answers) == num_shared(answers[::-1]) == shared


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("a"), said("b")], [user("x"), said("c")], "diverging_prefix"),
        ([SYSTEM, user("a"), said("b")], [SYSTEM, user("x"), said("c")], "diverging_prefix"),
        ([said("b")], [said("c")], "missing_field"),
        ([user("a"), said("b"), user("c")], [user("a"), said("x")], "bad_completion"),
    ],
)
def test_dialogues_without_a_prompt_in_common_are_no_pair(chosen: list[Message], rejected: list[Message], reason: str):
    with pytest.raises(BadRow, match=reason):
        parted(chosen, rejected)


def test_one_plain_turn_of_the_assistants_is_text_and_whatever_else_turns():
    call = check_message(CALL)
    assert as_answer([said("a")]) == "a"
    assert as_answer([call]) == (call,)
    assert as_answer([said("a"), user("b"), said("c")]) == (said("a"), user("b"), said("c"))


def test_an_answer_with_calls_of_tools_stands_against_a_text():
    prompt, turns = [user("Weather?")], [CALL, RESULT, said("It is 4.")]
    rows = [
        {"prompt": prompt, "chosen": turns, "rejected": [said("No idea.")]},
        {"chosen": [*prompt, *turns], "rejected": [*prompt, said("No idea.")]},
    ]
    expected = PreferencePair(tuple(prompt), tuple(map(check_message, turns)), "No idea.")
    assert [canonical_pair(row) for row in rows] == [expected, expected]
    assert expected.pair_id == "0981eef47fa67b2b"


def test_a_single_answer_of_several_turns_is_judged_whole():
    turns = [CALL, RESULT, said("It is 4.")]
    row = {"prompt": [user("Weather?")], "completion": turns, "label": False}
    [pair] = canonical_pairs(row, "unpaired", Pairing())
    assert (pair.chosen, pair.rejected) == (None, tuple(map(check_message, turns)))


def test_ranked_answers_are_texts():
    row = {"prompt": "Weather?", "completions": ["a", [CALL, RESULT, said("b")]], "scores": [1, 2]}
    with pytest.raises(BadRow, match="bad_completion"):
        canonical_pairs(row, "ranked", Pairing())


TURN = st.sampled_from([SYSTEM, user("a"), user("b"), said("a"), said("b"), check_message(CALL), check_message(RESULT)])
DIALOGUE = st.lists(TURN, max_size=6)


@given(shared=DIALOGUE, ends=st.tuples(DIALOGUE, DIALOGUE))
def test_however_two_dialogues_part_they_are_their_prompt_and_their_turns(shared: list[Message], ends: Any):
    chosen, rejected = ([*shared, *end] for end in ends)
    try:
        prompt, good, bad = parted(chosen, rejected)
    except BadRow:
        return
    assert ([*prompt, *good], [*prompt, *bad]) == (chosen, rejected)
    try:
        pair = check_pair(PreferencePair(tuple(prompt), as_answer(good), as_answer(bad)))
    except BadRow:
        return
    swapped = parted(rejected, chosen)
    assert swapped == (prompt, bad, good)
    assert PreferencePair(pair.prompt, pair.rejected, pair.chosen).couple_id == pair.couple_id
    for dialogue in (chosen, rejected):
        roles = [message["role"] for message in dialogue]
        assert roles[-1] == "assistant" and ("user", "user") not in pairwise(roles)
