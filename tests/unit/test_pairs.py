"""Content ids, the split, and rows of tokens."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dpo_ray.pairs import (
    MISMATCHED,
    PAIRS,
    REFERENCE,
    TOKENIZED,
    Message,
    PreferencePair,
    TokenizedPair,
    answer_of,
    bearing_loss,
    pair_row,
    plain,
    prompt_id,
    split_of,
    steers,
    tokenized_pair,
)

PROMPT = (Message(role="user", content="Why is the sky blue?"),)
PAIR = PreferencePair(PROMPT, "Scattering.", "Paint.")


def test_the_pair_id_is_sixteen_hex_digits_of_content():
    assert len(PAIR.pair_id) == 16 and int(PAIR.pair_id, 16) >= 0
    assert PreferencePair(PROMPT, "Scattering.", "Paint.").pair_id == PAIR.pair_id


def test_ids_stay_what_they_are():
    # Recorded: artifacts on disk are joined by these.
    assert (PAIR.pair_id, PAIR.prompt_id) == ("8747ae78b308690d", "1605842c984444a6")
    assert PreferencePair(PROMPT, None, "Paint.").pair_id == "4965825210c6b674"


def test_tools_are_part_of_the_prompt_and_of_the_pair():
    tools = [PreferencePair(PROMPT, "Scattering.", "Paint.", text) for text in (None, '[{"name": "f"}]', "[]")]
    assert len({pair.pair_id for pair in tools}) == len({pair.prompt_id for pair in tools}) == 3
    assert tools[1].prompt_id == prompt_id(list(PROMPT), '[{"name": "f"}]') != prompt_id(list(PROMPT))


def test_what_a_message_lacks_does_not_matter_wherever_it_was_read():
    stored: Message = {**PROMPT[0], "more": None}
    assert PreferencePair((stored,), PAIR.chosen, PAIR.rejected).pair_id == PAIR.pair_id
    assert prompt_id([stored]) == PAIR.prompt_id
    turns = (
        Message(role="assistant", content="a"),
        Message(role="user", content="b"),
        Message(role="assistant", content="c"),
    )
    answered = PreferencePair(PROMPT, turns, "Paint.")
    again = PreferencePair((stored,), tuple({"more": None, **turn} for turn in turns), "Paint.")
    assert (again.pair_id, again.couple_id) == (answered.pair_id, answered.couple_id)
    assert PreferencePair(PROMPT, "Paint.", turns).couple_id == answered.couple_id != PAIR.couple_id


def test_what_a_message_holds_beside_its_text_makes_another_pair():
    calling: Message = {**PROMPT[0], "more": '{"reasoning_content": "hm"}'}
    assert PreferencePair((calling,), PAIR.chosen, PAIR.rejected).pair_id != PAIR.pair_id


def test_an_answer_stands_in_one_of_two_columns():
    turns = [
        Message(role="assistant", content="a"),
        Message(role="user", content="b"),
        Message(role="assistant", content="c"),
    ]
    for chosen, rejected in ((tuple(turns), "Paint."), ("Paint.", None), (None, tuple(turns))):
        row = pair_row(PreferencePair(PROMPT, chosen, rejected), "train")
        [read] = pa.Table.from_pylist([row], schema=PAIRS).to_pylist()
        assert plain(answer_of(read, "chosen")) == plain(chosen)
        assert plain(answer_of(read, "rejected")) == plain(rejected)


def test_a_mask_picks_what_bears_the_loss():
    assert bearing_loss([1, 2, 3], None) == [1, 2, 3] and bearing_loss([1, 2, 3], [True, False, True]) == [1, 3]
    with pytest.raises(ValueError, match="a mask of 1 is no mask of 3 tokens"):
        bearing_loss([1, 2, 3], [True])


def test_the_order_of_keys_in_a_message_does_not_matter():
    reordered: Message = {"content": PROMPT[0]["content"], "role": "user"}
    assert PreferencePair((reordered,), PAIR.chosen, PAIR.rejected).pair_id == PAIR.pair_id


@pytest.mark.parametrize(
    "other",
    [
        PreferencePair(PROMPT, PAIR.rejected, PAIR.chosen),
        PreferencePair(PROMPT, "Scattering. ", "Paint."),
        PreferencePair((Message(role="system", content="s"), *PROMPT), "Scattering.", "Paint."),
        # The same characters in all, cut elsewhere.
        PreferencePair(PROMPT, "Scattering.P", "aint."),
        PreferencePair(PROMPT, "Scattering.", None),
        PreferencePair(PROMPT, None, "Paint."),
    ],
)
def test_another_pair_has_another_id(other: PreferencePair):
    assert other.pair_id != PAIR.pair_id


def test_the_same_answer_judged_otherwise_is_another_row():
    assert PreferencePair(PROMPT, "Paint.", None).pair_id != PreferencePair(PROMPT, None, "Paint.").pair_id


def test_a_couple_is_its_prompt_and_its_answers_in_either_order():
    assert len(PAIR.couple_id) == 16
    assert PreferencePair(PROMPT, PAIR.rejected, PAIR.chosen).couple_id == PAIR.couple_id
    assert PreferencePair(PROMPT, "a", None).couple_id == PreferencePair(PROMPT, None, "a").couple_id


@pytest.mark.parametrize(
    "other",
    [
        PreferencePair(PROMPT, "Scattering.", "Paint"),
        PreferencePair(PROMPT, "Scattering.", None),
        PreferencePair((Message(role="system", content="s"), *PROMPT), "Scattering.", "Paint."),
    ],
)
def test_other_answers_or_another_prompt_are_another_couple(other: PreferencePair):
    assert other.couple_id != PAIR.couple_id


def test_pairs_of_one_prompt_share_its_id():
    assert PreferencePair(PROMPT, "a", "b").prompt_id == PAIR.prompt_id != PAIR.pair_id


def test_the_split_is_by_the_prompt_alone_and_about_the_fraction_asked_for():
    sides = [split_of(str(i), 0.1, seed=0) for i in range(2000)]
    assert sides == [split_of(str(i), 0.1, seed=0) for i in range(2000)]
    # 2000 draws at .1: 200 expected, standard deviation sqrt(2000 * .1 * .9) = 13.4; four of them are 54.
    assert abs(sides.count("eval") - 200) < 54


def test_another_seed_holds_out_other_prompts():
    assert [split_of(str(i), 0.5, 0) for i in range(64)] != [split_of(str(i), 0.5, 1) for i in range(64)]


def test_a_larger_fraction_only_adds_to_the_held_out_prompts():
    few = {i for i in range(500) if split_of(str(i), 0.1, 0) == "eval"}
    more = {i for i in range(500) if split_of(str(i), 0.3, 0) == "eval"}
    assert few < more


def test_about_the_part_asked_for_steers_and_it_is_alike_on_both_sides_of_the_split():
    held_out = [str(i) for i in range(20000) if split_of(str(i), 0.1, 0) == "eval"]
    part = [i for i in held_out if steers(i, 0.5)]
    # Some 2000 draws at .5 have a standard deviation of 22; four of them are 90.
    assert abs(len(part) - len(held_out) / 2) < 90
    assert all(steers(i, 0.7) for i in part)  # a larger part only adds
    assert all(steers(i, 1.0) for i in held_out)


def test_nothing_is_held_out_at_fraction_zero():
    assert {split_of(str(i), 0.0, 0) for i in range(500)} == {"train"}


def test_the_prompt_of_a_tokenized_pair_counts_once():
    assert TokenizedPair("p", [1, 2, 3], [4, 5], [6]).num_tokens == 3 + 2 + 1


def test_a_row_without_reference_has_none_and_a_row_with_it_has_its_values():
    row = {"pair_id": "p", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert tokenized_pair(row).chosen_ref_logprobs is None
    scored = tokenized_pair({**row, "chosen_ref_logprobs": [-0.5], "rejected_ref_logprobs": [-1.5]})
    assert (scored.chosen_ref_logprobs, scored.rejected_ref_logprobs) == ([-0.5], [-1.5])
    assert (scored.mismatched_ids, scored.mismatched_ref_logprobs) == (None, None)


def test_a_row_with_a_mismatched_completion_has_it():
    row = {"pair_id": "p", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}
    pair = tokenized_pair({**row, "mismatched_ids": [4, 5], "mismatched_ref_logprobs": [-0.5, -1.5]})
    assert (pair.mismatched_ids, pair.mismatched_ref_logprobs) == ([4, 5], [-0.5, -1.5])


def test_the_reference_rows_are_the_tokenized_rows_and_two_columns():
    assert REFERENCE.names == [*TOKENIZED.names, "chosen_ref_logprobs", "rejected_ref_logprobs"]
    assert MISMATCHED.names == [*REFERENCE.names, "mismatched_ids", "mismatched_mask", "mismatched_ref_logprobs"]
