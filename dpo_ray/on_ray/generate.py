"""Candidates: prompts in, sampled completions out."""

from __future__ import annotations

from dpo_ray.config import VLLM, Config, Model, Sampling
from dpo_ray.data.chat import ChatTokenizer, require_chat_template
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import shard_stage, shard_tasks
from dpo_ray.on_ray.vllm_engine import VLLMSampler, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.shards.generate import GenerateShard, identity
from dpo_ray.storage.artifact import Artifact
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


def vllm_generate_shard(
    model: Model, sampling: Sampling, options: VLLM, max_prompt_tokens: int, seed: int
) -> GenerateShard:
    """The worker of this stage, with vLLM."""
    tokenizer = ModelFolder.of(model).tokenizer()
    require_chat_template(tokenizer, model.path)
    chat = ChatTokenizer(tokenizer)
    return GenerateShard(chat, VLLMSampler(model, sampling, options, max_prompt_tokens), max_prompt_tokens, seed)
