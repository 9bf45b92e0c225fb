"""Canonical pairs → token ids, a shard at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa

from dpo_ray.bins import batches
from dpo_ray.config import Data, Model
from dpo_ray.data.chat import (
    ChatTokenizer,
    Completion,
    Prompt,
    Written,
    parse_tools,
    require_chat_template,
    require_prompt_room,
)
from dpo_ray.data.duplicates import PairsShard, read_kept
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TOKENIZED, answer_of, tokenized_row
from dpo_ray.shards.output import ShardOutput

VERSION = 3
"""Of how dialogues become ids, here and in dpo_ray.data.chat; raised when that changes: all shards are made again."""

# Texts are tokenized this many characters at once: enough for an efficient call, and a shard of very long rows needs no
# more memory than one of its rows.
_CHARACTERS_AT_ONCE = 1 << 18

_Side = Literal["chosen", "rejected"]
_SIDES: tuple[_Side, ...] = get_args(_Side)


def identity(tokenizer: str, data: Data) -> dict[str, Any]:
    """What changes the ids: the tokenizer with its template, here their hash, and the limits."""
    return {
        "rules": VERSION,
        "tokenizer": tokenizer,
        "max_prompt_tokens": data.max_prompt_tokens,
        "long_prompts": data.long_prompts,
        "max_completion_tokens": data.max_completion_tokens,
        "long_completions": data.long_completions,
        "loss_turns": data.loss_turns,
    }


class TokenizeShard:
    """Canonical pairs → token ids; pairs over the length limits are dropped or cut, and counted.

    An absent side has no ids. A mask stands beside a completion of which not all tokens bear the loss; a pair with one
    that is cut before any does is dropped. Rows that the source leaves out are counted too. A very long text is
    tokenized like any other before it is dropped or cut: its number of characters does not tell for sure whether it is
    too long. That takes time and memory in proportion to its length: 0.1 to 0.5 s and some 100 MB for 200,000
    characters. An answer of several turns is rendered more often than one of text, see dpo_ray.data.turns.

    Raises ConfigError, as it is built, where the tokenizer has no chat template, or where the limit leaves nothing of
    a prompt that is cut.
    """

    def __init__(self, model: Model, data: Data):
        folder = ModelFolder.of(model)
        tokenizer = folder.tokenizer()
        require_chat_template(tokenizer, model.path)
        self.chat = ChatTokenizer(tokenizer, folder.template_arguments)
        require_prompt_room(self.chat, data)
        self.data = data

    def __call__(self, source: PairsShard) -> ShardOutput:
        kept: list[dict[str, Any]] = []
        table, counters = read_kept(source)
        for rows in batches(table.to_pylist(), _characters, _CHARACTERS_AT_ONCE):
            for fate in self._fates(rows):
                if isinstance(fate, str):
                    counters[fate] += 1
                else:
                    kept.append(fate.row)
                    counters.update(fate.noted)
        return ShardOutput(pa.Table.from_pylist(kept, schema=TOKENIZED), counters)

    def _fates(self, rows: list[dict[str, Any]]) -> Iterator[_Kept | str]:
        """Each row as it is kept, or why it is dropped; those whose prompt is too long come first."""
        prompts = self.chat.prompts([(row["prompt"], parse_tools(row.get("tools"))) for row in rows])
        turns: list[_Rendered] = []
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self.chat.fit_prompt(prompt, self.data.max_prompt_tokens, self.data.long_prompts)
            if ids is None:
                yield "prompt_too_long"
                continue
            answers = {side: answer for side in _SIDES if (answer := answer_of(row, side)) is not None}
            written = self.chat.write(prompt, list(answers.values()), self.data.loss_turns)
            if written is None:
                yield "prompt_rewritten"
                continue
            if written[0] is not prompt:
                prompt = written[0]
                ids = self.chat.fit_prompt(prompt, self.data.max_prompt_tokens, self.data.long_prompts)
            if ids is None:
                yield "prompt_too_long"
            else:
                turns.append(_Rendered(row, prompt, ids, dict(zip(answers, written[1], strict=True))))
        answered = [(turn.prompt, written) for turn in turns for written in turn.sides.values()]
        completions = self.chat.encoded([written for _, written in answered])
        merges = self.chat.merges_at_boundary([(p, c) for (p, _), c in zip(answered, completions, strict=True)])
        sides = iter(zip(completions, merges, strict=True))
        for turn in turns:
            yield self._fate(turn, {side: next(sides) for side in turn.sides})

    def _fate(self, turn: _Rendered, sides: dict[_Side, tuple[Completion, bool]]) -> _Kept | str:
        row, prompt, ids, limit = turn.row, turn.prompt, turn.ids, self.data.max_completion_tokens
        too_long = any(len(completion.ids) > limit for completion, _ in sides.values())
        if too_long and self.data.long_completions == "drop":
            return "completion_too_long"
        chosen, rejected = (sides[side][0].ids[:limit] if side in sides else [] for side in _SIDES)
        if chosen == rejected:
            return "identical_tokens"
        masks = {side: mask[:limit] for side, (completion, _) in sides.items() if (mask := completion.mask) is not None}
        if not all(map(any, masks.values())):
            return "cut_before_loss"
        notes = {
            "truncated_prompt": len(prompt.ids) > self.data.max_prompt_tokens,
            "truncated_completion": too_long,
            "boundary_merge": any(merges for _, merges in sides.values()),
            "double_bos": self.chat.begins_twice(ids),
            "double_eos": self.chat.ends_twice(chosen) or self.chat.ends_twice(rejected),
            "inner_control_token": any(completion.foreign_control_token for completion, _ in sides.values()),
            "tools_ignored": prompt.tools is not None and not self.chat.uses_tools(prompt),
        }
        names = row["pair_id"], row["prompt_id"], row["split"]
        kept = tokenized_row(*names, ids, chosen, rejected, masks.get("chosen"), masks.get("rejected"), row)
        return _Kept(kept, [name for name, applies in notes.items() if applies])


class _Rendered(NamedTuple):
    row: dict[str, Any]
    prompt: Prompt
    ids: list[int]
    """Of the prompt, within the limit."""
    sides: dict[_Side, Written]


class _Kept(NamedTuple):
    row: dict[str, Any]
    """A row of TOKENIZED."""
    noted: list[str]
    """Keys of tally.NOTED."""


def _characters(row: dict[str, Any]) -> int:
    answers = [answer_of(row, side) for side in _SIDES]
    turns = [*row["prompt"], *(turn for answer in answers if isinstance(answer, tuple) for turn in answer)]
    texts = [text or "" for turn in turns for text in (turn["content"], turn.get("more"))]
    return sum(map(len, [*texts, *(answer for answer in answers if isinstance(answer, str)), row["tools"] or ""]))
