"""Rules that a preference row must pass, each with the name that quarantine and counters use."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from dpo_ray.pairs import Message, PreferencePair

Reason = Literal[
    "null_field",
    "missing_field",
    "non_string_content",
    "mixed_types",
    "empty_prompt",
    "empty_response",
    "identical_pair",
    "unknown_role",
    "role_order",
    "bad_completion",
    "diverging_prefix",
    "prompt_repeated",
    "invalid_unicode",
    "bad_label",
    "invalid_utf8",
    "malformed_json",
    "not_an_object",
    "too_long",
]


class BadRow(Exception):
    """A row that makes no preference pair; `reason` is the name of the rule that it breaks."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason: Reason = reason


def reject(reason: Reason) -> NoReturn:
    """Raise BadRow."""
    raise BadRow(reason)


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


def check_message(message: Any) -> Message:
    """One turn with a known role and text. Raises BadRow."""
    if message is None:
        reject("null_field")
    if not isinstance(message, dict):
        reject("non_string_content")
    if "role" not in message or "content" not in message:
        reject("missing_field")
    role, content = check_text(message["role"]), check_text(message["content"])
    if role not in {"system", "user", "assistant"}:
        reject("unknown_role")
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


def check_pair(pair: PreferencePair) -> PreferencePair:
    """The rules on the pair as a whole; a side that is absent breaks none. Raises BadRow."""
    check_prompt(list(pair.prompt))
    sides = [side.strip() for side in (pair.chosen, pair.rejected) if side is not None]
    if not all(sides):
        reject("empty_response")
    if len(sides) == 2 and sides[0] == sides[1]:
        reject("identical_pair")
    return pair
