"""Canonical pairs → token ids, a shard at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from dpo_ray.bins import batches
from dpo_ray.config import Data, Model
from dpo_ray.data.chat import ChatTokenizer, Completion, Prompt, parse_tools, require_chat_template, require_prompt_room
from dpo_ray.data.duplicates import PairsShard, read_kept
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TOKENIZED, tokenized_row
from dpo_ray.shards.output import ShardOutput

VERSION = 3
"""Of how dialogues become ids, here and in dpo_ray.data.chat; raised when that changes: all shards are made again."""

# Texts are tokenized this many characters at once: enough for an efficient call, and a shard of very long rows needs no
# more memory than one of its rows.
_CHARACTERS_AT_ONCE = 1 << 18

_SIDES = ("chosen", "rejected")


def identity(tokenizer: str, data: Data) -> dict[str, Any]:
    """What changes the ids: the tokenizer with its template, here their hash, and the limits."""
    return {
        "rules": VERSION,
        "tokenizer": tokenizer,
        "max_prompt_tokens": data.max_prompt_tokens,
        "long_prompts": data.long_prompts,
        "max_completion_tokens": data.max_completion_tokens,
        "long_completions": data.long_completions,
    }


class TokenizeShard:
    """Canonical pairs → token ids; pairs over the length limits are dropped or cut, and counted.

    An absent side has no ids. Rows that the source leaves out are counted too. A very long text is tokenized like any
    other before it is dropped or cut: its number of characters does not tell for sure whether it is too long. That
    takes time and memory in proportion to its length: 0.1 to 0.5 s and some 100 MB for 200,000 characters.

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
        turns = []
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self.chat.fit_prompt(prompt, self.data.max_prompt_tokens, self.data.long_prompts)
            if ids is None:
                yield "prompt_too_long"
            else:
                turns.append((row, prompt, ids))
        answers = [(prompt, row[side]) for row, prompt, _ in turns for side in _SIDES if row[side] is not None]
        completions = self.chat.completions(answers)
        merges = self.chat.merges_at_boundary([(p, c) for (p, _), c in zip(answers, completions, strict=True)])
        sides = iter(zip(completions, merges, strict=True))
        for row, prompt, ids in turns:
            found = {side: next(sides) for side in _SIDES if row[side] is not None}
            yield self._fate(row, prompt, ids, found)

    def _fate(
        self, row: dict[str, Any], prompt: Prompt, ids: list[int], sides: dict[str, tuple[Completion, bool]]
    ) -> _Kept | str:
        limit = self.data.max_completion_tokens
        too_long = any(len(completion.ids) > limit for completion, _ in sides.values())
        if too_long and self.data.long_completions == "drop":
            return "completion_too_long"
        chosen, rejected = (sides[side][0].ids[:limit] if side in sides else [] for side in _SIDES)
        if chosen == rejected:
            return "identical_tokens"
        notes = {
            "truncated_prompt": len(prompt.ids) > self.data.max_prompt_tokens,
            "truncated_completion": too_long,
            "boundary_merge": any(merges for _, merges in sides.values()),
            "double_bos": self.chat.begins_twice(ids),
            "double_eos": self.chat.ends_twice(chosen) or self.chat.ends_twice(rejected),
            "inner_control_token": any(completion.foreign_control_token for completion, _ in sides.values()),
            "tools_ignored": prompt.tools is not None and not self.chat.uses_tools(prompt),
        }
        kept = tokenized_row(row["pair_id"], row["prompt_id"], row["split"], ids, chosen, rejected, row)
        return _Kept(kept, [name for name, applies in notes.items() if applies])


class _Kept(NamedTuple):
    row: dict[str, Any]
    """A row of TOKENIZED."""
    noted: list[str]
    """Keys of tally.NOTED."""


def _characters(row: dict[str, Any]) -> int:
    texts = [*(message["content"] for message in row["prompt"]), *(row[side] or "" for side in _SIDES)]
    return sum(map(len, texts)) + len(row["tools"] or "")
