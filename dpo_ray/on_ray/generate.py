"""Candidates: prompts in, sampled completions out."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_ray.config import VLLM, Config, Model, Sampling
from dpo_ray.data.chat import ChatTokenizer, require_chat_template
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage, shard_tasks
from dpo_ray.on_ray.vllm_engine import VLLMSampler, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.shards.generate import GenerateShard, identity
from dpo_ray.shards.merge import MergeShard, OfModels
from dpo_ray.shards.merge import identity as merge_identity
from dpo_ray.storage.artifact import Artifact, digest
from dpo_ray.storage.location import Location


def sample_completions(
    output: Location, config: Config, model: Model, sampling: Sampling, prompts: Artifact
) -> tuple[Artifact, bool]:
    """Sampled completions of each prompt by a model."""
    version = require_vllm("Generating completions")
    folder = ModelFolder.of(model)
    arguments = {
        "model": model,
        "sampling": sampling,
        "options": config.vllm,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "seed": config.run.seed,
    }
    return shard_stage(
        output,
        "candidates",
        identity=identity(
            folder.weights_hash(),
            folder.tokenizer_hash(),
            sampling,
            max_prompt_tokens=config.data.max_prompt_tokens,
            engine_version=version,
            seed=config.run.seed,
        ),
        inputs={"prompts": prompts.fingerprint},
        tasks=shard_tasks(prompts),
        pool=vllm_pool(config, vllm_generate_shard, arguments),
        unit="prompts",
    )


def merge_candidates(output: Location, of_models: Sequence[Artifact]) -> tuple[Artifact, bool]:
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
        pool=Pool(MergeShard, {}, stateless=True),
        unit="prompts",
    )


def vllm_generate_shard(
    model: Model, sampling: Sampling, options: VLLM, max_prompt_tokens: int, seed: int
) -> GenerateShard:
    """The worker of this stage, with vLLM."""
    folder = ModelFolder.of(model)
    tokenizer = folder.tokenizer()
    require_chat_template(tokenizer, model.path)
    chat = ChatTokenizer(tokenizer, folder.template_arguments)
    sampler = VLLMSampler(model, sampling, options, max_prompt_tokens)
    return GenerateShard(chat, sampler, max_prompt_tokens, seed, folder.weights_hash())
