"""The options of transformers' Trainer, which other trainers have too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pipelines.foreign.reading import OFF, Reading

_METRICS = {name: f"eval_{name}" for name in ("loss", "rewards/accuracies", "rewards/margins")}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_IN_8_BITS = frozenset({"adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"})
_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"}

TRACKERS = "trackers are named in the section track: tensorboard (on unless it is told otherwise), mlflow, wandb"
LOST = {
    "there is no such option here": (
        "average_tokens_across_devices batch_eval_metrics data_seed eval_delay eval_on_start full_determinism "
        "hub_always_push hub_strategy include_for_metrics "
        "label_smoothing_factor neftune_noise_alpha optim_args optim_target_modules prediction_loss_only "
        "resume_from_checkpoint save_only_model restore_callback_states_from_checkpoint ignore_data_skip "
        "enable_jit_checkpoint parallelism_config accelerator_config"
    ),
    "a published model goes to the hub by publish.push_to_hub: {repo_id, private, revision}, with HF_TOKEN's token": (
        "push_to_hub hub_model_id hub_private_repo hub_revision hub_model_revision hub_token"
    ),
    "set train.activation_offload, which goes with train.activation_checkpointing on a GPU": "activation_offloading",
    TRACKERS: ("report_to project trackio_space_id trackio_bucket_id trackio_static_space_id logging_dir"),
    "training lasts train.epochs": "max_steps",
    "pairs are ordered by a seeded permutation": "train_sampling_strategy",
}
MEANINGLESS = {
    "a command says what is done": "do_train do_eval do_predict overwrite_output_dir",
    "micro-batches are packed by tokens (train.tokens_per_microbatch)": (
        "per_device_eval_batch_size auto_find_batch_size eval_accumulation_steps group_by_length length_column_name "
        "pad_to_multiple_of dataloader_drop_last torch_empty_cache_steps"
    ),
    "Ray Data carries the rows": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order dataset_num_proc dataset_streaming "
        "preprocessing_num_workers remove_unused_columns label_names preprocessing_batch_size streaming buffer_size"
    ),
    "the trainer has its own forward and its own processes": (
        "attn_implementation use_liger_kernel liger_kernel_config enable_liger_kernel use_cache use_kv_cache "
        "gradient_checkpointing_kwargs ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_timeout "
        "ddp_find_unused_parameters ddp_static_graph local_rank fsdp_config torch_compile_backend torch_compile_mode "
        "tf32 bf16_full_eval fp16_full_eval ignore_bias_buffers save_on_each_node "
        "eval_use_gather_object eval_do_concat_batches low_cpu_mem_usage use_fast_tokenizer"
    ),
    "it is about what is printed": (
        "log_level log_level_replica logging_strategy logging_first_step logging_nan_inf_filter log_on_each_node "
        "disable_tqdm skip_memory_metrics include_num_input_tokens_seen debug plot_loss print_param_status"
    ),
    "it follows from the metric": "greater_is_better",
}


@dataclass(frozen=True)
class Defaults:
    """Where trainers that are built on it differ."""

    learning_rate: float
    activation_checkpointing: bool


def read_trainer(reading: Reading, defaults: Defaults, devices: int | None) -> None:
    """Everything that is no trainer's own. devices: that they train on; None: nobody said."""
    _run(reading)
    _batch(reading, devices)
    _optimizer(reading, defaults)
    _steps(reading)
    _steering(reading)
    if reading.has("torch_compile"):
        on_gpu = bool(reading.value("torch_compile")) and not reading.value("use_cpu")
        reading.carry("torch_compile", "train.compile", on_gpu)
    reading.by_table(LOST, MEANINGLESS)


