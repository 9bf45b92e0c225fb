"""A judge's questions, replies and scores; the model is one that replies by a rule of the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import Endpoint, Judge
from dpo_ray.errors import ConfigError
from dpo_ray.pairs import Message
from dpo_ray.scoring.judge import JudgeScorer, rating, require_template, template_of, verdict

Asked = list[tuple[str, str]]


class Replies:
    """Replies to each question by a function of what it shows, and of how often it was asked before."""

    def __init__(self, reply: Callable[..., str]):
        self.reply = reply
        self.dialogues: list[list[Message]] = []
        self.schemas: list[dict[str, Any] | None] = []

    def replies(self, dialogues: Sequence[list[Message]], schema: dict[str, Any] | None) -> list[str]:
        self.dialogues += dialogues
        self.schemas.append(schema)
        return [self.reply(*_shown(d[0]["content"]), *([len(d) // 2] if len(d) > 1 else [])) for d in dialogues]


def _shown(question: str) -> list[str]:
    return question.splitlines()


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "pairwise.txt").write_text("{{ answer_a }}\n{{ answer_b }}\n{{ conversation }} {{ criteria }}")
    (tmp_path / "pointwise.txt").write_text("{{ answer }}\n{{ conversation }} {{ criteria }}")
    return str(tmp_path)


def judge(folder: str, compare: str = "pairwise", **options: Any) -> Judge:
    endpoint = Endpoint(base_url="http://localhost:1/v1", model="j")
    return Judge(endpoint=endpoint, compare=compare, template=f"{folder}/{compare}.txt", **options)  # type: ignore[arg-type]


def row(*texts: str) -> dict[str, Any]:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    return {"prompt_id": "0", "prompt": prompt, "completions": [{"text": text} for text in texts]}


def scored(judge: Judge, replies: Replies, *rows: Any, across: int | None = None) -> list[list[Any]]:
    return JudgeScorer(judge, template_of(judge), replies, across).score(rows)


def longer(a: str, b: str, *_: Any) -> str:
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_a_score_is_the_share_of_comparisons_won(template: str):
    replies = Replies(longer)
    [found] = scored(judge(template), replies, row("aa", "b", "cccc", "dd"))
    # cccc wins all three; aa and dd each win one of three and tie one; b wins none.
    assert [one.score for one in found] == pytest.approx([0.5, 0.0, 1.0, 0.5])
    assert [one.noted for one in found] == [("judged",) * 3, ("judged",) * 2, ("judged",), ()]  # a couple once
    questions = [dialogue[0]["content"].splitlines() for dialogue in replies.dialogues]
    assert len(questions) == 12  # six couples, both orders
    assert {tuple(q[:2]) for q in questions} == {tuple(q[1::-1]) for q in questions}
    assert questions[0][2:] == [
        "system: Be brief.", "", "user: Why? how helpful, correct and harmless the answer is",
    ]  # fmt: skip


def test_a_judge_that_always_prefers_the_first_place_makes_ties(template: str):
    [found] = scored(judge(template), Replies(lambda *_: "A"), row("a", "b", "c"))
    assert [one.score for one in found] == [0.5] * 3
    assert sum(one.noted.count("orders_disagree") for one in found) == 3


@given(st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), st.sampled_from(["A", "B", "tie"])))
def test_swapping_the_order_of_the_answers_flips_the_verdict(said: dict[tuple[str, str], str]):
    one = Judge(model="m")

    def reply(dialogues: Sequence[list[Message]], schema: Any) -> list[str]:
        texts = [d[0]["content"] for d in dialogues]
        shown = [(t.split("<answer_a>\n")[1][0], t.split("<answer_b>\n")[1][0]) for t in texts]
        return [said.get(both, "tie") for both in shown]

    chat = type("Chat", (), {"replies": staticmethod(reply)})()
    scorer = JudgeScorer(one, template_of(one), chat)
    [forth], [back] = scorer.score([row("a", "b", "c")]), scorer.score([row("c", "b", "a")])
    assert [x.score for x in forth] == [x.score for x in reversed(back)]
    [(a, b)] = scorer.score([row("a", "b")])
    assert a.score + b.score == 1


def test_only_answers_of_different_models_are_compared_where_there_are_two(template: str):
    replies = Replies(longer)
    [found] = scored(judge(template), replies, row("aa", "bbb", "c", "ddd"), across=2)
    # aa beats c and loses to ddd; bbb beats c and ties ddd.
    assert [one.score for one in found] == [0.5, 0.75, 0.0, 0.75]
    assert len(replies.dialogues) == 8


def test_the_same_text_is_a_tie_that_nobody_is_asked_about(template: str):
    replies = Replies(longer)
    [found] = scored(judge(template), replies, row("a", "a"))
    assert ([one.score for one in found], replies.dialogues) == ([0.5, 0.5], [])
    assert found[0].noted == ("same_text",)


def test_one_answer_alone_is_compared_with_none(template: str):
    assert [one.score for one in scored(judge(template), Replies(longer), row("a"))[0]] == [0.5]
    assert scored(judge(template), Replies(longer), row()) == [[]]


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_counted(template: str):
    def reply(a: str, b: str, *rest: Any) -> str:
        tries = rest[-1] if isinstance(rest[-1], int) else 0
        return longer(a, b) if "never" not in a + b and tries else "Well, it depends."

    replies = Replies(reply)
    [[a, b], [c, _]] = scored(judge(template, attempts=2), replies, row("aa", "b"), row("never", "b"))
    assert (a.score, b.score, a.noted) == (1.0, 0.0, ("judged",))
    assert (c.score, c.noted) == (0.5, ("judged", "judge_unparseable"))
    assert len(replies.dialogues) == 8  # two questions of each row, twice
    again = replies.dialogues[4]
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == "Well, it depends." and "JSON object alone" in again[2]["content"]


def test_answers_are_rated_one_by_one(template: str):
    def rate(answer: str, *_: Any) -> str:
        return {"good": '{"reason": "r", "score": 9}', "bad": "2", "odd": '{"score": 11}'}[answer]

    replies = Replies(rate)
    [found] = scored(judge(template, "pointwise", structured=False), replies, row("good", "bad", "odd"))
    assert [(one.score, one.noted) for one in found] == [
        (9.0, ("judged",)),
        (2.0, ("judged",)),
        (5.5, ("judged", "judge_unparseable")),
    ]
    assert set(map(str, replies.schemas)) == {"None"}


def test_replies_are_held_to_a_schema_unless_that_is_turned_off(template: str):
    replies = Replies(longer)
    scored(judge(template), replies, row("a", "bb"))
    assert replies.schemas[0]["properties"]["verdict"] == {"enum": ["A", "B", "tie"]}  # type: ignore[index]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"reason": "A is short", "verdict": "B"}', "B"),
        ('I think:\n```json\n{"verdict": "A"}\n```', "A"),
        ('{"verdict": "A"} or rather {"verdict": "tie"}', "tie"),
        ('{"reason": "{", "verdict": "B"}', "B"),
        ("B", "B"),
        (" **A**. ", "A"),
        ("Answer B", "B"),
        ("Tie", "tie"),
        ('{"verdict": "C"}', None),
        ('{"verdict": 1}', None),
        ('{"verdict": "A"', None),
        ("A is better than B", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_a_reply(reply: str, expected: str | None):
    assert verdict(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"reason": "r", "score": 7}', 7.0),
        ('{"score": 7.5} is what I give', 7.5),
        ("8", 8.0),
        (" 8 / 10 ", 8.0),
        ('{"score": 0}', None),
        ('{"score": true}', None),
        ('{"score": "7"}', None),
        ("7 of 9 points", None),
        ("", None),
    ],
)
def test_a_rating_is_read_from_a_reply(reply: str, expected: float | None):
    assert rating(reply) == expected


def test_the_questions_that_come_with_the_project_show_what_is_judged():
    for compare in ("pairwise", "pointwise"):
        require_template(Judge(model="m", compare=compare))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{{ answer_a }} {{ conversation }}", r"does not show \{\{ answer_b \}\}"),
        ("{{ answer_a }} {{ answer_b }}", r"does not show \{\{ conversation \}\}"),
        ("{{ answer_a }} {{ answer_b }} {{ conversation }} {{ other }}", "cannot be used: 'other' is undefined"),
        ("{{ answer_a ", "cannot be used"),
        ("{{ answer_a.__class__.__mro__ }}", "cannot be used"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(tmp_path: Path, text: str | None, said: str):
    if text is not None:
        (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(ConfigError, match=said):
        require_template(Judge(model="m", template=str(tmp_path / "mine.txt")))
