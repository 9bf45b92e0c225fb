"""What becomes of another trainer's options: read off by giving them, one by one, to what reads its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.foreign import llama_factory, trainer, trl
from pipelines.foreign.reading import Reading

_LORA_TRL = {"use_peft": True}
_STEPS = {"eval_strategy": "steps", "eval_steps": 20}
_COMMON: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "model_revision": ("v2", {}),
    "trust_remote_code": (True, {}),
    "output_dir": ("out/a", {}),
    "run_name": ("a", {}),
    "seed": (7, {}),
    "use_cpu": (True, {}),
    "fsdp": ("full_shard", {}),
    "deepspeed": ("zero3.json", {}),
    "per_device_train_batch_size": (4, {}),
    "gradient_accumulation_steps": (4, {}),
    "learning_rate": (5e-7, {}),
    "lr_scheduler_type": ("cosine", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 1}, {}),
    "warmup_ratio": (0.1, {}),
    "warmup_steps": (0.1, {}),
    "optim": ("adamw_8bit", {}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.99, {}),
    "adam_epsilon": (1e-6, {}),
    "weight_decay": (0.1, {}),
    "max_grad_norm": (0.5, {}),
    "num_train_epochs": (2, {}),
    "gradient_checkpointing": (True, {}),
    "torch_compile": (True, {}),
    "logging_steps": (5, {}),
    "save_strategy": ("steps", {}),
    "save_steps": (100, {}),
    "save_total_limit": (3, {}),
    "eval_strategy": ("steps", {"eval_steps": 20}),
    "evaluation_strategy": ("steps", {"eval_steps": 20}),
    "eval_steps": (20, {"eval_strategy": "steps"}),
    "load_best_model_at_end": (True, _STEPS),
    "metric_for_best_model": ("eval_loss", {**_STEPS, "load_best_model_at_end": True}),
    "bf16": (True, {}),
    "fp16": (True, {}),
    "lora_dropout": (0.05, {}),
    "ld_alpha": (0.5, {}),
}
"""Option that both have → a value that asks for something, and what has to stand beside it."""
_OF_TRL = {
    **_COMMON,
    "dtype": ("bfloat16", {}),
    "torch_dtype": ("bfloat16", {}),
    "use_peft": (True, {}),
    "lora_r": (8, _LORA_TRL),
    "lora_alpha": (16, _LORA_TRL),
    "lora_dropout": (0.05, _LORA_TRL),
    "use_rslora": (True, _LORA_TRL),
    "lora_target_modules": (["q_proj"], _LORA_TRL),
    "load_in_4bit": (True, _LORA_TRL),
    "load_in_8bit": (True, _LORA_TRL),
    "bnb_4bit_quant_type": ("nf4", {**_LORA_TRL, "load_in_4bit": True}),
    "lora_modules_to_save": (["lm_head"], _LORA_TRL),
    "lora_target_parameters": (["w"], _LORA_TRL),
    "use_dora": (True, _LORA_TRL),
    "dataset_name": ("owner/pairs", {}),
    "dataset_config": ("default", {}),
    "dataset_train_split": ("train_prefs", {}),
    "dataset_test_split": ("test_prefs", _STEPS),
    "dataset_mixture": ({"datasets": [{"path": "owner/a"}, {"path": "owner/b"}]}, {"dataset_name": None}),
    "datasets": ([{"path": "owner/a"}, {"path": "owner/b"}], {"dataset_name": None}),
    "dataset_mixer": ({"owner/a": 1.0}, {"dataset_name": None}),
    "dataset_splits": (["train", "test"], {"dataset_name": None, "dataset_mixer": {"owner/a": 1.0}}),
    "dataset_configs": (["default"], {"dataset_name": None, "dataset_mixer": {"owner/a": 1.0}}),
    "test_split_size": (0.1, {}),
    "max_length": (2048, {}),
    "max_prompt_length": (512, {}),
    "max_completion_length": (512, {}),
    "truncation_mode": ("keep_start", {"max_prompt_length": 512}),
    "loss_type": ("ipo", {}),
    "loss_weights": ([1.0, 0.5], {"loss_type": ["sigmoid", "ipo"]}),
    "beta": (0.2, {}),
    "label_smoothing": (0.1, {"loss_type": "robust"}),
    "f_divergence_type": ("js_divergence", {}),
    "f_alpha_divergence_coef": (0.5, {"f_divergence_type": "alpha_divergence"}),
    "discopop_tau": (0.1, {"loss_type": "discopop"}),
    "use_weighting": (True, {}),
    "rpo_alpha": (1.0, {}),
    "router_aux_loss_coef": (0.01, {}),
    "disable_dropout": (False, {}),
}
_OF_LLAMA_FACTORY = {
    **_COMMON,
    "adapter_name_or_path": ("a", {}),
    "adapter_folder": ("a", {}),
    "stage": ("dpo", {}),
    "finetuning_type": ("lora", {}),
    "lora_rank": (16, {}),
    "lora_alpha": (16, {}),
    "lora_target": ("q_proj,v_proj", {}),
    "use_rslora": (True, {}),
    "quantization_bit": (4, {}),
    "quantization_method": ("bnb", {"quantization_bit": 4}),
    "pref_beta": (0.2, {}),
    "pref_loss": ("hinge", {}),
    "pref_ftx": (0.1, {}),
    "pref_bco_weight": (0.5, {}),
    "dpo_label_smoothing": (0.1, {}),
    "simpo_gamma": (0.5, {"pref_loss": "simpo"}),
    "kto_chosen_weight": (1.2, {"stage": "kto"}),
    "kto_rejected_weight": (1.2, {"stage": "kto"}),
    "ref_model": ("another", {}),
    "dataset": ("a,b", {}),
    "dataset_dir": ("data", {}),
    "eval_dataset": ("c", {}),
    "template": ("llama3", {}),
    "cutoff_len": (1024, {}),
    "max_samples": (1000, {}),
    "val_size": (0.1, {}),
    "mix_strategy": ("interleave_under", {"dataset": "a,b"}),
    "interleave_probs": ("0.7,0.3", {"dataset": "a,b", "mix_strategy": "interleave_under"}),
    "moe_aux_loss_coef": (0.01, {}),
    "early_stopping_steps": (3, _STEPS),
    "ray_num_workers": (2, {}),
    "disable_gradient_checkpointing": (True, {}),
}
_READ: dict[
    str, tuple[Callable[..., Reading], frozenset[str], dict[str, tuple[Any, Mapping[str, Any]]], dict[str, Any]]
] = {
    "TRL": (
        trl.read_trl,
        trl.KNOWN,
        {**_OF_TRL, "model_name_or_path": ("m", {})},
        {"model_name_or_path": "m", "dataset_name": "owner/pairs"},
    ),
    "LLaMA-Factory": (
        llama_factory.read_llama_factory,
        llama_factory.KNOWN,
        {**_OF_LLAMA_FACTORY, "model_name_or_path": ("m", {})},
        {"model_name_or_path": "m", "dataset": "a", "stage": "dpo"},
    ),
}
_HEAD = """\
# From {whose}

