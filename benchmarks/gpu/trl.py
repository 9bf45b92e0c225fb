"""TRL's own trainer on the same pairs, where it is installed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.scale import Scale, write_model
from benchmarks.gpu.steps import pairs_of
from benchmarks.side_by_side import dpo_config, token_ids_trainer
from benchmarks.speed.clock import Clock
from benchmarks.speed.pairs import real_tokens


def steps(scale: Scale, folder: Path) -> list[dict[str, Any]]:
    """Steps of the large model in bfloat16, with reference log-probs computed before. A row."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    model = write_model(folder / "large", scale.large)
    size, num_steps = scale.pairs_per_step, scale.steps + 2
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = pairs_of(scale, size * num_steps, scale.large["vocab_size"])
    rows = [{name: getattr(pair, name) for name in names} for pair in pairs]
    clock, seconds = Clock(), []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(clock.stop()["wall"])

    on_gpu = scale.device.type == "cuda"
    trainer = token_ids_trainer()(
        model=str(model),
        args=dpo_config(
            folder / "trl",
            loss_type=["sigmoid"],
            beta=0.1,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=scale.pairs_per_microbatch,
            gradient_accumulation_steps=size // scale.pairs_per_microbatch,
            max_steps=num_steps,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not on_gpu,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    took = seconds[2:]
    return [
        {
            "step": "TRL",
            "tokens/s": real_tokens(rows[2 * size :]) / sum(took),
            "median s a step": statistics.median(took),
            "first step, s": seconds[0],
            "peak, GiB": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        }
    ]


def _tokenizer() -> Any:
    """One word and a padding: the pairs have ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"0": 0, "1": 1, "2": 2}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2")
