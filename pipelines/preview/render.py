"""Sheets as a person and as a program read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dpo_ray.data.rules import MEANING
from dpo_ray.data.tally import NOTED
from pipelines.preview.sheet import SIDES, Example, Piece, Sheet

OPENS, CLOSES = "⟦", "⟧"
"""Around what the loss is computed on."""
_FILES = 5
_BEGINNING, _END = 700, 300  # characters of a long text that are shown
_OF_TOKENS = {
    "prompt_too_long": "the prompt is over data.max_prompt_tokens",
    "completion_too_long": "an answer is over data.max_completion_tokens",
    "identical_tokens": "both answers are the same tokens, once cut",
    "prompt_rewritten": "the chat template writes the prompt otherwise before one answer than before the other",
    "cut_before_loss": "an answer is cut, by data.long_completions, before a token that bears the loss",
}
_WHY: dict[str, str] = {**{str(reason): why for reason, why in MEANING.items()}, **_OF_TOKENS}


def as_dict(sheet: Sheet) -> dict[str, Any]:
    """For --json."""
    return {
        "format": sheet.format.name,
        "about": sheet.format.about,
        "layout": sheet.format.layout,
        "files": sheet.files,
        "columns": list(sheet.columns),
        "read": list(sheet.read),
        "rows": sheet.rows,
        "is_all": sheet.is_all,
        "pairs": sheet.pairs,
        "dropped": dict(sheet.dropped),
        "first": sheet.first,
        "noted": dict(sheet.noted),
        "examples": [
            {
                "messages": example.messages,
                "sequences": None
                if example.pieces is None
                else {side: [asdict(piece) for piece in pieces] for side, pieces in example.pieces.items()},
            }
            for example in sheet.examples
        ],
    }


def lines(sheet: Sheet) -> Iterator[str]:
    """What is found, then the examples."""
    more = f" and {len(sheet.files) - _FILES} more" if len(sheet.files) > _FILES else ""
    yield f"{', '.join(sheet.files[:_FILES])}{more}"
    yield f"  format    {sheet.format.name}: {sheet.format.about}"
    unread = [column for column in sheet.columns if column not in sheet.read]
    yield f"  columns   read: {', '.join(sheet.read)}; not read: {', '.join(unread) or 'none'}"
    which = "all" if sheet.is_all else "the first"
    yield f"  rows      {which} {sheet.rows}: {sheet.pairs} pairs, {sheet.dropped.total()} rows dropped"
    for reason, count in sheet.dropped.most_common():
        why = _WHY.get(reason, "")
        first = f"; the first: {sheet.first[reason]}" if reason in sheet.first else ""
        yield f"  dropped   {reason} {count}: {why}{first}"
    for name, count in sheet.noted.items():
        yield f"  noted     {name} {count}: {NOTED[name]}"
    if sheet.format.layout == "unpaired":
        yield "  loss      single answers are learnt from with -o 'train.loss={type: kto}'"
    for number, example in enumerate(sheet.examples, start=1):
        yield ""
        yield f"pair {number} of the {sheet.format.name} rows"
        yield from _example(example)


def _example(example: Example) -> Iterator[str]:
    if example.pieces is None:
        for message in example.messages["prompt"]:
            yield f"  {message['role']}: {_shown(message['content'])}"
        for side in SIDES:
            if side in example.messages:
                yield f"  {side}: {OPENS}{_shown(example.messages[side])}{CLOSES}"
        return
    for name, pieces in example.pieces.items():
        if pieces:
            with_loss = sum(piece.tokens for piece in pieces if piece.loss)
            yield f"  {name}, {sum(piece.tokens for piece in pieces)} tokens, {with_loss} of them with loss:"
            yield from (f"    {line}" for line in "".join(map(_marked, pieces)).split("\n"))


def _marked(piece: Piece) -> str:
    shown = _shown(piece.text)
    return f"{OPENS}{shown}{CLOSES}" if piece.loss else shown


def _shown(text: Any) -> str:
    text = text if isinstance(text, str) else str(text)
    left_out = len(text) - _BEGINNING - _END
    return text if left_out <= 0 else f"{text[:_BEGINNING]} […{left_out} characters…] {text[-_END:]}"
