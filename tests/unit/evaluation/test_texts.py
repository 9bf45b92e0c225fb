"""What can be told of answers without a judge."""

from __future__ import annotations

import pytest

from dpo_ray.evaluation.texts import distinct, is_refusal, repetition


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("  I cannot do that.", True),
        ("I’m unable to say.", True),
        ("As an AI language model, I have no body.", True),
        ("Unfortunately, I do not know.", True),
        ("Sorry for the delay: it is Paris.", True),
        ("I can do that.", False),
        ("It is sorry work, but I cannot complain.", False),
        ("As an aid, use a rope.", False),
        ("", False),
    ],
)
def test_a_refusal_is_told_by_how_it_opens(text: str, refuses: bool):
    assert is_refusal(text) == refuses


def test_repetition_is_the_share_of_sequences_that_stood_before():
    # a b c a b c d: abc bca cab abc bcd, of which one of five stood before.
    assert repetition("a b c A b c d") == pytest.approx(0.2)
    assert repetition("a b") == 0.0
    assert repetition("ha " * 10) == pytest.approx(7 / 8)


def test_distinct_counts_over_all_texts():
    # 1: a b a c, 3 of 4. 2: "a b" and "a c", 2 of 2.
    assert distinct(["a b", "a c"], 1) == pytest.approx(0.75)
    assert distinct(["a b", "a c"], 2) == 1.0
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct(["", "a"], 2) == 0.0
