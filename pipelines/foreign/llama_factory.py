"""LLaMA-Factory's configuration of the stages dpo and kto."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError
from pipelines.foreign import trainer
from pipelines.foreign.reading import Reading

WHOSE = "LLaMA-Factory"
_PAIRED = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
_BY_STAGE = "it is of another stage than dpo and kto"
_TRAINABLE = "all weights or LoRA adapters are trained here"

LOST = {
    "set train.optimizer=adamw_bf16 with model.dtype=bfloat16": "pure_bf16",
    "frozen weights under adapters alone are quantized here, by bitsandbytes (model.lora.quantization)": (
        "quantization_bit quantization_method quantization_type double_quantization quantization_device_map fp8 "
        "fp8_backend "
        "fp8_enable_fsdp_float8_all_gather ref_model_quantization_bit"
    ),
    "the chat template is the model's own, or the file model.chat_template": "tool_format default_system",
    "set model.template_arguments={enable_thinking: …}": "enable_thinking",
    "there is no such option here": (
        "additional_target loraplus_lr_ratio loraplus_lr_embedding use_dora pissa_init pissa_iter pissa_convert "
        "create_new_adapter resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens "
        "rope_scaling shift_attn mixture_of_depths train_from_scratch split_special_tokens train_on_prompt "
        "disable_shuffling use_dft_loss upcast_layernorm upcast_lmhead_output ref_model_adapters packing neat_packing "
        "eval_num_beams"
    ),
    _TRAINABLE: (
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules oft_rank oft_block_size oft_target "
        "module_dropout use_llama_pro"
    ),
    "the optimizer is AdamW here, in the forms of train.optimizer": (
        "use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
        "use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block "
        "badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_adam_mini use_muon"
    ),
    trainer.TRACKERS: (
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret"
    ),
    "it is of images, videos and sounds, which are not trained on here": (
        "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model"
    ),
    "tokens are read from the environment (HF_TOKEN)": "hf_hub_token ms_hub_token om_hub_token",
}
MEANINGLESS = {
    "it is of the cache of tokenized data, which is by content here": "overwrite_cache tokenized_path cache_dir",
    "the trainer has its own forward and its own processes": (
        "flash_attn use_unsloth use_unsloth_gc use_reentrant_gc use_v1_kernels use_mca"
    ),
    "inference is vLLM's": "infer_backend infer_dtype offload_folder",
    "the loss is on what the assistant says last of all, as there": "mask_history ignore_pad_token_for_loss",
    "the accuracy on held-out pairs is always measured": "compute_accuracy eval_on_each_dataset",
    "it counts what is told anyway": "include_effective_tokens_per_second",
    "Ray is connected to by RAY_ADDRESS, and files go to run.output": (
        "ray_run_name ray_storage_path ray_storage_filesystem resources_per_worker placement_strategy ray_init_kwargs "
        "master_addr master_port"
    ),
    _BY_STAGE: (
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type predict_with_generate do_sample temperature top_p top_k "
        "max_new_tokens repetition_penalty export_dir export_size export_device export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format "
        "export_hub_model_id"
    ),
}
_OWN = (
    "model_name_or_path adapter_name_or_path adapter_folder model_revision trust_remote_code stage finetuning_type "
    "lora_rank "
    "lora_alpha lora_target lora_dropout use_rslora pref_beta pref_loss pref_ftx pref_bco_weight dpo_label_smoothing "
    "simpo_gamma ld_alpha kto_chosen_weight kto_rejected_weight ref_model dataset dataset_dir eval_dataset template "
    "cutoff_len max_samples val_size mix_strategy interleave_probs moe_aux_loss_coef early_stopping_steps "
    "ray_num_workers "
    "disable_gradient_checkpointing output_dir run_name seed use_cpu fsdp deepspeed per_device_train_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps optim "
    "adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm num_train_epochs gradient_checkpointing "
    "torch_compile "
    "logging_steps save_strategy save_steps save_total_limit eval_strategy evaluation_strategy eval_steps "
    "load_best_model_at_end metric_for_best_model bf16 fp16"
)
KNOWN = frozenset(
    name
    for names in (_OWN, *LOST.values(), *MEANINGLESS.values(), *trainer.LOST.values(), *trainer.MEANINGLESS.values())
    for name in names.split()
)
"""Every option that is looked at."""


def read_llama_factory(given: Mapping[str, Any], source: str, devices: int | None, data: str | None) -> Reading:
    """What becomes of a configuration.

    Args:
        devices: that it is trained on; None: nobody said, and it is ray_num_workers, or one is assumed.
        data: data.train, whatever the file names.

    Raises ConfigError where it cannot be made one of ours, naming the option and the way out.
    """
    reading = Reading(given, source, WHOSE)
    stage = str(reading.value("stage", "sft"))
    if stage not in ("dpo", "kto"):
        raise ConfigError(f"{source}: stage={stage} learns from no preferences: name a file of the stage dpo or kto.")
    reading.carry("stage", "train.loss.type", stage)
    if devices is None and reading.has("ray_num_workers"):
        devices = int(reading.number("ray_num_workers", 1))
        reading.carried["ray_num_workers"] = "train.num_workers"
    reading.ignore("ray_num_workers", "devices are told otherwise")
    _model(reading)
    trainer.read_trainer(reading, trainer.Defaults(learning_rate=5e-5, activation_checkpointing=True), devices)
    _data(reading, data)
    trainer.lengths(
        reading, "cutoff_len", int(reading.number("cutoff_len", 2048)), drop_prompts=False, cut="keep_start"
    )
    _loss(reading, stage)
    if reading.has("moe_aux_loss_coef"):
        reading.carry("moe_aux_loss_coef", "train.router_aux_loss", reading.number("moe_aux_loss_coef", 0.0))
    reading.ignore("moe_aux_loss_coef", "it is not given")
    if reading.has("early_stopping_steps") and "eval_every_steps" in reading.tree["train"]:
        patience = int(reading.number("early_stopping_steps", 1))
        reading.carry("early_stopping_steps", "train.early_stopping.patience", patience)
    reading.lose("early_stopping_steps", "it goes by evaluations: set train.eval_every_steps and train.early_stopping")
    reading.by_table(LOST, MEANINGLESS)
    return reading


def _model(reading: Reading) -> None:
    if not reading.has("model_name_or_path"):
        raise ConfigError(f"{reading.source} names no model: add model_name_or_path.")
    path = str(reading.value("model_name_or_path"))
    reading.carry("model_name_or_path", "model.path", path)
    if reading.value("model_revision", "main") != "main":
        reading.carry("model_revision", "model.revision", str(reading.value("model_revision")))
    reading.ignore("model_revision", "main is what a hub id means anyway")
    reading.lose(
        "adapter_name_or_path",
        "an adapter is not trained on as one; model.path may name its folder, and means the base with it merged",
    )
    reading.lose("adapter_folder", "name the adapter's folder as model.path")
    if reading.value("trust_remote_code"):
        reading.carry("trust_remote_code", "model.trust_remote_code", True)
    reading.ignore("trust_remote_code", "it is off")
    if str(reading.value("ref_model", path)) == path:
        reading.ignore("ref_model", "the reference is model.path")
    else:
        reading.lose("ref_model", "the reference is model.path, the model that training begins with")
    reading.lose("template", "the chat template is the model's own; model.chat_template names a file with another one")
    trainer.precision(reading, "dtype", bf16=None)
    kind = str(reading.value("finetuning_type", "lora"))
    named = ("lora_rank", "lora_alpha", "lora_target", "lora_dropout", "use_rslora")
    if kind != "lora":
        for key in named:
            reading.ignore(key, f"finetuning_type={kind} has no adapters of LoRA")
        if kind == "full":
            reading.carried["finetuning_type"] = "model.lora, which is left out: all weights are trained"
        else:
            reading.lost["finetuning_type"] = f"{_TRAINABLE}; of this file all weights are"
        return
    rank = int(reading.number("lora_rank", 8))
    target = reading.value("lora_target", "all")
    layers = [one.strip() for one in target.split(",")] if isinstance(target, str) else list(target)
    trainer.lora(
        reading,
        ("lora_rank", 8),
        ("lora_alpha", 2.0 * rank),
        "all-linear" if layers == ["all"] else layers,
        "lora_target",
    )
    bits = {4: "nf4", 8: "int8"}.get(reading.value("quantization_bit"))
    if bits is not None and reading.value("quantization_method", "bnb") in {"bnb", "bitsandbytes"}:
        trainer.quantization(reading, "quantization_bit", bits)
        reading.ignore("quantization_method", "it is bitsandbytes, as here")
    if reading.has("finetuning_type"):
        reading.carried["finetuning_type"] = "model.lora"
    else:
        reading.decided.append("model.lora: finetuning_type is not given, and lora there")


def _data(reading: Reading, data: str | None) -> None:
    names = _names(reading.value("dataset"))
    if data is not None:
        reading.set("data.train", data)
        reading.decided.append(f"data.train={data}: as told")
        for key in ("dataset", "dataset_dir", "mix_strategy", "interleave_probs", "max_samples"):
            reading.ignore(key, "the data are named otherwise")
    elif not names:
        raise ConfigError(f"{reading.source} names no data: say what to train on with --data.")
    else:
        _sets(reading, names)
    if reading.has("eval_dataset"):
        held_out = [_file(reading, name) for name in _names(reading.value("eval_dataset"))]
        reading.carry("eval_dataset", "data.eval", held_out if len(held_out) > 1 else held_out[0])
    reading.ignore("eval_dataset", "it is not given")
    size = reading.number("val_size", 0.0)
    if 0 < size < 1 and "eval" not in reading.tree["data"]:
        reading.carry("val_size", "data.held_out_fraction", size)
    reading.lose("val_size", "a share of the prompts is held out here: data.held_out_fraction")


def _names(value: Any) -> list[str]:
    return [one.strip() for one in (value.split(",") if isinstance(value, str) else value or []) if one.strip()]


def _sets(reading: Reading, names: Sequence[str]) -> None:
    paths = [_file(reading, name) for name in names]
    rows = int(reading.number("max_samples", 0)) or None
    shares = [float(one) for one in _names(reading.value("interleave_probs"))] or [1.0] * len(names)
    if len(shares) != len(names):
        raise ConfigError(
            f"{reading.source}: interleave_probs has {len(shares)} numbers for {len(names)} data sets: give each its "
            "own."
        )
    interleaved = str(reading.value("mix_strategy", "concat")).startswith("interleave") and len(names) > 1
    if rows is None and not interleaved:
        reading.carry("dataset", "data.train", paths if len(paths) > 1 else paths[0])
    else:
        sources: list[dict[str, Any]] = [{"name": n, "path": p} for n, p in zip(names, paths, strict=True)]
        for number, source in enumerate(sources):
            source |= {"weight": shares[number]} if interleaved else {}
            source |= {"max_rows": rows} if rows is not None else {}
        reading.carry("dataset", "data.train", sources)
    if reading.has("dataset_dir"):
        reading.carried["dataset_dir"] = "data.train"
    if rows is not None:
        reading.carried["max_samples"] = "max_rows of each source in data.train"
    if interleaved:
        for key in ("mix_strategy", "interleave_probs"):
            reading.carried[key] = "weights of the sources in data.train, which hold in each step"
    for key in ("mix_strategy", "interleave_probs", "max_samples"):
        reading.ignore(key, "sources come after each other, each pair once an epoch")


def _file(reading: Reading, name: str) -> str:
    """Where the data of a name are, by dataset_info.json where that is there."""
    folder = str(reading.value("dataset_dir", "data"))
    beside = [Path(folder), Path(reading.source).parent / folder]
    listing = next((one / "dataset_info.json" for one in beside if (one / "dataset_info.json").is_file()), None)
    if listing is None:
        path = f"{folder}/{name}.json"
        reading.decided.append(
            f"{path}: no {folder}/dataset_info.json is here to say where the data set {name} lies; `--data` names it"
        )
        return path
    try:
        entry = json.loads(listing.read_text(encoding="utf-8"))[name]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{listing} does not say what {name} is ({error!r}): name the data with --data.") from error
    if named := [key for key in ("columns", "tags") if key in entry]:
        reading.decided.append(
            f"{listing} names {' and '.join(named)} of {name}, and formats are recognised here: `dpo-ray data` "
            "shows as what; data.columns and data.layout say otherwise"
        )
    if "file_name" in entry:
        return str(listing.parent / entry["file_name"])
    if "hf_hub_url" in entry:
        split = entry.get("split")
        where = f"{entry.get('subset') or 'data'}/{split or 'train'}-*"
        hub = str(entry["hf_hub_url"])
        return f"hf://datasets/{hub}/{where}" if split or entry.get("subset") else hub
    raise ConfigError(f"{listing} names neither file_name nor hf_hub_url of {name}: name the data with --data.")


def _loss(reading: Reading, stage: str) -> None:
    kind = "kto" if stage == "kto" else str(reading.value("pref_loss", "sigmoid"))
    if stage == "dpo" and kind not in _PAIRED:
        raise ConfigError(f"{reading.source}: pref_loss={kind} is none of {', '.join(_PAIRED)}: take one of these.")
    beta = reading.number("pref_beta", 0.1)
    nll, bco = reading.number("pref_ftx", 0.0), reading.number("pref_bco_weight", 0.0)
    named = "kto" if kind == "kto_pair" else kind
    loss: dict[str, Any] = {"type": named, "odds_ratio_weight" if kind == "orpo" else "beta": beta}
    done = ["pref_beta", "pref_loss"]
    if kind == "kto_pair":
        reading.decided.append("kto_pair is KTO here, whose KL is of mismatched answers; theirs is of the batch's own")
    if kind == "simpo":
        loss["target_margin"] = reading.number("simpo_gamma", 0.5)
        done.append("simpo_gamma")
    if stage == "kto":
        loss["desirable_weight"] = reading.number("kto_chosen_weight", 1.0)
        loss["undesirable_weight"] = reading.number("kto_rejected_weight", 1.0)
        done += ["kto_chosen_weight", "kto_rejected_weight"]
    if kind == "sigmoid" and reading.number("dpo_label_smoothing", 0.0):
        loss["label_smoothing"] = reading.number("dpo_label_smoothing", 0.0)
        done.append("dpo_label_smoothing")
    if reading.has("ld_alpha") and stage == "dpo" and kind in ("sigmoid", "hinge") and not bco:
        loss["ld_alpha"] = reading.number("ld_alpha", 1.0)
        done.append("ld_alpha")
        reading.decided.append("ld_alpha weights policy and reference alike here, and the policy alone there")
    if bco and kind in ("sigmoid", "hinge", "ipo"):
        terms = [(1 / (1 + bco), loss), (bco / (1 + bco), {"type": "bco_pair", "beta": beta})]
        loss = {"type": "weighted", "terms": [{"weight": weight, "loss": one} for weight, one in terms]}
        done.append("pref_bco_weight")
    if nll and kind != "orpo":
        loss["nll_weight"] = nll
        done.append("pref_ftx")
    reading.set("train.loss", loss)
    if "stage" in reading.given:
        reading.carried["stage"] = f"train.loss.type={loss['type']}"
    for key in done:
        if reading.has(key):
            reading.carried[key] = "train.loss"
    if not reading.has("pref_beta"):
        reading.decided.append("train.loss: pref_beta is not given, and .1 there")
    reading.lose("ld_alpha", f"{kind} has no such option here{' beside others in a sum' if bco else ''}")
    reading.lose("pref_ftx", "orpo has a likelihood term already")
    reading.lose("pref_bco_weight", f"it stands beside sigmoid, hinge and ipo, and this is {kind}")
    for key in ("pref_loss", "simpo_gamma", "kto_chosen_weight", "kto_rejected_weight", "dpo_label_smoothing"):
        reading.ignore(key, f"{kind} does not read it")
