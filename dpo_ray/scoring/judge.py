"""A language model as a judge: its questions, its replies as verdicts, and scores from both orders of every comparison.

That judges favour a place, mostly the first, is known since arXiv:2306.05685, which also proposes to ask in both orders
and to take a disagreement for a tie.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple, Protocol, TypeVar

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from dpo_ray.config import Judge
from dpo_ray.errors import ConfigError
from dpo_ray.pairs import Message
from dpo_ray.scoring.scorer import Row, Scored
from dpo_ray.storage.location import Location

_MIDDLE = 5.5
_SCALE = (1, 10)
_AGAIN = "That cannot be read. Reply with the JSON object alone, as it was asked for."
_SCHEMAS: dict[str, dict[str, Any]] = {
    "pairwise": {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "verdict": {"enum": ["A", "B", "tie"]}},
        "required": ["reason", "verdict"],
        "additionalProperties": False,
    },
    "pointwise": {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "score": {"type": "integer", "minimum": 1, "maximum": 10}},
        "required": ["reason", "score"],
        "additionalProperties": False,
    },
}

Reply = TypeVar("Reply")


class Chat(Protocol):
    """A language model that replies."""

    def replies(self, dialogues: Sequence[list[Message]], schema: dict[str, Any] | None) -> list[str]:
        """One for each dialogue. schema: of JSON, to which they are held."""
        ...


def template_of(judge: Judge) -> str:
    """The text of the judge's questions. Raises ConfigError where there is none."""
    if judge.template is None:
        return (files("dpo_ray.scoring") / "templates" / f"{judge.compare}.txt").read_text(encoding="utf-8")
    try:
        return Location.of(judge.template).read_bytes().decode()
    except (FileNotFoundError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The judge's template {judge.template} cannot be read ({error}). Name a file in UTF-8 that every node "
            "sees, or leave `template` out for the one of dpo-ray."
        ) from error


def require_template(judge: Judge) -> None:
    """Raises ConfigError where the template cannot be read, is not Jinja's, or leaves out what is to be judged."""
    names = ("answer_a", "answer_b") if judge.compare == "pairwise" else ("answer",)
    marks = {name: f"⟨{name}⟩" for name in (*names, "conversation")}
    rendered = _Question(judge, template_of(judge))(**marks)
    for name, mark in marks.items():
        if mark not in rendered:
            raise ConfigError(
                f"The judge's template {judge.template} does not show {{{{ {name} }}}}, so that the judge would not "
                "see what it judges: write it where it belongs."
            )


class _Question:
    def __init__(self, judge: Judge, template: str):
        self._judge = judge
        try:
            self._template = SandboxedEnvironment(undefined=StrictUndefined).from_string(template)
        except TemplateError as error:
            raise self._wrong(error) from error

    def __call__(self, **values: str) -> str:
        try:
            return self._template.render(criteria=self._judge.criteria, **values).strip()
        except TemplateError as error:
            raise self._wrong(error) from error

    def _wrong(self, error: TemplateError) -> ConfigError:
        return ConfigError(f"The judge's template {self._judge.template} cannot be used: {error}.")


class _Comparison(NamedTuple):
    row: int
    first: int
    second: int


