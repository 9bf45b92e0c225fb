"""Prompts → candidates sampled by vLLM → scored → pairs; and the prompts that the win rate is measured on."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from dpo_ray.config import Generate, Model, Sampling
from dpo_ray.data.prompts import prompt_table, read_prompts
from dpo_ray.errors import DataError
from dpo_ray.on_ray.generate import sample_completions
from dpo_ray.on_ray.pool import Pool, shard_stage, shard_tasks
from dpo_ray.pairs import PROMPTS, steers
from dpo_ray.shards.pair import PairShard, identity
from dpo_ray.storage.artifact import Artifact, Contents, digest, make, read_shard, write_shard
from dpo_ray.storage.location import Location
from pipelines.context import RunContext


def generate(context: RunContext) -> Artifact:
    """The pairs made of the base model's own completions. Raises DataError where there is no usable prompt or pair."""
    config = context.config
    options = config.generate
    assert options is not None
    sides = read_prompts(options.prompts, config.data.held_out_fraction, config.run.seed)
    # Shards of one side only: the held-out candidates then serve the win rate without being drawn again.
    tables = [t for side in ("train", "eval") for t in _tables(sides[side], options.prompts_per_shard)]
    prompts = publish_prompts(context.output, tables)
    candidates = context.stage("generate", lambda: sample(context, config.model, options.sampling, prompts))
    return context.stage("pair", lambda: _pair(context, options, candidates))


def sample(context: RunContext, model: Model, sampling: Sampling, prompts: Artifact) -> tuple[Artifact, bool]:
    """Sampled completions of each prompt by a model."""
    return sample_completions(context.output, context.config, model, sampling, prompts)


def held_out_prompts(context: RunContext, pairs: Artifact, max_prompts: int) -> Artifact:
    """The prompts of the win rate: the held-out ones, of generate.prompts or else of the pairs.

    Not those that training was steered by, where train.eval_fraction tells them apart.
    """
    config = context.config
    fraction = config.train.eval_fraction

    def judges(row: dict[str, Any]) -> bool:
        return row["split"] == "eval" and (fraction == 1 or not steers(row["prompt_id"], fraction))

    if config.generate is not None:
        sides = read_prompts(config.generate.prompts, config.data.held_out_fraction, config.run.seed)
        held_out = list(filter(judges, sides["eval"]))[:max_prompts]
        return publish_prompts(context.output, _tables(held_out, config.generate.prompts_per_shard))
    rows: dict[str, dict[str, Any]] = {}
    for shard in pairs.shards():
        table = read_shard(shard, columns=PROMPTS.names)
        rows |= {row["prompt_id"]: row for row in table.to_pylist() if judges(row)}
        rows = {key: rows[key] for key in sorted(rows)[:max_prompts]}
    return publish_prompts(context.output, _tables(list(rows.values()), config.data.rows_per_shard))


def publish_prompts(output: Location, tables: list[pa.Table]) -> Artifact:
    """Prompts as an artifact, a table a shard. Raises DataError where there is none."""
    if not tables:
        raise DataError("There is no held-out prompt: raise data.held_out_fraction, or leave evaluate.win_rate out.")
    content = [digest(table.to_pylist()) for table in tables]

    def write(location: Location) -> Contents:
        named = zip(content, tables, strict=True)
        return Contents(files=[write_shard(location / f"{name}.parquet", table, {}) for name, table in named])

    return make(output, "prompts", {"shards": content}, {}, write)[0]


def _tables(rows: list[dict[str, Any]], rows_per_shard: int) -> list[pa.Table]:
    return [prompt_table(rows[i : i + rows_per_shard]) for i in range(0, len(rows), rows_per_shard)]


def _pair(context: RunContext, options: Generate, candidates: Artifact) -> tuple[Artifact, bool]:
    covered = identity(options)
    arguments = {name: covered[name] for name in ("reward", "reward_source", "min_score_gap", "pairs_per_prompt")}
    artifact, reused = shard_stage(
        context.output,
        "pairs",
        identity=covered,
        inputs={"candidates": candidates.fingerprint},
        tasks=shard_tasks(candidates),
        pool=Pool(PairShard, arguments),
        unit="prompts",
    )
    if artifact.manifest.rows == 0:
        raise DataError(
            f"The candidates of {artifact.manifest.counters['read']} prompts made no pair: under the reward "
            f"{options.reward} none differ by generate.min_score_gap={options.min_score_gap:g}. Draw more samples, "
            "raise the temperature, or look at what the reward gives."
        )
    return artifact, reused
