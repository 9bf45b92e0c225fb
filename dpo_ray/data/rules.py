"""Rules that a preference row must pass, each with the name that quarantine and counters use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args

from dpo_ray.pairs import Message, PreferencePair

Reason = Literal[
    "invalid_utf8",
    "malformed_json",
    "not_an_object",
    "too_long",
    "null_field",
    "missing_field",
    "non_string_content",
    "mixed_types",
    "empty_prompt",
    "empty_response",
    "identical_pair",
    "unknown_role",
    "role_order",
    "tool_calls",
    "bad_completion",
    "diverging_prefix",
    "prompt_repeated",
    "invalid_unicode",
    "bad_label",
    "bad_scores",
    "too_few_distinct",
    "tie",
    "small_gap",
    "length_ratio",
    "near_identical",
    "echo",
    "bad_tools",
    "bad_weight",
    "bad_margin",
    "bad_preference",
    "bad_transcript",
    "no_winner",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
MEANING: dict[Reason, str] = {
    "invalid_utf8": "not UTF-8",
    "malformed_json": "not a whole JSON value",
    "not_an_object": "JSON, but not an object",
    "too_long": "more characters than data.max_characters, or a line of JSON over 16 MiB",
    "null_field": "a field, a role or a content is null",
    "missing_field": "a field is absent and cannot be derived; say with data.columns what it is called",
    "non_string_content": "a field or a content is of another type than text or messages",
    "mixed_types": "some fields are text and others messages; data.layout=implicit_prompt passes over a prompt column",
    "empty_prompt": "no prompt, or an empty message in it",
    "empty_response": "an answer without text",
    "identical_pair": "both answers are equal",
    "unknown_role": "a role other than system, user and assistant",
    "role_order": "the prompt is not an optional system turn, then user and assistant in turn, at the end the user",
    "tool_calls": "a message calls tools, which a pair of texts cannot hold",
    "bad_completion": "an answer is not one message of the assistant",
    "diverging_prefix": "the dialogues differ before their last turn",
    "prompt_repeated": "the answers hold the prompt again; data.layout=implicit_prompt takes it from them alone",
    "invalid_unicode": "a lone surrogate",
    "bad_label": "the label is neither true, false, 1 nor 0",
    "bad_scores": "not one finite number for each completion",
    "too_few_distinct": "less than two different completions",
    "tie": "the answers are judged equally good; data.ties=keep takes them as pairs with a preference of .5",
    "small_gap": "no two scores differ by data.pairing.min_score_gap",
    "length_ratio": "one answer is longer than the other by more than data.pairing.max_length_ratio",
    "near_identical": "two answers are more alike than data.pairing.max_similarity",
    "echo": "an answer begins by saying the prompt again; data.pairing.drop_echoes=false takes it",
    "bad_tools": "the tools are not a list of named functions, or not JSON",
    "bad_weight": "the weight is no finite number above 0; data.ignore=[weight] leaves the column aside",
    "bad_margin": "the margin is no finite number of 0 or more; data.ignore=[margin] leaves the column aside",
    "bad_preference": "the preference is no number from 0 to 1; data.ignore=[preference] leaves the column aside",
    "bad_transcript": "the text does not begin with a turn of Human or Assistant",
    "no_winner": "it is not told which of two answers is better",
}
"""What is wrong with a row, in the words of an error message."""


class BadRow(Exception):
    """A row that makes no preference pair; `reason` is the name of the rule that it breaks."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason: Reason = reason


def reject(reason: Reason) -> NoReturn:
    """Raise BadRow."""
    raise BadRow(reason)


def known_reason(name: str) -> Reason:
    """A reason by its name. Raises KeyError where it is none."""
    return {str(reason): reason for reason in REASONS}[name]


def check_text(text: Any) -> str:
    """A string that can be stored as UTF-8. Raises BadRow."""
    if text is None:
        reject("null_field")
    if not isinstance(text, str):
        reject("non_string_content")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        reject("invalid_unicode")
    return text


def check_length(fields: Mapping[str, Any], max_characters: int) -> None:
    """At most so many characters of text in all the fields together, keys left aside. Raises BadRow."""
    left = max_characters
    waiting: list[Any] = list(fields.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            left -= len(value)
            if left < 0:
                reject("too_long")
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()


def check_message(message: Any) -> Message:
    """One turn with a known role and text, and no calls of tools. Raises BadRow."""
    if message is None:
        reject("null_field")
    if not isinstance(message, dict):
        reject("non_string_content")
    if "role" not in message or "content" not in message:
        reject("missing_field")
    role, content = check_text(message["role"]), check_text(message["content"])
    if role not in {"system", "user", "assistant"}:
        reject("unknown_role")
    if message.get("tool_calls"):  # null or empty in a column of structs, where every message has every key
        reject("tool_calls")
    return {"role": role, "content": content}


def check_prompt(prompt: list[Message]) -> None:
    """A dialogue: an optional system turn, then user and assistant in turn, ending with the user. Raises BadRow."""
    if not prompt or any(not m["content"].strip() for m in prompt):
        reject("empty_prompt")
    turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if not turns or [m["role"] for m in turns] != expected or turns[-1]["role"] != "user":
        reject("role_order")


def check_label(label: Any) -> bool:
    """Whether a single answer is desirable: a bool, or the integer 0 or 1. Raises BadRow."""
    if label is None:
        reject("null_field")
    if not isinstance(label, int) or label not in (0, 1):
        reject("bad_label")
    return bool(label)


def check_scores(scores: Any, completions: int) -> list[float]:
    """A finite number for each completion. Raises BadRow."""
    if not isinstance(scores, list) or len(scores) != completions:
        reject("bad_scores")
    try:
        # A bool is an int to Python, and judges an answer, but ranks none.
        numbers = [float(s) if isinstance(s, int | float) and not isinstance(s, bool) else math.nan for s in scores]
    except OverflowError:
        reject("bad_scores")
    if not all(math.isfinite(number) for number in numbers):
        reject("bad_scores")
    return numbers


def check_tools(tools: Any) -> str | None:
    """The tools of a row as JSON text, None where there are none: null, blank text or an empty list. Raises BadRow.

    Tools are a list of JSON schemas, each with a name of its own or, one level down, in `function`; or that list as
    JSON text. In a list that is not text, what is null is left out: a column of structs has every key of every row.
    """
    try:
        if isinstance(tools, str):
            tools = json.loads(tools, parse_constant=_no_number) if tools.strip() else None
        else:
            tools = _without_nulls(tools)
        if tools is None or tools == []:
            return None
        if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
            reject("bad_tools")
        text = json.dumps(tools, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        reject("bad_tools")
    return check_text(text)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return isinstance(name, str) and bool(name.strip())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def check_pair(pair: PreferencePair) -> PreferencePair:
    """The rules on the pair as a whole; a side that is absent breaks none. Raises BadRow."""
    check_prompt(list(pair.prompt))
    sides = [side.strip() for side in (pair.chosen, pair.rejected) if side is not None]
    if not all(sides):
        reject("empty_response")
    if len(sides) == 2 and sides[0] == sides[1]:
        reject("identical_pair")
    return pair