Made by `make docs` from `pipelines/foreign`, which reads {whose}'s files. This prints one as ours, and below it what
became of each of its options:

```bash
dpo-ray import-config {file} --devices 4 > run.yaml
```

{more}
"""
_WHATEVER_ITS_VALUE = dict.fromkeys(
    ("max_length", "cutoff_len"),
    "data.max_prompt_tokens, data.max_completion_tokens: one limit of both together there, a limit each here, half of "
    "it where nothing else is named; `dpo-ray init` measures your data",
)
"""Option → what it becomes, where the words have the value that was tried."""
_FILES = {"TRL": "their_dpo.yaml", "LLaMA-Factory": "llama3_lora_dpo.yaml"}
_MORE = {
    "TRL": """\
What else is another way here:

- The reference is scored once, before training, and kept; there is no `ref_model` to hold, and no
  `precompute_ref_log_probs` to switch on.
- The batch is `train.global_batch_size` pairs, whatever the devices; micro-batches are packed by tokens.
- Prompt and answer have a limit each; a pair over one is dropped or cut as you say.
- A run ends with an accuracy, an interval and a gate; what passes is published.""",
    "LLaMA-Factory": """\
What else is another way here:

- Chat templates are the model's own. `template: llama3` and its like mean nothing; look at a pair with `dpo-ray data`
  and `-o model.path=…`.
- Data sets are named by path, or by `dataset_info.json` where it is beside the file.
- `stage: dpo` and `stage: kto` are read; the others learn from no preferences.""",
}


def page(whose: str) -> str:
    """Markdown of a trainer's options. whose: a name of _READ."""
    lines = [_HEAD.format(whose=whose, file=_FILES[whose], more=_MORE[whose])]
    became = {key: becomes(whose, key) for key in sorted(_READ[whose][1])}
    for title, kind in (
        ("Carried over", "carried"),
        ("Not carried over", "lost"),
        ("Without meaning here", "meaningless"),
    ):
        lines += [f"## {title}", ""]
        if kind == "carried":
            lines += ["| theirs | ours |", "|---|---|"]
            lines += [
                f"| `{key}` | {_ours(_WHATEVER_ITS_VALUE.get(key, said))} |"
                for key, (how, said) in became.items()
                if how == kind
            ]
        else:
            reasons: dict[str, list[str]] = {}
            for key, (how, said) in became.items():
                if how == kind:
                    reasons.setdefault(said, []).append(f"`{key}`")
            lines += ["| why | theirs |", "|---|---|"]
            lines += [f"| {_cell(said)} | {', '.join(keys)} |" for said, keys in reasons.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def becomes(whose: str, key: str) -> tuple[str, str]:
    """carried, lost or meaningless, and what is said of it, where an option asks for something."""
    read, _, asked, least = _READ[whose]
    value, beside = asked.get(key, ("asked", {}))
    given = {name: one for name, one in {**least, **beside, key: value}.items() if one is not None}
    reading = read(given, "FILE", 2, None)
    for how in ("carried", "lost", "meaningless"):
        if key in (told := getattr(reading, how)):
            return how, told[key]
    raise LookupError(f"{whose}'s {key}: nothing is told of it")


def own_options(whose: str) -> set[str]:
    """Options of which a reader decides by their value, so that a value has to be given here."""
    module = {"TRL": trl, "LLaMA-Factory": llama_factory}[whose]
    tables = (module.LOST, module.MEANINGLESS, trainer.LOST, trainer.MEANINGLESS)
    return set(_READ[whose][1]) - {name for table in tables for names in table.values() for name in names.split()}


def values(whose: str) -> set[str]:
    """Options that a value is given for here."""
    return set(_READ[whose][2])


def _ours(said: str) -> str:
    key, _, note = said.partition(": ")
    return _cell(f"{key}: {note}" if note else key)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("<", "&lt;")
