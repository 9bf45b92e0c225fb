"""Candidates: prompts in, sampled completions out."""

from __future__ import annotations

from dpo_ray.config import Config, Model, Sampling
from dpo_ray.model.folders import weights_hash
from dpo_ray.model.resolve import resolve
from dpo_ray.model.tokenizer_files import tokenizer_hash
from dpo_ray.on_ray.pool import shard_stage, shard_tasks
from dpo_ray.on_ray.vllm_engine import GenerateShard, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location


def sample_completions(
    output: Location, config: Config, model: Model, sampling: Sampling, prompts: Artifact
) -> tuple[Artifact, bool]:
    """Sampled completions of each prompt by a model."""
    version = require_vllm("Generating completions")
    folder = resolve(model.path, model.revision)
    identity = {
        "weights": weights_hash(folder),
        "tokenizer": tokenizer_hash(folder),
        "sampling": sampling.model_dump(mode="json"),
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "engine_version": version,
        "seed": config.run.seed,
    }
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
        identity=identity,
        inputs={"prompts": prompts.fingerprint},
        tasks=shard_tasks(prompts),
        pool=vllm_pool(config, GenerateShard, arguments),
        unit="prompts",
    )