def precision(reading: Reading, dtype_key: str, *, bf16: bool | None) -> None:
    """model.dtype. bf16: what the option is where it is not given; None: as the model's files."""
    half = reading.value("fp16", False)
    mixed = reading.value("bf16", bf16 if not half else False)
    stored = str(reading.value(dtype_key, "auto")).removeprefix("torch.")
    chosen = "bfloat16" if mixed or half or stored != "float32" else "float32"
    reading.set("model.dtype", chosen)
    if half:
        reading.lost["fp16"] = "float16 is not computed in here; model.dtype is bfloat16, whose weights stay in float32"
    elif "fp16" in reading.given:
        reading.meaningless["fp16"] = "it is off"
    if "bf16" in reading.given:
        reading.carried["bf16"] = "model.dtype: layers compute in it, weights, gradients and optimizer stay in float32"
    elif not half:
        reading.decided.append(f"model.dtype={chosen}: bf16 is not given")
    if reading.has(dtype_key) and stored in {chosen, "auto"}:
        reading.carried[dtype_key] = "model.dtype"
    elif reading.has(dtype_key):
        reading.lost[dtype_key] = f"weights are kept in float32, and layers compute in model.dtype={chosen}"
    else:
        reading.ignore(dtype_key, "it is not given")


def lengths(reading: Reading, total_key: str, total: int | None, *, drop_prompts: bool, cut: str) -> None:
    """Their limit on prompt and answer together → ours on each.

    Args:
        drop_prompts: whether a prompt that fills it all is dropped there.
        cut: which end of a prompt they keep.
    """
    prompt, completion = reading.value("max_prompt_length"), reading.value("max_completion_length")
    both = [key for key in ("max_prompt_length", "max_completion_length") if key in reading.given]
    if total is None and prompt is None and completion is None:
        reading.decided.append(
            "data.max_prompt_tokens and data.max_completion_tokens are ours: there is no limit there, and longer "
            "ones are "
            "dropped here"
        )
        reading.ignore(total_key, "there is no limit there")
        for key in both:
            reading.ignore(key, "there is no limit there")
        return
    if prompt is None:
        prompt = total - completion if total is not None and completion is not None else (total or 2048) // 2
    if completion is None:
        completion = max(1, (total or 2 * prompt) - prompt)
    reading.set("data.max_prompt_tokens", int(prompt))
    reading.set("data.max_completion_tokens", int(completion))
    reading.set("data.long_prompts", "drop" if drop_prompts else cut)
    reading.set("data.long_completions", "cut")
    for key in both:
        reading.carried[key] = "data.max_prompt_tokens" if "prompt" in key else "data.max_completion_tokens"
    note = (
        f"of prompt and answer together {total if total is not None else 'any number of'} tokens there; here each "
        "has a "
        f"limit: data.max_prompt_tokens={int(prompt)}, data.max_completion_tokens={int(completion)}. `dpo-ray init` "
        "measures your data"
    )
    if reading.has(total_key):
        reading.carried[total_key] = f"data.max_prompt_tokens, data.max_completion_tokens: {note}"
    else:
        reading.decided.append(f"{total_key} is not given: {note}")
        reading.ignore(total_key, "there is no limit there")


def lora(reading: Reading, rank: tuple[str, int], alpha: tuple[str, float], targets: Any, target_key: str) -> None:
    """model.lora.

    Args:
        rank: the option and its default.
        alpha: the same.
        targets: names of layers, or all-linear.
    """
    size = int(reading.number(*rank))
    scale = reading.number(*alpha)
    reading.carry(rank[0], "model.lora.rank", size)
    if reading.value("use_rslora"):
        reading.carried["use_rslora"] = "model.lora.alpha, times √rank, as ours is divided by the rank"
        scale *= size**0.5
    reading.carry(alpha[0], "model.lora.alpha", scale)
    reading.carry(target_key, "model.lora.target_modules", targets)
    reading.lose("lora_dropout", "dropout is off in training here")


def quantization(reading: Reading, key: str, kind: str) -> None:
    """model.lora.quantization, by an option that asks for it."""
    reading.carry(key, "model.lora.quantization", kind)
    reading.set("reference.engine", "torch")
    reading.decided.append("reference.engine=torch: the trainer's own forward alone computes with quantized weights")


