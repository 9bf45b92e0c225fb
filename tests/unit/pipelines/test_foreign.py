"""`dpo-ray import-config`: other trainers' configurations become ours, and no option of theirs goes without a word."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray.config import Config, load_config
from dpo_ray.errors import ConfigError
from pipelines.cli import app
from pipelines.foreign import llama_factory, trl

TOLD = ("Carried over", "Without meaning here", "Not carried over", "Unknown")


class Imported:
    def __init__(self, text: str, folder: Path):
        self.text = text
        (folder / "ours.yaml").write_text(text)
        self.config: Config = load_config(folder / "ours.yaml")
        self.lists: dict[str, str] = {}
        for part in re.split(r"^#$", text, flags=re.M)[1:]:
            title, _, entries = part.strip().partition(":\n")
            joined = re.sub(r"\n#   ", " ", entries)
            self.lists[title.removeprefix("# ")] = joined

    def told(self, key: str) -> str:
        """What became of an option: the one list that has it, and its line."""
        found = [
            (title, line)
            for title in TOLD
            for line in self.lists.get(title, "").splitlines()
            if re.match(rf"# - {re.escape(key)}( →|=)", line)
        ]
        assert len(found) >= 1, f"nothing is said of {key}:\n{self.text}"
        assert len({title for title, _ in found}) == 1, found
        return f"{found[0][0]}: {found[0][1]}"

    @property
    def decided(self) -> str:
        return self.lists.get("Decided, as it is not said there or said otherwise", "")


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run(given: dict[str, Any], *options: str) -> Imported:
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(given))
        result = CliRunner().invoke(app, ["import-config", "theirs.yaml", *options])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        found = Imported(result.stdout, tmp_path)
        for key in given:
            found.told(key)
        return found

    return run


FEWEST = {"model_name_or_path": "org/model", "dataset_name": "org/pairs", "output_dir": "out/zephyr", "beta": 0.1}
FULL = {  # as recipes of the alignment handbook have it
    "model_name_or_path": "org/sft-full",
    "torch_dtype": None,
    "dataset_mixture": {
        "datasets": [
            {
                "id": "org/feedback",
                "config": "default",
                "split": "train_prefs",
                "columns": ["chosen", "rejected"],
                "weight": 1.0,
            },
            {"id": "org/chat", "config": "Preference", "split": "no_think", "weight": 0.5},
        ],
        "test_split_size": 2000,
        "seed": 0,
    },
    "dataset_num_proc": 12,
    "bf16": True,
    "beta": 0.01,
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "mine",
    "learning_rate": "5e-7",
    "log_level": "info",
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "data/full",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "push_to_hub": True,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
    "warmup_ratio": 0.1,
}
QLORA = {
    "model_name_or_path": "org/sft-qlora",
    "torch_dtype": "float16",
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"],
    "dataset_mixer": {"org/feedback": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 12,
    "bf16": True,
    "beta": 0.01,
    "evaluation_strategy": "steps",
    "eval_steps": 100,
    "gradient_checkpointing": True,
    "learning_rate": 5.0e-6,
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "num_train_epochs": 1,
    "optim": "paged_adamw_32bit",
    "output_dir": "data/qlora",
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "warmup_ratio": 0.1,
}
APO = {
    "model_name_or_path": "org/checkpoints",
    "model_revision": "it-SFT",
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "trust_remote_code": True,
    "dataset_name": "org/preferences",
    "dataset_config": "Preference",
    "dataset_train_split": "no_think",
    "bf16": True,
    "eval_strategy": False,
    "gradient_accumulation_steps": 2,
    "output_dir": "data/apo",
    "run_name": "the DPO run",
    "learning_rate": 1.0e-6,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "max_grad_norm": 0.2,
    "beta": 0.05,
    "loss_type": "apo_zero",
    "max_length": 24576,
    "per_device_train_batch_size": 1,
    "padding_free": True,
    "report_to": ["wandb"],
    "save_steps": 0.5,
    "use_liger_kernel": True,
    "warmup_ratio": 0.1,
}
LORA = {  # as LLaMA-Factory's examples have it
    "model_name_or_path": "org/Instruct",
    "trust_remote_code": True,
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "dataset": "dpo_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "output_dir": "saves/lora/dpo",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
KTO = {
    "model_name_or_path": "org/Instruct",
    "stage": "kto",
    "finetuning_type": "full",
    "pref_beta": 0.2,
    "kto_rejected_weight": 1.5,
    "dataset": "kto_en_demo",
    "template": "llama3",
    "cutoff_len": 1024,
    "output_dir": "saves/kto",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "num_train_epochs": 3.0,
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "bf16": True,
}
OFT = {
    **LORA,
    "finetuning_type": "oft",
    "oft_block_size": 32,
    "oft_target": "all",
    "pref_loss": "simpo",
    "simpo_gamma": 0.7,
}


def test_a_full_recipe(imported):
    found = imported(FULL, "--devices", "4")
    config = found.config
    assert config.train.loss.model_dump(exclude_defaults=True) == {"type": "sigmoid", "beta": 0.01}
    assert config.train.global_batch_size == 8 * 2 * 4 and config.train.num_workers == 4
    assert "8 a device × 2 accumulated × 4 devices" in found.decided and "assumed" not in found.decided
    assert config.train.learning_rate == 5e-7 and config.train.warmup_fraction == 0.1
    assert (config.train.schedule, config.train.epochs, config.train.keep_checkpoints) == ("cosine", 1, 1)
    assert config.train.eval_every_steps == config.train.checkpoint_every_steps == 100
    assert (config.data.max_prompt_tokens, config.data.max_completion_tokens) == (512, 512)
    assert (config.data.long_prompts, config.data.long_completions) == ("keep_end", "cut")
    assert [source.path for source in config.data.sources] == [
        "hf://datasets/org/feedback/data/train_prefs-*",
        "hf://datasets/org/chat/Preference/no_think-*",
    ]
    assert "0.5 is the share of its rows that is taken there" in found.lists["Not carried over"]
    assert "test_split_size=2000 is a number of rows" in found.decided
    assert (config.model.dtype, config.train.use_gpu, config.train.activation_checkpointing) == ("bfloat16", True, True)
    assert (config.run.name, config.run.output, config.run.seed) == ("full", "data/full", 42)
    assert "Not carried over" in found.told("push_to_hub")


def test_a_recipe_of_adapters_on_quantized_weights(imported):
    found = imported(QLORA)
    lora = found.config.model.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.target_modules) == (16, 16.0, ("q_proj", "v_proj"))
    assert "assumed" in found.decided and "--devices" in found.decided
    assert "it is off" in imported({**QLORA, "lora_dropout": 0.0}).told("lora_dropout")
    assert lora.quantization == "nf4" and found.config.reference.engine == "torch"
    assert "model.lora.quantization" in found.told("load_in_4bit") and "dropout" in found.told("lora_dropout")
    eight = imported({**QLORA, "load_in_4bit": False, "load_in_8bit": True, "optim": "adamw_bnb_8bit"})
    assert eight.config.model.lora.quantization == "int8" and eight.config.train.optimizer == "adamw_8bit"
    whole = imported({key: value for key, value in QLORA.items() if key != "use_peft"})
    assert "Not carried over" in whole.told("load_in_4bit")
    assert found.config.data.train == "hf://datasets/org/feedback/data/train_prefs-*"
    assert found.config.data.eval == "hf://datasets/org/feedback/data/test_prefs-*"
    assert "Not carried over" in found.told("optim") and "Not carried over" in found.told("torch_dtype")


def test_a_recipe_of_apo(imported):
    found = imported(APO)
    config = found.config
    assert config.train.loss.model_dump(exclude_defaults=True) == {"type": "apo_zero", "beta": 0.05}
    assert (config.model.revision, config.model.trust_remote_code) == ("it-SFT", True)
    assert config.data.train == "hf://datasets/org/preferences/Preference/no_think-*"
    assert config.train.max_grad_norm == 0.2 and config.train.epochs == 3 and config.run.name == "the-DPO-run"
    assert config.train.eval_every_steps is None and config.train.schedule == "cosine"
    assert config.data.max_prompt_tokens + config.data.max_completion_tokens == 24576
    assert config.data.long_prompts == "drop" and "`dpo-ray init`" in found.told("max_length")
    assert "Not carried over" in found.told("lr_scheduler_type") and "Not carried over" in found.told("save_steps")


def test_a_file_of_llama_factory(imported):
    found = imported(LORA, "--devices", "2")
    config = found.config
    assert config.train.loss.model_dump(exclude_defaults=True) == {"type": "sigmoid"} and config.train.epochs == 3
    assert config.train.global_batch_size == 16 and config.train.learning_rate == 5e-6
    assert config.model.lora is not None and (config.model.lora.rank, config.model.lora.alpha) == (8, 16.0)
    assert config.model.lora.target_modules == "all-linear"
    [source] = config.data.sources
    assert (source.name, source.path, source.max_rows) == ("dpo_en_demo", "data/dpo_en_demo.json", 1000)
    assert "no data/dataset_info.json is here" in found.decided
    assert (config.data.max_prompt_tokens, config.data.long_prompts) == (1024, "keep_start")
    assert "chat template" in found.told("template") and "it is off" in found.told("report_to")


def test_kto_of_llama_factory_with_its_list_of_data_sets(imported, tmp_path: Path):
    (tmp_path / "data").mkdir()
    entries = {"kto_en_demo": {"file_name": "kto.jsonl", "formatting": "sharegpt", "columns": {"kto_tag": "label"}}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(entries))
    found = imported(KTO)
    config = found.config
    assert "names columns of kto_en_demo" in found.decided
    assert config.train.loss.model_dump(exclude_defaults=True) == {
        "type": "kto",
        "beta": 0.2,
        "undesirable_weight": 1.5,
    }
    assert config.data.train == "data/kto.jsonl" and config.data.held_out_fraction == 0.1
    assert config.train.eval_every_steps == 500 and config.model.lora is None
    with pytest.raises(ConfigError, match=r"does not say what other is .*--data"):
        imported({**KTO, "dataset": "other"})


def test_what_is_neither_all_weights_nor_lora_is_told(imported):
    found = imported(OFT)
    assert found.config.model.lora is None and "Not carried over" in found.told("finetuning_type")
    assert found.config.train.loss.model_dump(exclude_defaults=True) == {
        "type": "simpo",
        "beta": 0.1,
        "target_margin": 0.7,
    }
    assert "finetuning_type=oft has no adapters of LoRA" in found.told("lora_rank")


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({}, {"type": "sigmoid"}),
        ({"loss_type": "hinge", "beta": 0.3}, {"type": "hinge", "beta": 0.3}),
        ({"loss_type": ["ipo"], "ld_alpha": 0.5}, {"type": "ipo"}),
        ({"loss_type": "exo_pair", "label_smoothing": 0.01}, {"type": "exo_pair", "label_smoothing": 0.01}),
        ({"loss_type": "exo_pair"}, {"type": "exo_pair"}),
        ({"loss_type": "nca_pair"}, {"type": "nca_pair", "beta": 0.1}),
        ({"loss_type": "robust"}, {"type": "robust", "label_smoothing": 0.0}),
        ({"loss_type": "robust", "label_smoothing": 0.2}, {"type": "robust", "label_smoothing": 0.2}),
        ({"loss_type": "bco_pair"}, {"type": "bco_pair", "beta": 0.1}),
        ({"loss_type": "sppo_hard", "beta": 0.001}, {"type": "sppo_hard"}),
        ({"loss_type": "aot", "label_smoothing": 0.1}, {"type": "aot", "beta": 0.1, "label_smoothing": 0.1}),
        ({"loss_type": "aot_unpaired"}, {"type": "aot_unpaired", "beta": 0.1}),
        ({"loss_type": "apo_zero", "use_weighting": True}, {"type": "apo_zero", "wpo": True}),
        ({"loss_type": "apo_down"}, {"type": "apo_down"}),
        ({"loss_type": "discopop", "discopop_tau": 0.1}, {"type": "discopop", "beta": 0.1, "tau": 0.1}),
        ({"loss_type": "sigmoid_norm", "beta": 5.0}, {"type": "sigmoid_norm"}),
        ({"ld_alpha": 0.5}, {"type": "sigmoid", "ld_alpha": 0.5}),
        ({"label_smoothing": 0.1}, {"type": "sigmoid", "label_smoothing": 0.1}),
        ({"f_divergence_type": "js_divergence"}, {"type": "sigmoid", "divergence": {"type": "js"}}),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
            {"type": "sigmoid", "divergence": {"type": "alpha", "alpha": 0.2}},
        ),
        ({"f_divergence_type": "js_divergence", "loss_type": "hinge"}, {"type": "hinge"}),
        ({"rpo_alpha": 0.7}, {"type": "sigmoid", "nll_weight": 0.7}),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"type": "sigmoid", "nll_weight": 0.3}),
        (
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
            {
                "type": "weighted",
                "nll_weight": 1.0,
                "terms": (
                    {"weight": 0.8, "loss": {"type": "sigmoid"}},
                    {"weight": 0.2, "loss": {"type": "bco_pair", "beta": 0.1}},
                ),
            },
        ),
    ],
    ids=str,
)
def test_losses_of_trl(imported, given: dict[str, Any], loss: dict[str, Any]):
    found = imported({**FEWEST, **given})
    assert found.config.train.loss.model_dump(exclude_defaults=True) == loss


def test_what_a_loss_lacks_is_told(imported):
    assert "hinge has no such option" in imported(
        {**FEWEST, "loss_type": "hinge", "f_divergence_type": "forward_kl"}
    ).told("f_divergence_type")
    assert "ipo has no such option" in imported({**FEWEST, "loss_type": "ipo", "ld_alpha": 0.5}).told("ld_alpha")
    assert "hinge does not read it" in imported({**FEWEST, "loss_type": "hinge", "label_smoothing": 0.1}).told(
        "label_smoothing"
    )
    summed = {**FEWEST, "loss_type": ["sigmoid", "hinge"], "ld_alpha": 0.5}
    assert "no such option here in a sum" in imported(summed).told("ld_alpha")
    assert "TRL 1.16 does not read it there" in imported({**FEWEST, "label_smoothing": 0.1}).decided
    assert "running mean" in imported({**FEWEST, "loss_type": "bco_pair"}).decided


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({"pref_loss": "orpo", "pref_beta": 0.2}, {"type": "orpo", "odds_ratio_weight": 0.2}),
        ({"pref_loss": "hinge", "pref_ftx": 0.5}, {"type": "hinge", "nll_weight": 0.5}),
        ({"pref_loss": "kto_pair"}, {"type": "kto"}),
        ({"dpo_label_smoothing": 0.1, "ld_alpha": 0.5}, {"type": "sigmoid", "label_smoothing": 0.1, "ld_alpha": 0.5}),
        (
            {"pref_bco_weight": 1.0},
            {
                "type": "weighted",
                "terms": (
                    {"weight": 0.5, "loss": {"type": "sigmoid"}},
                    {"weight": 0.5, "loss": {"type": "bco_pair", "beta": 0.1}},
                ),
            },
        ),
    ],
    ids=str,
)
def test_losses_of_llama_factory(imported, given: dict[str, Any], loss: dict[str, Any]):
    assert imported({**LORA, **given}).config.train.loss.model_dump(exclude_defaults=True) == loss


def test_mixtures_keep_their_shares(imported):
    sets = [{"path": "org/math", "fraction": 0.7}, {"path": "./chat.jsonl", "split": "train", "fraction": 0.3}]
    config = imported({**{k: v for k, v in FEWEST.items() if k != "dataset_name"}, "datasets": sets}).config
    assert [(s.name, s.path, s.weight) for s in config.data.sources] == [
        ("math-train", "hf://datasets/org/math/data/train-*", 0.7),
        ("chat.jsonl-train", "./chat.jsonl", 0.3),
    ]
    mixed = {**LORA, "dataset": "a, b", "mix_strategy": "interleave_under", "interleave_probs": "0.9,0.1"}
    assert imported(mixed).config.data.weights == {"a": 0.9, "b": 0.1}


def test_every_default_of_theirs_that_is_not_ours_is_written_and_told(imported):
    found = imported(FEWEST)
    train = found.config.train
    assert (train.global_batch_size, train.epochs, train.schedule, train.warmup_fraction) == (8, 3, "linear", 0.0)
    assert train.activation_checkpointing and found.config.model.dtype == "bfloat16"
    for told in ("train.epochs=3", "train.schedule=linear", "train.warmup_fraction=0.0", "run.seed=42", "max_length"):
        assert told in found.decided


def test_other_options_of_the_trainer(imported):
    given = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/accuracies",
        "eval_strategy": "steps",
        "eval_steps": 50,
        "use_cpu": True,
        "warmup_steps": 100,
        "max_length": None,
        "use_peft": True,
        "use_rslora": True,
        "lora_r": 16,
        "lora_alpha": 8,
        "router_aux_loss_coef": 0.01,
        "sync_ref_model": True,
        "fsdp": "full_shard",
        "dataset_test_split": "test_prefs",
        "adam_beta2": 0.95,
    }
    found = imported({**FEWEST, **given}, "--devices", "2")
    config = found.config
    assert (config.train.keep_best, config.train.eval_every_steps) == ("eval_rewards/accuracies", 50)
    assert (config.train.use_gpu, config.train.strategy, config.train.router_aux_loss) == (False, "fsdp", 0.01)
    assert config.model.lora is not None and config.model.lora.alpha == 32.0  # 8·√16
    assert config.data.eval == "hf://datasets/org/pairs/data/test_prefs-*"
    for key in ("warmup_steps", "sync_ref_model", "adam_beta2"):
        assert "Not carried over" in found.told(key)


def test_no_secret_is_written(imported):
    given = {"hub_token": "s3cret", "wandb_api_key": "s3cret", "env": {"HF_TOKEN": "s3cret"}, "pad_token": "<pad>"}
    found = imported({**FEWEST, **given})
    assert "s3cret" not in found.text and "hub_token=…" in found.text and "pad_token=<pad>" in found.text


def test_a_misspelt_option_is_told_with_what_it_may_mean(imported):
    assert (
        "Unknown: # - learning_rat=1.0e-06: no option of TRL that is known here; is learning_rate meant?"
        in imported({**FEWEST, "learning_rat": 1e-6}).told("learning_rat")
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"stage": "sft", "model_name_or_path": "m"}, "stage=sft learns from no preferences"),
        ({**LORA, "pref_loss": "ppo"}, "pref_loss=ppo is none of sigmoid"),
        ({**FEWEST, "loss_type": "simpo"}, "loss_type=simpo is none of TRL's losses of DPO"),
        ({**FEWEST, "loss_type": "sft"}, "compares no answers"),
        ({**FEWEST, "loss_type": ["aot", "hinge"]}, "has aot in a sum"),
        ({**FEWEST, "loss_type": ["hinge", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 of loss_type"),
        ({**FEWEST, "learning_rate": "small"}, "learning_rate='small' is no number"),
        ({"model_name_or_path": "m", "beta": 0.1}, "names no data: say what to train on with --data"),
        ({"dataset_name": "d"}, "names no model: add model_name_or_path"),
        ({"base_model": "m", "rl": "dpo"}, "looks like Axolotl's"),
        ({"run": {}, "model": {}}, "is a configuration of dpo-ray already"),
        ({**FEWEST, "beta": 0}, "beta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_configuration_says_why(imported, given: dict[str, Any], why: str):
    with pytest.raises(ConfigError, match=re.escape(why)):
        imported(given)


def test_data_and_whose_it_is_can_be_told(imported, tmp_path: Path):
    found = imported({"model_name_or_path": "m", "stage": "dpo", "output_dir": "o"}, "--data", "mine.jsonl")
    assert found.config.data.train == "mine.jsonl" and "LLaMA-Factory" in found.text
    assert "of TRL" in imported({"model_name_or_path": "m", "stage": "x"}, "--data", "d", "--from", "trl").text
    with pytest.raises(ConfigError, match="name one of trl, llama-factory"):
        imported(FEWEST, "--from", "axolotl")
    with pytest.raises(ConfigError, match=r"There is no file .*nothing.yaml"):
        CliRunner().invoke(app, ["import-config", "nothing.yaml"], catch_exceptions=False)


@pytest.mark.parametrize("module", [trl, llama_factory], ids=["trl", "llama-factory"])
def test_no_option_is_both_lost_and_without_meaning(module: Any):
    lost = [name for names in module.LOST.values() for name in names.split()]
    meaningless = [name for names in module.MEANINGLESS.values() for name in names.split()]
    assert not set(lost) & set(meaningless) and len(set(lost)) == len(lost)
    assert len(set(meaningless)) == len(meaningless)
