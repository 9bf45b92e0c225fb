"""Candidates: prompts in, sampled completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo_ray.config import VLLM, Config, Model, Sampling
from dpo_ray.data.chat import ChatTokenizer, require_chat_template
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import ShardTask, rows_pool, shard_stage, shard_tasks
from dpo_ray.on_ray.vllm_engine import VLLMSampler, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.shards.generate import Ask, GenerateShard, identity
from dpo_ray.shards.merge import MergeShard, OfModels
from dpo_ray.shards.merge import identity as merge_identity
from dpo_ray.storage.artifact import Artifact, digest
from dpo_ray.storage.location import Location

# Sequences that an engine is given at once, for each that it runs side by side: it ends with few of them one time in so
# many, and who kills it loses no more than these.
_ROUNDS_AT_ONCE = 8


def sample_completions(
    output: Location, config: Config, model: Model, sampling: Sampling, asks: Sequence[Ask], prompts: Artifact
) -> tuple[Artifact, bool]:
    """Sampled completions of each prompt by a model, which is asked in one way or in several."""
    version = require_vllm("Generating completions")
    folder = ModelFolder.of(model)
    tasks = shard_tasks(prompts)
    arguments: dict[str, Any] = {
        "model": model,
        "sampling": sampling,
        "asks": tuple(asks),
        "options": config.vllm,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "seed": config.run.seed,
        "weights": folder.weights_hash(),
    }
    return shard_stage(
        output,
        "candidates",
        identity=identity(
            arguments["weights"],
            folder.tokenizer_hash(),
            sampling,
            asks,
            max_prompt_tokens=config.data.max_prompt_tokens,
            engine_version=version,
            seed=config.run.seed,
        ),
        inputs={"prompts": prompts.fingerprint},
        tasks=tasks,
        pool=replace(vllm_pool(config, vllm_generate_shard, arguments), together=_together(config, asks, tasks)),
        unit="prompts",
    )


def _together(config: Config, asks: Sequence[Ask], tasks: list[ShardTask[Any]]) -> int:
    """Shards that an engine is given at once."""
    largest = max((task.rows for task in tasks), default=0) * sum(ask.samples for ask in asks)
    return max(2, _ROUNDS_AT_ONCE * config.vllm.max_num_seqs // max(1, largest))


def merge_candidates(output: Location, config: Config, of_models: Sequence[Artifact]) -> tuple[Artifact, bool]:
    """The candidates of several models for the same prompts, a row for each prompt."""
    tasks = [
        ShardTask(
            source=OfModels(tuple(task.source.file for task in of_shard)),
            content=digest([task.content for task in of_shard]),
            rows=of_shard[0].rows,
        )
        for of_shard in zip(*map(shard_tasks, of_models), strict=True)
    ]
    return shard_stage(
        output,
        "merged_candidates",
        identity=merge_identity(),
        inputs={f"candidates/{n}": artifact.fingerprint for n, artifact in enumerate(of_models)},
        tasks=tasks,
        pool=rows_pool(config, MergeShard, {}),
        unit="prompts",
    )


def vllm_generate_shard(
    model: Model,
    sampling: Sampling,
    asks: Sequence[Ask],
    options: VLLM,
    max_prompt_tokens: int,
    seed: int,
    weights: str,
) -> GenerateShard:
    """The worker of this stage, with vLLM. weights: what the driver knows the model by."""
    folder = ModelFolder.of(model)
    tokenizer = folder.tokenizer()
    require_chat_template(tokenizer, model.path)
    chat = ChatTokenizer(tokenizer, folder.template_arguments)
    sampler = VLLMSampler(model, sampling, options, max_prompt_tokens)
    return GenerateShard(chat, sampler, asks, max_prompt_tokens, seed, weights)