class JudgeScorer:
    """Scores by what a judge says.

    Args:
        across: a row has the answers of two models, so many of the first one at its beginning, and only answers of
            different models are compared. None: every two.
    """

    def __init__(self, judge: Judge, template: str, chat: Chat, across: int | None = None):
        self._judge = judge
        self._question = _Question(judge, template)
        self._chat = chat
        self._across = across

    def score(self, rows: Sequence[Row]) -> list[list[Scored]]:
        return self._pairwise(rows) if self._judge.compare == "pairwise" else self._pointwise(rows)

    def _pairwise(self, rows: Sequence[Row]) -> list[list[Scored]]:
        comparisons = [
            _Comparison(r, a, b) for r, row in enumerate(rows) for a, b in self._couples(len(row["completions"]))
        ]
        texts = [[completion["text"] for completion in row["completions"]] for row in rows]
        # The same text twice is a tie without being asked about.
        asked = [c for c in comparisons if texts[c.row][c.first] != texts[c.row][c.second]]
        conversations = [_conversation(row["prompt"]) for row in rows]
        questions = [
            self._question(conversation=conversations[row], answer_a=texts[row][a], answer_b=texts[row][b])
            for row, first, second in asked
            for a, b in ((first, second), (second, first))
        ]
        verdicts = self._ask(questions, verdict)
        results: dict[_Comparison, tuple[float, tuple[str, ...]]] = {}
        for comparison, one, other in zip(asked, verdicts[::2], verdicts[1::2], strict=True):
            results[comparison] = _both_orders(one, other)
        wins: list[list[list[float]]] = [[[] for _ in row["completions"]] for row in rows]
        noted: list[list[list[str]]] = [[[] for _ in row["completions"]] for row in rows]
        for comparison in comparisons:
            value, notes = results.get(comparison, (0.5, ("same_text",)))
            row, first, second = comparison
            wins[row][first].append(value)
            wins[row][second].append(1 - value)
            noted[row][first] += notes  # once for the two
        return [
            [
                Scored(math.fsum(of_one) / len(of_one) if of_one else 0.5, {}, tuple(notes))
                for of_one, notes in zip(of_row, notes_of_row, strict=True)
            ]
            for of_row, notes_of_row in zip(wins, noted, strict=True)
        ]

    def _couples(self, count: int) -> Iterable[tuple[int, int]]:
        if self._across is None:
            return itertools.combinations(range(count), 2)
        return itertools.product(range(self._across), range(self._across, count))

    def _pointwise(self, rows: Sequence[Row]) -> list[list[Scored]]:
        questions = [
            self._question(conversation=_conversation(row["prompt"]), answer=completion["text"])
            for row in rows
            for completion in row["completions"]
        ]
        scored = iter(
            Scored(_MIDDLE, {}, ("judged", "judge_unparseable"))
            if found is None
            else Scored(float(found), {}, ("judged",))
            for found in self._ask(questions, rating)
        )
        return [[next(scored) for _ in row["completions"]] for row in rows]

    def _ask(self, questions: Sequence[str], parse: Callable[[str], Reply | None]) -> list[Reply | None]:
        """What the replies say; None where none of the attempts can be read."""
        schema = _SCHEMAS[self._judge.compare] if self._judge.structured else None
        found: list[Reply | None] = [None] * len(questions)
        dialogues = [[Message(role="user", content=question)] for question in questions]
        todo = list(range(len(questions)))
        for _ in range(self._judge.attempts):
            if not todo:
                break
            replies = self._chat.replies([dialogues[i] for i in todo], schema)
            for i, reply in zip(todo, replies, strict=True):
                found[i] = parse(reply)
                # Not as before: a judge at temperature 0 would say the same again.
                dialogues[i] = [
                    dialogues[i][0],
                    Message(role="assistant", content=reply.strip() or "…"),
                    Message(role="user", content=_AGAIN),
                ]
            todo = [i for i in todo if found[i] is None]
        return found


def _both_orders(one: str | None, other: str | None) -> tuple[float, tuple[str, ...]]:
    """The share of the first answer's win, by the verdicts with it at the first place and at the second."""
    if one is None or other is None:
        return 0.5, ("judged", "judge_unparseable")
    first = {"A": 1.0, "B": 0.0, "tie": 0.5}
    straight, swapped = first[one], 1 - first[other]
    if straight == swapped:
        return straight, ("judged",)
    return 0.5, ("judged", "orders_disagree")


def verdict(reply: str) -> str | None:
    """A, B or tie, from a reply; None where it cannot be read."""
    found = _field(reply, "verdict")
    text = found if isinstance(found, str) else reply
    text = text.strip().strip("*.\"'`[]() ")
    return {"a": "A", "b": "B", "tie": "tie", "answer a": "A", "answer b": "B"}.get(text.lower())


def rating(reply: str) -> float | None:
    """1 to 10, from a reply; None where it cannot be read."""
    found = _field(reply, "score")
    if found is None and re.fullmatch(r"\s*\d+(\.\d+)?\s*(/\s*10)?\s*", reply):
        found = float(reply.partition("/")[0])
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return float(found) if _SCALE[0] <= found <= _SCALE[1] else None


def _field(reply: str, name: str) -> Any:
    """A field of the last JSON object in a reply that has it; None where there is none."""
    decoder = json.JSONDecoder()
    for start in reversed([i for i, character in enumerate(reply) if character == "{"]):
        try:
            value, _ = decoder.raw_decode(reply, start)
        except ValueError:
            continue
        if isinstance(value, dict) and name in value:
            return value[name]
    return None


def _conversation(prompt: Sequence[Message]) -> str:
    said = ((message["role"], message["content"], message.get("more")) for message in prompt)
    return "\n\n".join(f"{role}: {' '.join(filter(None, texts))}" for role, *texts in said)
