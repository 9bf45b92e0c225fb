"""TRL's side: one configuration of a sweep in a process of its own, in the environment of requirements-trl.txt.

    python -m benchmarks.sweep.trl --model <folder> --pairs <train.parquet> --held-out <eval.parquet> --cache <folder>
        --beta 0.1 --learning-rate 5e-6 [--reuse-reference]

prints a line of JSON at its end. All configurations of a sweep are given the same --cache.

TRL 1.16 caches the reference log-probs beside the data set, under a hash of the weights and the data set's fingerprint.
That fingerprint depends on every option of the trainer, β and the learning rate too: the filter that drops prompts
longer than `max_length` refers to the whole DPOConfig, and datasets hashes what a function refers to. So each
configuration scores the reference anew. With --reuse-reference there is no such filter, as `max_length=None` has none,
and a second configuration finds the first one's scores; the same pairs are dropped and cut by what stands here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import dpo_config
from benchmarks.speed.clock import Clock

PAIRS_PER_STEP = 16
MAX_TOKENS = 512 + 256
"""Of a prompt with its completion: TRL has no limit for either alone."""


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser("python -m benchmarks.sweep.trl", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--pairs", type=Path, required=True, help="Parquet: prompt, chosen, rejected, all messages")
    parser.add_argument("--held-out", type=Path, required=True, help="the same, to evaluate on at the end")
    parser.add_argument("--cache", type=Path, required=True, help="folder of datasets' cache")
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--batch-size", type=int, default=4, help="of a forward; default 4")
    parser.add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP, help="accumulated; default 16")
    parser.add_argument("--steps", type=int, default=-1, help="end after so many; default: one epoch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--reuse-reference", action="store_true", help="options under which TRL finds its own cache")
    arguments = parser.parse_args()
    if arguments.pairs_per_step % arguments.batch_size:
        sys.exit(f"--batch-size {arguments.batch_size} does not divide --pairs-per-step {arguments.pairs_per_step}.")

    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    found = run(arguments)
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    times = {"wall": time.perf_counter() - began, "cpu": sum(use.ru_utime + use.ru_stime for use in spent)}
    print(json.dumps({**times, **found}), flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; what is printed of it, but the process's own times."""
    import torch
    from transformers import AutoTokenizer, PrinterCallback
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    torch.set_num_threads(arguments.threads)
    clock = Clock()
    passes: list[dict[str, float]] = []
    batches = 0

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, *given: Any, **options: Any) -> Any:
            clock.start()
            scored = super()._precompute_ref_logps(*given, **options)
            passes.append(clock.stop())
            return scored

        def compute_ref_log_probs(self, *given: Any, **options: Any) -> Any:
            nonlocal batches
            batches += 1
            return super().compute_ref_log_probs(*given, **options)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, held_out = (pairs_of(path, arguments.cache) for path in (arguments.pairs, arguments.held_out))
    options, collator = config_of(arguments), None
    if arguments.reuse_reference:
        limit = {"tokenizer": tokenizer, "max_tokens": MAX_TOKENS}
        train, held_out = (pairs.filter(has_room, fn_kwargs=limit) for pairs in (train, held_out))
        collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=MAX_TOKENS)
    else:
        options.max_length = MAX_TOKENS
    trainer = Trainer(
        model=arguments.model,
        args=options,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "reference": {name: sum(p[name] for p in passes) for name in ("wall", "cpu")},
        "reference_batches": batches,
        "eval_accuracy": metrics["eval_rewards/accuracies"],
        "eval_margin": metrics["eval_rewards/margins"],
        "eval_loss": metrics["eval_loss"],
        "pairs": len(trainer.train_dataset),
        "held_out": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "beta": arguments.beta,
        "learning_rate": arguments.learning_rate,
        "reuse_reference": arguments.reuse_reference,
    }


def config_of(arguments: argparse.Namespace) -> Any:
    """The options of the speed benchmark's fair row; no maximum length yet."""
    options = dpo_config(
        arguments.cache / "trainer",
        loss_type=["sigmoid"],
        beta=arguments.beta,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.pairs_per_step // arguments.batch_size,
        num_train_epochs=1,
        max_steps=arguments.steps,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
    )
    options.learning_rate = arguments.learning_rate
    return options


def pairs_of(path: Path, cache: Path) -> Any:
    """On disk: the scores of a data set that lives in memory go to a temporary folder, and no other run finds them."""
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(cache))


def has_room(row: dict[str, Any], tokenizer: Any, max_tokens: int) -> bool:
    """Whether the prompt leaves room for a completion: TRL's filter, which refers to nothing but its arguments."""
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    return len(ids) < max_tokens


if __name__ == "__main__":
    main()
