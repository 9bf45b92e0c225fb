"""Canonical pairs → token ids."""

from __future__ import annotations

from dpo_ray.data.tally import NOTED, Tally
from dpo_ray.errors import DataError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import rows_pool, shard_stage
from dpo_ray.progress import say
from dpo_ray.shards.tokenize import TokenizeShard, identity
from dpo_ray.storage.artifact import Artifact
from pipelines.context import RunContext
from pipelines.deduplicate import kept_tasks


def tokenize(context: RunContext, pairs: Artifact, left_out: Artifact) -> Artifact:
    """The pairs as token ids, within the length limits. Raises DataError where none is left.

    left_out: what pipelines.deduplicate made of the pairs.
    """
    return context.stage("tokenize", lambda: _tokenize(context, pairs, left_out))


def _tokenize(context: RunContext, pairs: Artifact, left_out: Artifact) -> tuple[Artifact, bool]:
    model, data = context.config.model, context.config.data
    artifact, reused = shard_stage(
        context.output,
        "tokenized",
        identity=identity(ModelFolder.of(model).tokenizer_hash(), data),
        inputs={"pairs": pairs.fingerprint, "duplicates": left_out.fingerprint},
        tasks=kept_tasks(pairs, left_out),
        pool=rows_pool(context.config, TokenizeShard, {"model": model, "data": data}, stateless=False),
        unit="pairs",
    )
    tally = Tally.of(artifact.manifest.counters)
    if not tally.kept:
        dropped = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.items())
        raise DataError(
            f"No pair fits data.max_prompt_tokens={data.max_prompt_tokens} and data.max_completion_tokens="
            f"{data.max_completion_tokens} (dropped: {dropped}). Raise these limits, or have what is longer cut "
            "(data.long_prompts, data.long_completions)."
        )
    if not reused:
        for name, count in tally.noted.items():
            say("tokenize", f"{name}, {count} of {tally.kept} pairs: {NOTED[name]}")
    return artifact, reused
