"""The library of rules."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dpo_ray import rewards
from dpo_ray.errors import ConfigError
from dpo_ray.rewards import brief_answer, likely, split_sentences, topic_overlap

QUESTION = "Why do cats purr when they are petted?"
GOOD = "Cats purr when petted because they feel content and safe."


def test_a_complete_brief_answer_on_the_topic_is_the_best_there_is():
    assert brief_answer(QUESTION, GOOD, True) == 1.0


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((GOOD, True), (GOOD, False)),
        ((GOOD, True), (GOOD.rstrip("."), True)),
        ((GOOD.rstrip("."), True), ("Cats purr when petted because they feel content and", False)),
        ((GOOD, True), (f"{GOOD} They also purr in pain. Kittens purr too. Some cats never purr.", True)),
        ((GOOD, True), ("Cats purr. Cats purr. Cats purr when petted. Cats purr.", True)),
        ((GOOD, True), ("The capital of France is Paris, a large city.", True)),
        ((GOOD, True), ("Yes.", True)),
        ((GOOD, True), ("", True)),
        (("The capital of France is Paris, a large city.", True), ("word word word word word word word word.", True)),
        ((f"{GOOD} They like it.", True), (" ".join([GOOD.rstrip(".") + ","] * 7) + " they do.", True)),
    ],
    ids=[
        "unfinished",
        "no full stop",
        "both",
        "too many sentences",
        "repetition",
        "off topic",
        "too short",
        "empty",
        "off topic and repetition",
        "one endless sentence",
    ],
)
def test_a_person_would_order_them_so(better: tuple[str, bool], worse: tuple[str, bool]):
    assert brief_answer(QUESTION, *better) > brief_answer(QUESTION, *worse)


def test_a_second_sentence_costs_nothing():
    assert brief_answer(QUESTION, f"{GOOD} They like it.", True) == 1.0


def test_four_sentences_halve_the_score():
    # 4 sentences, 2/4; everything else at its best: complete, 15 distinct words, on topic.
    text = f"{GOOD} Kittens do it early. Lions roar instead. Nobody knows it all."
    assert brief_answer(QUESTION, text, True) == pytest.approx(0.5, abs=1e-12)


def test_words_over_sixty_cost_in_proportion():
    # 80 distinct words in one sentence: 60/80.
    text = "cats purr petted " + " ".join(f"word{i}" for i in range(77)) + "."
    assert brief_answer(QUESTION, text, True) == pytest.approx(0.75, abs=1e-12)


def test_repeated_three_word_sequences_cost_their_share():
    # a b c a b c d e: sequences abc bca cab abc bcd cde, 5 of 6 fresh; the prompt asks for no content word.
    text = "alpha beta gamma alpha beta gamma delta kappa."
    assert brief_answer("Why?", text, True) == pytest.approx(5 / 6, abs=1e-12)


def test_an_unfinished_answer_without_full_stop_scores_nothing():
    assert brief_answer(QUESTION, GOOD.rstrip("."), False) == 0.0


def test_an_answer_off_the_topic_keeps_four_tenths():
    assert brief_answer(QUESTION, "Paris lies on a wide river in France.", True) == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "words"), [("Cats purr when petted.", 4), ("Petted cats purr.", 3), ("Cats purr.", 0)]
)
def test_an_answer_of_a_few_words_is_worth_its_share_of_eight(text: str, words: int):
    assert brief_answer(QUESTION, text, True) == pytest.approx(words / 8, abs=1e-12)


@pytest.mark.parametrize("ending", [".", "!", "?", '."', ".)", "!”"])
def test_a_sentence_may_end_inside_quotes_or_brackets(ending: str):
    assert brief_answer(QUESTION, GOOD.rstrip(".") + ending, True) == 1.0


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("One sentence.", ["One sentence."]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It costs 3.5 dollars. Buy it.", ["It costs 3.5 dollars.", "Buy it."]),
        ("Dr. Smith met Mrs. Jones.", ["Dr. Smith met Mrs. Jones."]),
        ("Use nuts, e.g. almonds. They help.", ["Use nuts, e.g. almonds.", "They help."]),
        ("The U.S. economy grew.", ["The U.S. economy grew."]),
        ("J. R. R. Tolkien wrote it.", ["J. R. R. Tolkien wrote it."]),
        ("First line\nSecond line", ["First line", "Second line"]),
        ("- Eggs\n- Milk\n\n- Bread", ["- Eggs", "- Milk", "- Bread"]),
        ("1. Eat well.\n2. Sleep.", ["1. Eat well.", "2. Sleep."]),
        ("No. It does not. Never.", ["No.", "It does not.", "Never."]),
        ("Visit example.com today.", ["Visit example.com today."]),
    ],
)
def test_text_is_split_where_its_sentences_end(text: str, sentences: list[str]):
    assert split_sentences(text) == sentences


def test_a_long_answer_does_not_pass_for_a_brief_one_by_its_line_breaks():
    items = "\n".join(f"- tip {i} for cats that purr when petted" for i in range(8))
    assert brief_answer(QUESTION, items + ".", True) < 0.3


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        # Content words of the question: cats, purr, petted.
        ("Cats purr if petted.", 1.0),
        ("A cat purrs.", 2 / 3),
        ("CATS", 1 / 3),
        ("Dogs bark.", 0.0),
        ("", 0.0),
    ],
)
def test_the_topic_is_the_share_of_the_content_words_that_come_back(completion: str, share: float):
    assert topic_overlap(QUESTION, completion) == pytest.approx(share, abs=1e-12)


def test_a_prompt_without_content_words_asks_for_no_topic():
    assert topic_overlap("Why is it so?", "Anything.") == 1.0


def given(rule: str, completion: str, **arguments: Any) -> float:
    """What a rule gives to a finished completion."""
    value: float = getattr(rewards, rule)("What is it?", completion, True, **arguments)
    return value


@pytest.mark.parametrize(
    ("completion", "arguments", "expected"),
    [
        ("one two three", {"at_least": 3, "at_most": 3}, 1.0),
        ("one two", {"at_least": 4}, 0.5),
        ("", {"at_least": 4}, 0.0),
        ("", {}, 1.0),
        ("one two three four", {"at_most": 1}, 0.25),
        (" abcd ", {"at_most": 4, "unit": "characters"}, 1.0),
        ("One. Two. Three.", {"at_most": 2, "unit": "sentences"}, 2 / 3),
    ],
)
def test_a_length_outside_of_the_window_counts_in_proportion(completion: str, arguments: Any, expected: float):
    assert given("length_window", completion, **arguments) == pytest.approx(expected)


def test_a_unit_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="unit='tokens' is not known"):
        given("length_window", "a", unit="tokens")


@pytest.mark.parametrize(
    ("completion", "n", "expected"),
    # a b c a b c: the two-word sequences are ab bc ca ab bc, of which 3 of 5 are no repeats.
    [("a b c a b c", 2, 0.6), ("a b c", 3, 1.0), ("a b", 3, 1.0), ("a a a a", 1, 0.25)],
)
def test_repeats_cost_their_share(completion: str, n: int, expected: float):
    assert given("fresh", completion, n=n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "arguments", "expected"),
    [
        (' {"a": 1} ', {}, 1.0),
        ("[1, 2]", {}, 1.0),
        ('{"a": 1} and more', {}, 0.0),
        ('{"a": 1}', {"keys": ["a"]}, 1.0),
        ('{"a": 1}', {"keys": ["a", "b"]}, 0.0),
        ('["a"]', {"keys": ["a"]}, 0.0),
        ('```json\n{"a": 1}\n```', {}, 0.0),
        ('```json\n{"a": 1}\n```', {"fenced": True}, 1.0),
        ("", {}, 0.0),
    ],
)
def test_json_is_one_value_and_nothing_else(completion: str, arguments: Any, expected: float):
    assert given("is_json", completion, **arguments) == expected


def test_a_pattern_is_found_or_is_the_whole():
    assert given("matches", "It is 42.", pattern=r"\d+") == 1.0
    assert given("matches", "It is 42.", pattern=r"\d+", whole=True) == 0.0
    assert given("matches", " 42\n", pattern=r"\d+", whole=True) == 1.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("As an AI, I cannot.", 0.0), ("I CANNOT say", 0.0), ("A cannot-do: no", 0.0), ("Cannotation is fine.", 1.0)],
)
def test_forbidden_words_are_found_as_words(completion: str, expected: float):
    assert given("without_words", completion, words=["cannot", "as an ai"]) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "arguments", "expected"),
    [
        (" Paris. ", "paris", {}, 1.0),
        ("It is Paris", "Paris", {}, 0.0),
        ("First A, then Answer: B", "B", {"pattern": r"\b[A-D]\b"}, 1.0),
        ("Answer: B, not C", "B", {"pattern": r"Answer: (\w)"}, 1.0),
        ("No idea", "B", {"pattern": r"Answer: (\w)"}, 0.0),
    ],
)
def test_an_exact_answer(completion: str, answer: str, arguments: Any, expected: float):
    assert given("exact_answer", completion, answer=answer, **arguments) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "arguments", "expected"),
    [
        ("3 and 4 make 7.", "so it is #### 7", {}, 1.0),
        ("7 is 3 and 4", "7", {}, 0.0),
        ("It costs $1,234.50.", "1234.5", {}, 1.0),
        ("about 3.14", "3.14159", {"tolerance": 0.01}, 1.0),
        ("-2", "2", {}, 0.0),
        ("none", "2", {}, 0.0),
    ],
)
def test_a_numeric_answer_is_the_last_number(completion: str, answer: str, arguments: Any, expected: float):
    assert given("numeric_answer", completion, answer=answer, **arguments) == expected


@pytest.mark.parametrize("rule", ["exact_answer", "numeric_answer"])
def test_a_prompt_without_an_answer_is_told(rule: str):
    with pytest.raises(ConfigError, match=r"'What is it\?' has no answer"):
        given(rule, "7", answer=None)
    if rule == "numeric_answer":
        with pytest.raises(ConfigError, match="no number in the answer 'seven'"):
            given(rule, "7", answer="seven")


def test_the_language_of_a_text():
    pytest.importorskip("py3langid", reason="dpo-ray[language] is not installed")
    german = "Die Katze liegt auf dem Dach und schläft in der warmen Sonne."
    assert given("in_language", german, language="de") > 0.9
    assert given("in_language", german, language="en") < 0.1
    with pytest.raises(ConfigError, match="language='xx' is not known"):
        given("in_language", german, language="xx")


def test_likely_is_the_mean_probability_of_a_token():
    assert likely("p", "Two tokens", True, num_tokens=2, logprob=math.log(0.5 * 0.125)) == pytest.approx(0.25)
    assert likely("p", "", True, num_tokens=0, logprob=0.0) == 0.0
    with pytest.raises(ConfigError, match=r"likely: the completion 'It is\.' has no log-prob"):
        likely("p", "It is.", True, num_tokens=3, logprob=None)