def _run(reading: Reading) -> None:
    output = str(reading.value("output_dir", "out/imported"))
    reading.carry("output_dir", "run.output", output)
    name = str(reading.value("run_name", PurePath(output).name))
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:63] or "imported"
    reading.set("run.name", cleaned)
    if reading.has("run_name"):
        reading.carried["run_name"] = "run.name"
    reading.ignore("run_name", "it is not given")
    reading.carry("seed", "run.seed", int(reading.number("seed", 42)))


def _batch(reading: Reading, devices: int | None) -> None:
    each, steps = (
        int(reading.number("per_device_train_batch_size", 8)),
        int(reading.number("gradient_accumulation_steps", 1)),
    )
    number = devices or 1
    told = f"{each} a device × {steps} accumulated × {number} device{'s' if number > 1 else ''}"
    if devices is None:
        told += ", which is assumed: how many there are is not said there; say --devices"
    reading.set("train.global_batch_size", max(each * steps * number, number))
    reading.set("train.num_workers", number)
    reading.decided.append(f"train.global_batch_size={each * steps * number}: {told}")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if reading.has(key):
            reading.carried[key] = "train.global_batch_size"
    on_gpu = not reading.value("use_cpu", False)
    reading.carry("use_cpu", "train.use_gpu", on_gpu)
    if on_gpu:
        reading.set("vllm.num_actors", number)
        reading.set("vllm.gpus_per_actor", 1)
    for key in ("deepspeed", "fsdp"):
        if key not in reading.given:
            continue
        if any(reading.given[key] == off for off in OFF):
            reading.ignore(key, "it is off")
        elif number == 1:
            reading.ignore(key, "one device holds the whole model")
        else:
            reading.carry(key, "train.strategy", "fsdp", "FSDP2, which shards weights, gradients and optimizer")


def _optimizer(reading: Reading, defaults: Defaults) -> None:
    reading.carry("learning_rate", "train.learning_rate", reading.number("learning_rate", defaults.learning_rate))
    named = str(reading.value("lr_scheduler_type", "linear"))
    if named in _SCHEDULES:
        reading.carry("lr_scheduler_type", "train.schedule", _SCHEDULES[named])
        reading.lose("lr_scheduler_kwargs", "a schedule has no options here")
    else:
        nearest = "cosine" if "cosine" in named else "linear"
        reading.set("train.schedule", nearest)
        reading.lost["lr_scheduler_type"] = f"train.schedule is {nearest}, which ends at 0; there is no {named} here"
        reading.lose("lr_scheduler_kwargs", "a schedule has no options here")
    _warmup(reading, named)
    optimizer = str(reading.value("optim", "adamw_torch_fused"))
    if optimizer in _OPTIMIZERS:
        reading.ignore("optim", "it is AdamW, as here")
    elif optimizer in _IN_8_BITS:
        reading.carry("optim", "train.optimizer", "adamw_8bit")
    else:
        reading.lose("optim", "the optimizer is AdamW here, in the forms of train.optimizer")
    for key, ours in {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}.items():
        if reading.number(key, ours) == ours:
            reading.ignore(key, "it is the same here")
        else:
            reading.lose(key, f"it is {ours:g} here")
    reading.carry("weight_decay", "train.weight_decay", reading.number("weight_decay", 0.0))
    norm = reading.number("max_grad_norm", 1.0)
    if norm > 0:
        reading.carry("max_grad_norm", "train.max_grad_norm", norm)
    else:
        reading.lost["max_grad_norm"] = "gradients are always clipped here, to a norm of train.max_grad_norm=1"
    epochs = reading.number("num_train_epochs", 3.0)
    if epochs >= 1 and epochs == int(epochs):
        reading.carry("num_train_epochs", "train.epochs", int(epochs))
    else:
        reading.set("train.epochs", max(1, int(epochs)))
        reading.lost["num_train_epochs"] = f"epochs are whole here: train.epochs={max(1, int(epochs))}"
    if reading.has("disable_gradient_checkpointing"):
        again = not reading.value("disable_gradient_checkpointing")
        reading.carry("disable_gradient_checkpointing", "train.activation_checkpointing", again)
        reading.ignore("gradient_checkpointing", "disable_gradient_checkpointing says it")
    else:
        again = bool(reading.value("gradient_checkpointing", defaults.activation_checkpointing))
        reading.carry("gradient_checkpointing", "train.activation_checkpointing", again)


