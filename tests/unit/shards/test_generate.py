"""Prompts → sampled completions, a shard at a time; the engine is one that shows what it was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.data.chat import ChatTokenizer
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.pairs import CANDIDATES, PROMPTS, prompt_id
from dpo_ray.shards.generate import Ask, Completion, GenerateShard, Request
from dpo_ray.shards.output import Shard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from tests.dialogues import stored

TOOLS = json.dumps([{"name": "look_up", "parameters": {"type": "object"}}])


TWO = [Ask(2)]


class Echo:
    """Completions of a prompt: its number of tokens, its seed, which was cut off, and so on in turn; the last request
    is finished first.
    """

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        self.calls.append([request.prompt_ids for request in requests])
        for number, (ids, samples, seed) in reversed(list(enumerate(requests))):
            two = [Completion(str(len(ids)), [1, 2], "stop", -1.5), Completion(str(seed), [1] * 5, "length")]
            yield number, (two * samples)[:samples]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer(load_tokenizer(tiny_model))


def prompts_shard(
    folder: Path, texts: Sequence[str], tools: str | None = None, system: str | None = None, name: str = "prompts"
) -> Shard:
    rows = []
    for text in texts:
        prompt = [{"role": "user", "content": text}]
        if system is not None:
            prompt = [{"role": "system", "content": system}, *prompt]
        rows.append({"prompt_id": prompt_id(prompt, tools), "split": "train", "prompt": prompt, "tools": tools})
    location = Location.of(folder) / f"{name}.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=PROMPTS), {})
    return Shard(location.uri)


def test_each_prompt_has_its_completions_and_prompts_over_the_limit_are_dropped(tmp_path: Path, chat: ChatTokenizer):
    dialogues = [[{"role": "user", "content": text}] for text in ("Why?", "Why is it so? " * 9, "How?")]
    short, long, other = (prompt.ids for prompt in chat.prompts([(dialogue, None) for dialogue in dialogues]))
    sampler = Echo()
    shard = prompts_shard(tmp_path, [dialogue[0]["content"] for dialogue in dialogues])
    output = GenerateShard(chat, sampler, TWO, max_prompt_tokens=len(long) - 1, seed=0, model="m0")(shard)
    assert sampler.calls == [[short, other]]
    assert output.table.schema.equals(CANDIDATES)
    assert output.table["prompt"].to_pylist() == [stored(dialogues[0]), stored(dialogues[2])]
    first = output.table["completions"].to_pylist()[0]
    assert first[0] == {
        "text": str(len(short)),
        "finished": True,
        "num_tokens": 2,
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "logprob": -1.5,
        "model": "m0",
        "system_prompt": None,
    }
    assert [first[1][name] for name in ("finished", "finish_reason", "num_tokens", "logprob")] == [
        False, "length", 5, None,
    ]  # fmt: skip
    assert output.counters == {"read": 3, "prompt_too_long": 1, "completions": 4, "tokens": 14, "truncated_samples": 2}


def test_a_seed_is_the_prompts_own_whatever_else_is_in_the_shard(tmp_path: Path, chat: ChatTokenizer):
    def seeds(texts: list[str], seed: int) -> list[int]:
        table = GenerateShard(chat, Echo(), TWO, 64, seed, "m0")(prompts_shard(tmp_path, texts)).table
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
    output = GenerateShard(chat, Echo(), TWO, 64, 0, "m0")(prompts_shard(tmp_path, ["Why?"], TOOLS))
    assert shown == [json.loads(TOOLS)]
    assert output.table["tools"].to_pylist() == [TOOLS]


def test_a_shard_without_prompts_gives_none(tmp_path: Path, chat: ChatTokenizer):
    output = GenerateShard(chat, Echo(), TWO, 64, 0, "m0")(prompts_shard(tmp_path, []))
    assert output.table.num_rows == 0 and output.table.schema.equals(CANDIDATES)


def test_a_model_is_asked_in_several_ways_and_the_prompt_stays_as_it_is(tmp_path: Path, chat: ChatTokenizer):
    asks = [Ask(1), Ask(2, "Be brief.")]
    told = [{"role": "system", "content": "Be brief."}]
    for system in (None, "Be kind."):
        shard = prompts_shard(tmp_path, ["Why?", "How?"], system=system)
        sampler = Echo()
        output = GenerateShard(chat, sampler, asks, 64, 3, "m0")(shard)
        rows = output.table.to_pylist()
        users = [row["prompt"][-1:] for row in rows]
        as_they_are = [[{"role": "system", "content": system}, *user] if system else user for user in users]
        assert [row["prompt"] for row in rows] == [stored(messages) for messages in as_they_are]
        shown = [dialogue for user, row in zip(users, rows, strict=True) for dialogue in (row["prompt"], told + user)]
        assert sampler.calls == [[prompt.ids for prompt in chat.prompts([(dialogue, None) for dialogue in shown])]]
        for row in rows:
            assert [one["system_prompt"] for one in row["completions"]] == [None, "Be brief.", "Be brief."]
        seed = int(rows[0]["completions"][2]["text"])
        assert seed == (4 + int(rows[0]["prompt_id"], 16)) % 2**63  # another than the first ask's
        assert output.counters["completions"] == 6


def test_a_prompt_that_is_too_long_in_one_of_the_ways_is_dropped(tmp_path: Path, chat: ChatTokenizer):
    shard = prompts_shard(tmp_path, ["Why?", "Why is it so? " * 9])
    output = GenerateShard(chat, Echo(), [Ask(1), Ask(1, "Be brief. " * 30)], 64, 0, "m0")(shard)
    assert output.table.num_rows == 0 and output.counters["prompt_too_long"] == 2


def test_shards_that_are_given_together_are_one_call_and_are_given_back_as_they_are_finished(
    tmp_path: Path, chat: ChatTokenizer
):
    texts = [["Why?", "How?"], [], ["When?"], ["Who?", "Where?", "What?"]]
    shards = [prompts_shard(tmp_path, these, name=str(n)) for n, these in enumerate(texts)]
    sampler = Echo()
    found = list(GenerateShard(chat, sampler, TWO, 64, 0, "m0").stream(shards))
    assert len(sampler.calls) == 1 and len(sampler.calls[0]) == 6
    assert [n for n, _ in found] == [1, 3, 2, 0]  # the empty one at once, the others as the engine does them
    for n, output in found:
        assert [row["prompt"][-1]["content"] for row in output.table.to_pylist()] == texts[n]
        alone = GenerateShard(chat, Echo(), TWO, 64, 0, "m0")(shards[n])
        assert output.table.equals(alone.table) and output.counters == alone.counters
