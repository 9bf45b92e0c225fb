"""TRL's side, in the environment of requirements-trl.txt."""

from __future__ import annotations

import json
import math
from typing import Any

from benchmarks.record import TRL_PACKAGES, Rows, read_lines, write_json
from benchmarks.side_by_side import dpo_config, token_ids_trainer
from benchmarks.speed.clock import Clock, device, machine_load
from benchmarks.speed.inputs import model_of
from benchmarks.speed.pairs import by_length, middle, real_tokens, repeated
from benchmarks.speed.runs import BETA, DEFAULT, TUNED, Place, Setting, kept_steps, speed, write_run


def run_trl(place: Place, setting: Setting, row: str, repeat: int) -> None:
    """A run of one of TRL's rows, kept."""
    load = machine_load()
    rows, size = read_lines(place.pairs), setting.pairs_per_step
    if row == TUNED:
        batch_size = json.loads(place.probe.read_text())["batch_size"]
        warm_up, measured = _tuned_pairs(rows, setting)
    else:
        batch_size, warm_up, measured = size, rows[:size], rows[size:]
    default = row == DEFAULT
    trained = _train_trl(place, setting, warm_up, measured, batch_size, checkpointing=default, precompute=not default)
    write_run(place.run(row, repeat), load, TRL_PACKAGES, {"batch_size": batch_size, **trained})


def probe(place: Place, setting: Setting) -> None:
    """Find TRL's fastest batch size, on two batches of the largest size from the middle of the pairs by length."""
    warm_up, measured = _tuned_pairs(read_lines(place.pairs), setting)
    sample = middle(measured, 2 * max(setting.trl_batch_sizes))
    rates = {}
    for size in setting.trl_batch_sizes:
        run = _train_trl(place, setting, warm_up, sample, size, checkpointing=False, precompute=True)
        rates[size] = speed(run).tokens_per_second
    write_json(place.probe, {"batch_size": max(rates, key=lambda size: rates[size]), "tokens_per_second": rates})


def _tuned_pairs(rows: Rows, setting: Setting) -> tuple[Rows, Rows]:
    """Those of the warm-up, as many as fill whole steps of every batch size, and the measured ones by length."""
    size = setting.pairs_per_step
    count = math.lcm(size, *(max(size, b) for b in setting.trl_batch_sizes))
    return repeated(rows[:size], count), by_length(rows[size:])


def _train_trl(
    place: Place,
    setting: Setting,
    warm_up: Rows,
    measured: Rows,
    batch_size: int,
    *,
    checkpointing: bool,
    precompute: bool,
) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    torch.set_num_threads(setting.threads)
    clock, reference_clock = Clock(), Clock()
    times: list[dict[str, float]] = []
    passes: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(clock.stop())

    class Trainer(token_ids_trainer()):  # type: ignore[misc]
        def compute_ref_log_probs(self, *arguments: Any, **options: Any) -> Any:
            reference_clock.start()
            found = super().compute_ref_log_probs(*arguments, **options)
            passes.append(reference_clock.stop())
            return found

    rows = warm_up + measured
    accumulated = max(1, setting.pairs_per_step // batch_size)
    size = batch_size * accumulated
    model, _ = model_of(place.folder, setting)
    trainer = Trainer(
        model=model,
        args=dpo_config(
            place.folder / "trl",
            loss_type=["sigmoid"],
            beta=BETA,
            precompute_ref_log_probs=precompute,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=math.ceil(len(rows) / size),
            gradient_checkpointing=checkpointing,
            bf16=place.dtype == "bfloat16",
            use_cpu=device() == "cpu",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    spent = {name: sum(p[name] for p in passes) for name in ("wall", "cpu")}
    return {
        # A live reference is part of the steps.
        "reference": {**spent, "pairs": len(rows), "tokens": real_tokens(rows)} if precompute else None,
        "steps": kept_steps(times, losses, rows, size, len(warm_up) // size),
    }