def _warmup(reading: Reading, schedule: str) -> None:
    ratio, steps = reading.number("warmup_ratio", 0.0), reading.number("warmup_steps", 0.0)
    fraction = ratio if steps == 0 else steps if steps < 1 else 0.0
    reading.set("train.warmup_fraction", 0.0 if schedule == "constant" else fraction)
    if schedule == "constant":
        for key in ("warmup_ratio", "warmup_steps"):
            reading.ignore(key, "lr_scheduler_type=constant has no warm-up there")
        return
    if steps >= 1:
        reading.lost["warmup_steps"] = "a warm-up is a share of the steps here: set train.warmup_fraction"
        reading.ignore("warmup_ratio", "warmup_steps stands for it")
        return
    for key in ("warmup_ratio", "warmup_steps"):
        if key in reading.given:
            reading.carried[key] = "train.warmup_fraction"
    if not reading.has("warmup_ratio") and not reading.has("warmup_steps"):
        reading.decided.append("train.warmup_fraction=0.0: no warm-up is given, and there is none there then")


def _steps(reading: Reading) -> None:
    log = reading.number("logging_steps", 10)
    if log >= 1:
        reading.carry("logging_steps", "train.log_every_steps", int(log))
    else:
        reading.lose("logging_steps", "a number of steps is asked for here: train.log_every_steps")
    strategy = str(reading.value("save_strategy", "steps"))
    every = reading.number("save_steps", 500)
    if strategy in {"steps", "SaveStrategy.STEPS"} and every >= 1:
        reading.carry("save_steps", "train.checkpoint_every_steps", int(every))
        reading.ignore("save_strategy", "by steps, as here")
    else:
        reading.lose("save_strategy", "checkpoints are by steps here: train.checkpoint_every_steps")
        if "save_strategy" in reading.meaningless:
            reading.meaningless["save_strategy"] = "checkpoints are written here for what a kill costs"
        reading.lose("save_steps", "a number of steps is asked for here: train.checkpoint_every_steps")
    if reading.has("save_total_limit"):
        reading.carry("save_total_limit", "train.keep_checkpoints", max(1, int(reading.number("save_total_limit", 2))))
    reading.ignore("save_total_limit", "it is not given")


def evaluates(reading: Reading) -> bool:
    """Whether they evaluate on held-out data while they train."""
    return str(_strategy(reading)[1]) not in {"no", "False", "None"}


def _strategy(reading: Reading) -> tuple[str, Any]:
    key = "evaluation_strategy" if "evaluation_strategy" in reading.given else "eval_strategy"
    # YAML 1.1 takes a bare no for false.
    return key, reading.value(key, "no")


def _steering(reading: Reading) -> None:
    key, strategy = _strategy(reading)
    every = reading.number("eval_steps", reading.number("logging_steps", 10))
    if str(strategy) == "steps" and every >= 1:
        reading.set("train.eval_every_steps", int(every))
        for one in (key, "eval_steps"):
            if one in reading.given:
                reading.carried[one] = "train.eval_every_steps"
    elif evaluates(reading):
        reading.lose(key, "evaluations are by steps here: set train.eval_every_steps")
        reading.lose("eval_steps", "a number of steps is asked for here: train.eval_every_steps")
    else:
        reading.ignore(key, "it is off; held-out pairs are measured at the end")
        reading.ignore("eval_steps", "there are no evaluations while it trains")
    measured = "eval_every_steps" in reading.tree["train"]
    best = str(reading.value("metric_for_best_model", "loss")).removeprefix("eval_")
    if reading.value("load_best_model_at_end") and measured and best in _METRICS:
        reading.carry("load_best_model_at_end", "train.keep_best", _METRICS[best])
        if reading.has("metric_for_best_model"):
            reading.carried["metric_for_best_model"] = "train.keep_best"
    else:
        reading.lose("load_best_model_at_end", f"train.keep_best is one of {', '.join(_METRICS.values())}, by steps")
        reading.ignore("metric_for_best_model", "no best model is kept")
