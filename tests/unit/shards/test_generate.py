"""Prompts → sampled completions, a shard at a time; the engine is one that shows what it was asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.data.chat import ChatTokenizer
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.pairs import CANDIDATES, PROMPTS, prompt_id
from dpo_ray.shards.generate import Completion, GenerateShard
from dpo_ray.shards.output import Shard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location

TOOLS = json.dumps([{"name": "look_up", "parameters": {"type": "object"}}])


class Echo:
    """Two completions of a prompt: its number of tokens, and its seed, which was cut off."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        self.prompts += prompts
        return [
            [Completion(str(len(ids)), [1, 2], "stop", -1.5), Completion(str(seed), [1] * 5, "length")]
            for ids, seed in zip(prompts, seeds, strict=True)
        ]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer(load_tokenizer(tiny_model))


def prompts_shard(folder: Path, texts: Sequence[str], tools: str | None = None) -> Shard:
    rows = []
    for text in texts:
        prompt = [{"role": "user", "content": text}]
        rows.append({"prompt_id": prompt_id(prompt, tools), "split": "train", "prompt": prompt, "tools": tools})
    location = Location.of(folder) / "prompts.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=PROMPTS), {})
    return Shard(location.uri)


def test_each_prompt_has_its_completions_and_prompts_over_the_limit_are_dropped(tmp_path: Path, chat: ChatTokenizer):
    dialogues = [[{"role": "user", "content": text}] for text in ("Why?", "Why is it so? " * 9, "How?")]
    short, long, other = (prompt.ids for prompt in chat.prompts([(dialogue, None) for dialogue in dialogues]))
    sampler = Echo()
    shard = prompts_shard(tmp_path, [dialogue[0]["content"] for dialogue in dialogues])
    output = GenerateShard(chat, sampler, max_prompt_tokens=len(long) - 1, seed=0, model="m0")(shard)
    assert sampler.prompts == [short, other]
    assert output.table.schema.equals(CANDIDATES)
    assert output.table["prompt"].to_pylist() == [dialogues[0], dialogues[2]]
    first = output.table["completions"].to_pylist()[0]
    assert first[0] == {
        "text": str(len(short)),
        "finished": True,
        "num_tokens": 2,
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "logprob": -1.5,
        "model": "m0",
    }
    assert [first[1][name] for name in ("finished", "finish_reason", "num_tokens", "logprob")] == [
        False, "length", 5, None,
    ]  # fmt: skip
    assert output.counters == {"read": 3, "prompt_too_long": 1, "completions": 4, "tokens": 14, "truncated_samples": 2}


def test_a_seed_is_the_prompts_own_whatever_else_is_in_the_shard(tmp_path: Path, chat: ChatTokenizer):
    def seeds(texts: list[str], seed: int) -> list[int]:
        table = GenerateShard(chat, Echo(), 64, seed, "m0")(prompts_shard(tmp_path, texts)).table
        return [int(completions[1]["text"]) for completions in table["completions"].to_pylist()]

    together = seeds(["Why?", "How?"], 3)
    assert together == seeds(["Why?"], 3) + seeds(["How?"], 3)
    assert together[0] == (3 + int(prompt_id([{"role": "user", "content": "Why?"}]), 16)) % 2**63
    assert together != seeds(["Why?", "How?"], 4)


def test_the_model_is_shown_the_tools_of_a_prompt_and_they_stay_with_it(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    shown: list[object] = []
    prompts = chat.prompts

    def showing(dialogues):
        shown.extend(tools for _, tools in dialogues)
        return prompts(dialogues)

    monkeypatch.setattr(chat, "prompts", showing)
    output = GenerateShard(chat, Echo(), 64, 0, "m0")(prompts_shard(tmp_path, ["Why?"], TOOLS))
    assert shown == [json.loads(TOOLS)]
    assert output.table["tools"].to_pylist() == [TOOLS]


def test_a_shard_without_prompts_gives_none(tmp_path: Path, chat: ChatTokenizer):
    output = GenerateShard(chat, Echo(), 64, 0, "m0")(prompts_shard(tmp_path, []))
    assert output.table.num_rows == 0 and output.table.schema.equals(CANDIDATES)
