"""Rules that a preference row must pass, each with the name that quarantine and counters use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

from dpo_ray.pairs import Answer, Message, PreferencePair

Reason = Literal[
    "invalid_utf8",
    "malformed_json",
    "not_an_object",
    "too_long",
    "null_field",
    "missing_field",
    "non_string_content",
    "mixed_types",
    "messages_as_text",
    "empty_prompt",
    "empty_response",
    "identical_pair",
    "unknown_role",
    "role_order",
    "other_system",
    "two_questions",
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
    "messages_as_text": "messages are written as text, as pandas does in CSV, and not as a list, as in JSON lines",
    "empty_prompt": "no prompt, or an empty message in it",
    "empty_response": "an answer without text",
    "identical_pair": "both answers are equal",
    "unknown_role": "a role other than system, user, assistant and tool",
    "role_order": "the turns are not an optional system turn, then user and assistant in turn, with results of tools "
    "after what the assistant said or called, and before an answer the user or a tool",
    "two_questions": "two columns may be the question; say which one is with data.layout=paired and "
    "data.columns.prompt, or merge them",
    "other_system": "the column of the system message says another one than the dialogue begins with",
    "tool_calls": "the calls of tools in a message are not a list of named functions, or not the assistant's",
    "bad_completion": "an answer does not begin and end with the assistant; or a ranked one is not one text",
    "diverging_prefix": "the dialogues have no beginning in common that the assistant goes on from",
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


_AFTER = {
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
"""Role → whose turn may be the next. Calls of tools may also be spelled in the assistant's text."""

_SHOWN = {"assistant": ("reasoning_content", "thinking"), "tool": ("tool_call_id", "name")}
"""Role → what a message may have beside its content that chat templates write, as text."""


def check_message(message: Any) -> Message:
    """One turn with a known role, its text, and what else of it chat templates write: calls of tools, and the texts
    of _SHOWN. What is null or empty, as in a column of structs, is left out, and so are other keys.

    A message that calls tools may have no text. Raises BadRow.
    """
    if message is None:
        reject("null_field")
    if not isinstance(message, dict):
        reject("non_string_content")
    calls = message.get("tool_calls") or None
    if "role" not in message or ("content" not in message and calls is None):
        reject("missing_field")
    role, content = check_text(message["role"]), message.get("content")
    if role not in _AFTER:
        reject("unknown_role")
    if calls is not None and role != "assistant":
        reject("tool_calls")
    more: dict[str, Any] = {name: check_text(message[name]) for name in _SHOWN.get(role, ()) if message.get(name)}
    if calls is not None:
        more["tool_calls"] = _checked_calls(calls)
        content = content or ""
    checked = Message(role=role, content=check_text(content))
    if more:
        try:
            checked["more"] = check_text(json.dumps(more, ensure_ascii=False, allow_nan=False, sort_keys=True))
        except (TypeError, ValueError, RecursionError):
            reject("tool_calls")
    return checked


def calls_tools(message: Message) -> bool:
    """Whether a message calls tools by its field tool_calls."""
    return "tool_calls" in json.loads(message.get("more") or "{}")


def check_prompt(prompt: Sequence[Message]) -> None:
    """A dialogue up to where the assistant is to speak: an optional system turn, then user and assistant in turn,
    with results of tools after what the assistant said or called; at the end the user or a tool. Raises BadRow."""
    if not prompt or any(not m["content"].strip() and m["role"] != "tool" and not calls_tools(m) for m in prompt):
        reject("empty_prompt")
    check_order(prompt)
    if prompt[-1]["role"] not in {"user", "tool"}:
        reject("role_order")


def check_order(dialogue: Sequence[Message]) -> None:
    """Whose turn it is in a dialogue, whoever speaks last; see check_prompt. Raises BadRow."""
    allowed = {"system", "user"}
    for message in dialogue:
        if message["role"] not in allowed:
            reject("role_order")
        allowed = {"tool"} if calls_tools(message) else _AFTER[message["role"]]


def check_label(label: Any) -> bool:
    """Whether a single answer is desirable: a bool, or 0 or 1, as a float too, as pandas writes a column with gaps.

    Raises BadRow.
    """
    if label is None:
        reject("null_field")
    if not isinstance(label, int | float) or label not in (0, 1):
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


def _checked_calls(calls: Any) -> list[Any]:
    """Calls of tools, their arguments as an object also where they are JSON text of one. Raises BadRow.

    Chat templates write the arguments as JSON: of text they would make a quoted text.
    """
    if not isinstance(calls, list) or not all(_is_tool(call) for call in calls):
        reject("tool_calls")
    return [_with_arguments(_without_nulls(call)) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return {"arguments": {}, **call}
    try:
        arguments = json.loads(call["arguments"] or "{}", parse_constant=_no_number)
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


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
    check_prompt(pair.prompt)
    sides = [_checked_answer(pair.prompt, side) for side in (pair.chosen, pair.rejected) if side is not None]
    if len(sides) == 2 and sides[0] == sides[1]:
        reject("identical_pair")
    return pair


def _checked_answer(prompt: Sequence[Message], answer: Answer) -> Answer:
    """The answer as it is compared: a text without outer white space."""
    if isinstance(answer, str):
        answer = answer.strip()
        if not answer:
            reject("empty_response")
        return answer
    if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
        reject("bad_completion")
    check_order([*prompt, *answer])
    if any(not m["content"].strip() and m["role"] != "tool" and not m.get("more") for m in answer):
        reject("empty_response")
    return answer
