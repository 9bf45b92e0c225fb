"""Input layouts → canonical pairs.

A row names its fields `chosen` and `rejected`, and mostly `prompt`. Each is text or a list of
`{role, content}` messages:

    explicit prompt   prompt: dialogue, chosen / rejected: one assistant message
    implicit prompt   no prompt; chosen / rejected: whole dialogues that differ in their last turn only
    plain text        all three are strings: the prompt is one user turn
    unpaired          prompt: text or dialogue, completion: text or one assistant message, label: desirable or not

A file is unpaired if it has the columns of the last layout and not both `chosen` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dpo_ray.errors import DataError
from dpo_ray.pairs import Message, PreferencePair
from dpo_ray.quality import check_label, check_message, check_pair, check_prompt, check_text, reject

PAIRED_COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")


def is_unpaired(columns: Collection[str]) -> bool:
    """Whether these are the columns of single answers with a label, not of pairs."""
    return all(name in columns for name in UNPAIRED_COLUMNS) and not {"chosen", "rejected"} <= set(columns)


def check_columns(columns: list[str], source: str) -> None:
    """Raises DataError where a file as a whole can hold neither pairs nor single answers with a label."""
    if is_unpaired(columns):
        return
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise DataError(
            f"{source} has no column {' and no column '.join(missing)} (it has {', '.join(columns) or 'none'}). "
            "A preference shard holds chosen and rejected, and prompt where they are not whole dialogues; or, with "
            "single answers for train.loss.type=kto, prompt, completion and label: rename its columns, or leave the "
            "file out of data.train and data.eval."
        )


def canonical_pair(row: dict[str, Any]) -> PreferencePair:
    """A raw row as a canonical pair, one-sided if it is unpaired. Raises quality.BadRow with the rule it breaks."""
    if is_unpaired(row):
        return check_pair(_from_unpaired(row))
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


def _from_unpaired(row: dict[str, Any]) -> PreferencePair:
    desirable = check_label(row["label"])
    prompt = canonical_prompt(row["prompt"])
    answer = row["completion"]
    if isinstance(answer, list):
        messages = [check_message(m) for m in answer]
        if not messages:
            reject("empty_response")
        if messages[: len(prompt)] == prompt:
            reject("prompt_repeated")
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            reject("bad_completion")
        text = messages[0]["content"]
    else:
        text = check_text(answer)
    return PreferencePair(tuple(prompt), text if desirable else None, None if desirable else text)


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
