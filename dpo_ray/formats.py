"""Input layouts → canonical pairs.

A row names its fields `chosen` and `rejected`, and mostly `prompt`. Each is text or a list of
`{role, content}` messages:

    explicit prompt   prompt: dialogue, chosen / rejected: one assistant message
    implicit prompt   no prompt; chosen / rejected: whole dialogues that differ in their last turn only
    plain text        all three are strings: the prompt is one user turn
"""

from __future__ import annotations

from typing import Any

from dpo_ray.errors import DataError
from dpo_ray.pairs import Message, PreferencePair
from dpo_ray.quality import check_message, check_pair, check_prompt, check_text, reject


def check_columns(columns: list[str], source: str) -> None:
    """Raises DataError where a file as a whole cannot hold pairs."""
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise DataError(
            f"{source} has no column {' and no column '.join(missing)} (it has {', '.join(columns) or 'none'}). "
            "A preference shard holds chosen and rejected, and prompt where they are not whole dialogues: "
            "rename its columns, or leave the file out of data.train and data.eval."
        )


def canonical_pair(row: dict[str, Any]) -> PreferencePair:
    """A raw row as a canonical pair. Raises quality.BadRow with the rule that it breaks."""
    if "chosen" not in row or "rejected" not in row:
        reject("missing_field")
    fields = [row["chosen"], row["rejected"], *([row["prompt"]] if "prompt" in row else [])]
    if any(field is None for field in fields):
        reject("null_field")
    kinds = {type(field) for field in fields}
    if kinds == {str}:
        return check_pair(_from_text(row))
    if kinds == {list}:
        return check_pair(_from_messages(row))
    if kinds == {str, list}:
        reject("mixed_types")
    reject("non_string_content")


def canonical_prompt(value: Any) -> list[Message]:
    """A prompt, as text or messages, as a dialogue. Raises quality.BadRow."""
    if isinstance(value, list):
        prompt = [check_message(m) for m in value]
    else:
        prompt = [Message(role="user", content=check_text(value))]
    check_prompt(prompt)
    return prompt


def _from_text(row: dict[str, Any]) -> PreferencePair:
    if "prompt" not in row:
        reject("missing_field")
    prompt = Message(role="user", content=check_text(row["prompt"]))
    return PreferencePair((prompt,), check_text(row["chosen"]), check_text(row["rejected"]))


def _from_messages(row: dict[str, Any]) -> PreferencePair:
    chosen = [check_message(m) for m in row["chosen"]]
    rejected = [check_message(m) for m in row["rejected"]]
    if not chosen or not rejected:
        reject("empty_response")
    if "prompt" in row:
        prompt = [check_message(m) for m in row["prompt"]]
        if prompt and (chosen[: len(prompt)] == prompt or rejected[: len(prompt)] == prompt):
            reject("prompt_repeated")
        if len(chosen) != 1 or len(rejected) != 1:
            reject("bad_completion")
    else:
        prompt = chosen[:-1]
        if not prompt:
            reject("missing_field")
        if rejected[:-1] != prompt:
            reject("diverging_prefix")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        reject("bad_completion")
    return PreferencePair(tuple(prompt), chosen[-1]["content"], rejected[-1]["content"])
