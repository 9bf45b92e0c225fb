"""Prompts → sampled completions, a shard at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from dpo_ray.config import Sampling
from dpo_ray.data.chat import ChatTokenizer, parse_tools
from dpo_ray.pairs import CANDIDATES
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location


class Completion(NamedTuple):
    """What a model answered."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str
    """stop: it ended of itself, or by one of sampling.stop; length: it was cut at sampling.max_tokens."""
    logprob: float | None = None
    """Its summed log-prob, in nats, at temperature 1; None where the engine tells none."""

    def row(self, model: str) -> dict[str, Any]:
        """As an entry of CANDIDATES. model: hash of the model."""
        return {
            **self._asdict(),
            "token_ids": list(self.token_ids),
            "num_tokens": len(self.token_ids),
            "finished": self.finish_reason == "stop",
            "model": model,
        }


class Sampler(Protocol):
    """An engine that generates."""

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        """sampling.samples completions of each prompt's token ids; a prompt's seed, in [0, 2**63), makes them."""
        ...


def identity(
    weights: str, tokenizer: str, sampling: Sampling, *, max_prompt_tokens: int, engine_version: str, seed: int
) -> dict[str, Any]:
    """What changes the completions, beside the prompts.

    Args:
        weights, tokenizer: hashes of the model's.
        seed: run.seed.
    """
    return {
        "weights": weights,
        "tokenizer": tokenizer,
        "sampling": sampling.model_dump(mode="json"),
        "max_prompt_tokens": max_prompt_tokens,
        "engine_version": engine_version,
        "seed": seed,
    }


class GenerateShard:
    """Prompts → sampled completions of each; those of too many tokens are dropped.

    Args:
        model: hash of the model that samples.
    """

    def __init__(self, chat: ChatTokenizer, sampler: Sampler, max_prompt_tokens: int, seed: int, model: str):
        self.chat = chat
        self.sampler = sampler
        self.model = model
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed

    def __call__(self, source: Shard) -> ShardOutput:
        rows = read_shard(Location(source.file)).to_pylist()
        counters = Counter(read=len(rows))
        encoded = [p.ids for p in self.chat.prompts([(row["prompt"], parse_tools(row["tools"])) for row in rows])]
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= self.max_prompt_tokens]
        counters["prompt_too_long"] = len(rows) - len(kept)
        # Seeds belong to prompts, so that a shard made again is the same.
        seeds = [(self.seed + int(rows[i]["prompt_id"], 16)) % 2**63 for i in kept]
        out = []
        for i, completions in zip(kept, self.sampler.sample([encoded[i] for i in kept], seeds), strict=True):
            counters["completions"] += len(completions)
            counters["tokens"] += sum(len(c.token_ids) for c in completions)
            counters["truncated_samples"] += sum(c.finish_reason == "length" for c in completions)
            out.append({**rows[i], "completions": [c.row(self.model) for c in completions]})
        return ShardOutput(pa.Table.from_pylist(out, schema=CANDIDATES), counters)
