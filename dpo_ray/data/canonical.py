"""Rows of the input layouts → canonical pairs.

A prompt is text, which is then one user turn, or a dialogue: a list of `{role, content}` messages. An answer is text or
a list of messages, from the assistant's first to its last, with calls of tools and their results. Of a row are read the
fields of its layout (dpo_ray.formats.layout):

    paired            prompt, chosen, rejected; all three text, or all three messages. Without a prompt as below
    implicit_prompt   chosen and rejected are dialogues; the prompt is what both begin with
    unpaired          prompt, completion, and label: desirable or not; the pair has one side
    ranked            prompt, completions, scores: pairs by dpo_ray.data.pairing

Beside them `system`, the message that the dialogue begins with if it has none itself; `tools`; and how the pair was
judged (dpo_ray.data.judgement).

One row makes one pair, a ranked row one or several. A ranked answer without text, or one that stands in the list
already, is passed over; a row of which no pair is left is bad: `empty_response`, `too_few_distinct` or `tie`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from dpo_ray.config import Pairing
from dpo_ray.config.losses import Judged
from dpo_ray.data.dialogues import as_answer, parted
from dpo_ray.data.judgement import judged
from dpo_ray.data.pairing import Candidate, make_pairs
from dpo_ray.data.rules import (
    Reason,
    check_label,
    check_message,
    check_pair,
    check_prompt,
    check_scores,
    check_text,
    check_tools,
    reject,
)
from dpo_ray.formats.format import is_written_out
from dpo_ray.formats.layout import Layout, fields_of
from dpo_ray.pairs import TIE, Answer, Message, PreferencePair


def canonical_pairs(
    row: Mapping[str, Any], layout: Layout, pairing: Pairing, ties: Literal["drop", "keep"] = "drop"
) -> list[PreferencePair]:
    """The pairs of a row, at least one; one-sided if it is unpaired. Raises rules.BadRow with the rule it breaks."""
    if ties == "drop" and row.get("preference") == TIE and "preference" in fields_of(layout):
        reject("tie")  # whatever else is wrong with it
    if layout == "ranked":
        pairs = _from_ranked(row, pairing, ties)
    elif layout == "unpaired":
        pairs = [_from_unpaired(row)]
    else:
        pairs = [canonical_pair({k: v for k, v in row.items() if k != "prompt" or layout == "paired"})]
    system, tools = row.get("system"), check_tools(row.get("tools"))
    if system is not None and check_text(system).strip():
        pairs = [replace(pair, prompt=_opened_by(system, pair.prompt)) for pair in pairs]
    said = {name: row[name] for name in get_args(Judged) if name in row and name in fields_of(layout)}
    return [judged(replace(check_pair(pair), tools=tools), said, ties) for pair in pairs]


def canonical_pair(row: Mapping[str, Any]) -> PreferencePair:
    """A row of two answers as a pair, its tools left aside. Raises rules.BadRow with the rule it breaks."""
    fields = _values(row, "chosen", "rejected", *(["prompt"] if "prompt" in row else []))
    kinds = {type(field) for field in fields}
    if kinds == {str}:
        return check_pair(_from_text(row))
    if kinds == {list}:
        return check_pair(_from_messages(row))
    if kinds == {str, list}:
        reject("mixed_types")
    reject("non_string_content")


def canonical_prompt(value: Any) -> list[Message]:
    """A prompt, as text or messages, as a dialogue. Raises rules.BadRow."""
    if isinstance(value, list):
        prompt = [check_message(m) for m in value]
    else:
        prompt = [Message(role="user", content=_plain(value))]
    check_prompt(prompt)
    return prompt


def _opened_by(system: str, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """A dialogue with this system message. Raises BadRow where it begins with another one."""
    if prompt[0]["role"] != "system":
        return (Message(role="system", content=system), *prompt)
    if prompt[0]["content"] != system:
        reject("other_system")
    return prompt


def _values(row: Mapping[str, Any], *names: str) -> list[Any]:
    if any(name not in row for name in names):
        reject("missing_field")
    values = [row[name] for name in names]
    if any(value is None for value in values):
        reject("null_field")
    return values


def _from_unpaired(row: Mapping[str, Any]) -> PreferencePair:
    given, answer, label = _values(row, "prompt", "completion", "label")
    desirable = check_label(label)
    prompt = canonical_prompt(given)
    said = _answer(answer, prompt)
    return PreferencePair(tuple(prompt), said if desirable else None, None if desirable else said)


def _from_ranked(row: Mapping[str, Any], pairing: Pairing, ties: Literal["drop", "keep"]) -> list[PreferencePair]:
    given, completions, scores = _values(row, "prompt", "completions", "scores")
    prompt = canonical_prompt(given)
    if not isinstance(completions, list):
        reject("non_string_content")
    texts = [_text(_answer(completion, prompt)) for completion in completions]
    candidates = [Candidate(*of_one) for of_one in zip(texts, check_scores(scores, len(texts)), strict=True)]
    couples, passed_over = make_pairs(prompt, candidates, pairing, keep_ties=ties == "keep")
    if not any(text.strip() for text in texts):
        reject("empty_response")
    for reason in _WITHOUT_PAIR:
        if not couples and passed_over[reason]:
            reject(reason)
    return [couple.pair(prompt) for couple in couples]


# A rule that left less than two answers says more than that there are less than two.
_WITHOUT_PAIR: tuple[Reason, ...] = ("tie", "small_gap", "length_ratio", "near_identical", "echo", "too_few_distinct")


def _answer(value: Any, prompt: list[Message]) -> Answer:
    """A single answer; empty text where it is a list without messages."""
    if not isinstance(value, list):
        return _plain(value)
    messages = [check_message(m) for m in value]
    if not messages:
        return ""
    if messages[: len(prompt)] == prompt:
        reject("prompt_repeated")
    return as_answer(messages)


def _text(answer: Answer) -> str:
    if not isinstance(answer, str):
        reject("bad_completion")
    return answer


def _from_text(row: Mapping[str, Any]) -> PreferencePair:
    if "prompt" not in row:
        reject("missing_field")
    prompt = Message(role="user", content=_plain(row["prompt"]))
    return PreferencePair((prompt,), _plain(row["chosen"]), _plain(row["rejected"]))


def _plain(value: Any) -> str:
    """Text that is said, not a list of messages that somebody wrote as text. Raises BadRow."""
    text = check_text(value)
    if is_written_out(text, whole=True):
        reject("messages_as_text")
    return text


def _from_messages(row: Mapping[str, Any]) -> PreferencePair:
    chosen = [check_message(m) for m in row["chosen"]]
    rejected = [check_message(m) for m in row["rejected"]]
    if not chosen or not rejected:
        reject("empty_response")
    if "prompt" in row:
        prompt = [check_message(m) for m in row["prompt"]]
        if prompt and (chosen[: len(prompt)] == prompt or rejected[: len(prompt)] == prompt):
            reject("prompt_repeated")
    else:
        prompt, chosen, rejected = parted(chosen, rejected)
    return PreferencePair(tuple(prompt), as_answer(chosen), as_answer(rejected))
