"""Prompts → sampled completions, a shard at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from dpo_ray.config import Sampling
from dpo_ray.data.chat import ChatTokenizer, parse_tools
from dpo_ray.pairs import CANDIDATES, Message
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard


class Completion(NamedTuple):
    """What a model answered."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str
    """stop: it ended of itself, or by one of sampling.stop; length: it was cut at sampling.max_tokens."""
    logprob: float | None = None
    """Its summed log-prob, in nats, at temperature 1; None where the engine tells none."""

    def row(self, model: str, system_prompt: str | None) -> dict[str, Any]:
        """As an entry of CANDIDATES. model: hash of the model."""
        return {
            **self._asdict(),
            "token_ids": list(self.token_ids),
            "num_tokens": len(self.token_ids),
            "finished": self.finish_reason == "stop",
            "model": model,
            "system_prompt": system_prompt,
        }


class Ask(NamedTuple):
    """A way in which a model is asked for completions of a prompt."""

    samples: int
    """How many."""
    system_prompt: str | None = None
    """What stands in place of the prompt's own system turn; None: the prompt is shown as it is."""


class Request(NamedTuple):
    """What an engine is asked for."""

    prompt_ids: list[int]
    samples: int
    seed: int
    """In [0, 2**63)."""


class Sampler(Protocol):
    """An engine that generates."""

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        """The number of each request, and its completions, as they are finished."""
        ...


def identity(
    weights: str,
    tokenizer: str,
    sampling: Sampling,
    asks: Sequence[Ask],
    *,
    max_prompt_tokens: int,
    engine_version: str,
    seed: int,
) -> dict[str, Any]:
    """What changes the completions, beside the prompts.

    Args:
        weights, tokenizer: hashes of the model's.
        seed: run.seed.
    """
    return {
        "weights": weights,
        "tokenizer": tokenizer,
        "sampling": sampling.model_dump(mode="json", exclude={"samples"}),
        "asks": [ask._asdict() for ask in asks],
        "max_prompt_tokens": max_prompt_tokens,
        "engine_version": engine_version,
        "seed": seed,
    }


class GenerateShard:
    """Prompts → sampled completions of each; those of too many tokens are dropped.

    Args:
        asks: each prompt's completions are of these, in their order.
        model: hash of the model that samples.
    """

    def __init__(
        self,
        chat: ChatTokenizer,
        sampler: Sampler,
        asks: Sequence[Ask],
        max_prompt_tokens: int,
        seed: int,
        model: str,
    ):
        self.chat = chat
        self.sampler = sampler
        self.asks = asks
        self.model = model
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed

    def __call__(self, source: Shard) -> ShardOutput:
        [(_, output)] = self.stream([source])
        return output

    def stream(self, sources: Sequence[Shard]) -> Iterator[tuple[int, ShardOutput]]:
        """Each shard's number and output, as it is finished. The engine goes from shard to shard without a pause."""
        shards = [self._opened(source) for source in sources]
        requests = [request for shard in shards for request in shard.requests]
        shard_of = [(n, i) for n, shard in enumerate(shards) for i in range(len(shard.requests))]
        for n, shard in enumerate(shards):
            if not shard.requests:
                yield n, self._output(shard)
        for number, completions in self.sampler.sample(requests) if requests else ():
            n, i = shard_of[number]
            shard = shards[n]
            shard.answers[i] = completions
            if len(shard.answers) == len(shard.requests):
                yield n, self._output(shard)

    def _opened(self, source: Shard) -> _Opened:
        rows = read_whole_shard(Location(source.file)).to_pylist()
        by_ask = [self._encoded(rows, ask) for ask in self.asks]
        kept = [n for n in range(len(rows)) if all(len(ids[n]) <= self.max_prompt_tokens for ids in by_ask)]
        # Seeds belong to prompts, so that a shard made again is the same.
        requests = [
            Request(by_ask[a][n], ask.samples, (self.seed + a + int(rows[n]["prompt_id"], 16)) % 2**63)
            for n in kept
            for a, ask in enumerate(self.asks)
        ]
        return _Opened([rows[n] for n in kept], len(rows) - len(kept), requests, {})

    def _encoded(self, rows: list[dict[str, Any]], ask: Ask) -> list[list[int]]:
        prompts = [(_shown(row["prompt"], ask), parse_tools(row["tools"])) for row in rows]
        return [prompt.ids for prompt in self.chat.prompts(prompts)]

    def _output(self, shard: _Opened) -> ShardOutput:
        counters = Counter(read=len(shard.rows) + shard.too_long, prompt_too_long=shard.too_long)
        out = []
        for n, row in enumerate(shard.rows):
            completions = []
            for a, ask in enumerate(self.asks):
                found = shard.answers[n * len(self.asks) + a]
                completions += [one.row(self.model, ask.system_prompt) for one in found]
            counters["completions"] += len(completions)
            counters["tokens"] += sum(one["num_tokens"] for one in completions)
            counters["truncated_samples"] += sum(one["finish_reason"] == "length" for one in completions)
            out.append({**row, "completions": completions})
        return ShardOutput(pa.Table.from_pylist(out, schema=CANDIDATES), counters)


class _Opened(NamedTuple):
    """A shard whose prompts are with the engine."""

    rows: list[dict[str, Any]]
    too_long: int
    """Rows that were dropped."""
    requests: list[Request]
    """Of each row, one for each ask."""
    answers: dict[int, list[Completion]]
    """Of the requests that are finished."""


def _shown(prompt: list[Message], ask: Ask) -> list[Message]:
    if ask.system_prompt is None:
        return prompt
    turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
    return [Message(role="system", content=ask.system_prompt), *turns]
