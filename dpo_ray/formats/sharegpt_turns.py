"""Messages as ShareGPT spells them: `from` and `value`, with names of roles of their own."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import is_turn, no_pair

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def is_either(value: Any) -> bool:
    """Whether it is a message in this spelling or with role and content."""
    return is_turn(value, "from", "value") or is_turn(value)


def are_either(value: Any) -> bool:
    """Whether it is a list of such messages."""
    return isinstance(value, list) and bool(value) and all(map(is_either, value))


def message(turn: Any) -> dict[str, Any]:
    """A message with role and content. Raises NoPair."""
    if not isinstance(turn, dict):
        no_pair("null_field" if turn is None else "non_string_content")
    if turn.get("from") is None:
        return turn
    if turn["from"] == "function_call":
        no_pair("tool_calls")
    role = _ROLES.get(turn["from"], turn["from"]) if isinstance(turn["from"], str) else turn["from"]
    return {"role": role, "content": turn.get("value")}


def messages(turns: Any) -> list[dict[str, Any]]:
    """Messages with role and content. Raises NoPair."""
    if not isinstance(turns, list):
        no_pair("null_field" if turns is None else "non_string_content")
    return [message(turn) for turn in turns]
