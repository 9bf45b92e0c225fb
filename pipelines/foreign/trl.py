"""TRL's configuration of DPO: DPOConfig, ModelConfig and ScriptArguments of TRL 1.16, and names of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from dpo_ray.config.losses import Loss
from dpo_ray.errors import ConfigError
from pipelines.foreign import trainer
from pipelines.foreign.reading import OFF, Reading

WHOSE = "TRL"
_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)
_SUMMED = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
_READ_BY: dict[str, tuple[str, ...] | None] = {
    "label_smoothing": ("exo_pair", "robust", "aot", "aot_unpaired"),
    "f_divergence_type": _SUMMED,
    "f_alpha_divergence_coef": _SUMMED,
    "discopop_tau": ("discopop",),
    "ld_alpha": None,
    "use_weighting": None,
}
"""Option → the losses that read it in TRL; None: all."""
_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
_BY_ROUNDS = (
    "the reference is scored once; refresh it between rounds (`dpo-ray iterate`, or a run from the published model)"
)

LOST = {
    "there is no such option here": (
        "lora_modules_to_save lora_target_parameters use_dora bnb_4bit_quant_type bnb_4bit_quant_storage "
        "use_bnb_nested_quant env model_init_kwargs model_code_revision "
        "tokenizer_name_or_path reference_free base_model_revision teacher_model_name_or_path max_steps dataset_kwargs"
    ),
    "name a file with it as model.chat_template": "chat_template chat_template_path",
    "frozen weights under adapters alone are quantized here (model.lora.quantization)": "load_in_8bit load_in_4bit",
    _BY_ROUNDS: "sync_ref_model",
    "name what the model's tokenizer has, in its own files": "pad_token",
    "the reference is model.path": "ref_model_name_or_path ref_model_init_kwargs ref_adapter_name model_adapter_name",
    "answers are sampled with evaluate.win_rate": "generate_during_eval",
}
MEANINGLESS = {
    "reference log-probs are always scored once, before training": (
        "precompute_ref_log_probs precompute_ref_batch_size precompute_ref_eval_batch_size"
    ),
    "pairs are packed without padding": "padding_free padding_value label_pad_token_id use_logits_to_keep "
    "pad_to_multiple_of",
    "policy and reference are computed here as they are": "force_use_ref_model is_encoder_decoder",
    "columns that are not read do no harm": "dataset_text_field auto_insert_empty_system_msg skip_prepare_dataset",
    "it is given with sync_ref_model, which is off or not carried over": "ref_model_mixup_alpha ref_model_sync_steps",
    "it is a language model": "lora_task_type",
    "the prompt is where all answers begin alike": "prompt_column",
}
_OWN = (
    "model_name_or_path model_revision dtype torch_dtype trust_remote_code use_peft lora_r lora_alpha lora_dropout "
    "use_rslora "
    "lora_target_modules dataset_name dataset_config dataset_train_split dataset_test_split dataset_mixture datasets "
    "dataset_mixer dataset_splits dataset_configs test_split_size max_length max_prompt_length max_completion_length "
    "truncation_mode loss_type loss_weights beta label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef "
    "discopop_tau use_weighting rpo_alpha router_aux_loss_coef disable_dropout output_dir run_name seed use_cpu fsdp "
    "deepspeed per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs "
    "warmup_ratio warmup_steps optim adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm num_train_epochs "
    "gradient_checkpointing torch_compile logging_steps save_strategy save_steps save_total_limit eval_strategy "
    "evaluation_strategy eval_steps load_best_model_at_end metric_for_best_model bf16 fp16"
)
KNOWN = frozenset(
    name
    for names in (_OWN, *LOST.values(), *MEANINGLESS.values(), *trainer.LOST.values(), *trainer.MEANINGLESS.values())
    for name in names.split()
)
"""Every option that is looked at."""


def read_trl(given: Mapping[str, Any], source: str, devices: int | None, data: str | None) -> Reading:
    """What becomes of a configuration.

    Args:
        devices: that it is trained on; None: nobody said, and one is assumed.
        data: data.train, whatever the file names.

    Raises ConfigError where it cannot be made one of ours, naming the option and the way out.
    """
    reading = Reading(given, source, WHOSE)
    _model(reading)
    trainer.read_trainer(reading, trainer.Defaults(learning_rate=1e-6, activation_checkpointing=True), devices)
    _data(reading, data)
    unlimited = "max_length" in given and not reading.has("max_length")
    trainer.lengths(
        reading,
        "max_length",
        None if unlimited else int(reading.number("max_length", 1024)),
        drop_prompts="max_prompt_length" not in given,
        cut="keep_start" if reading.value("truncation_mode") == "keep_start" else "keep_end",
    )
    if "max_prompt_length" in given and reading.has("truncation_mode"):
        reading.carried["truncation_mode"] = "data.long_prompts"
    elif reading.value("truncation_mode") == "keep_end":
        reading.lost["truncation_mode"] = (
            "of a pair that is too long the answer's end is cut here, or all of the pair dropped"
        )
    else:
        reading.ignore("truncation_mode", "answers lose their end (data.long_completions=cut), as there")
    _loss(reading)
    if reading.has("router_aux_loss_coef"):
        weight = reading.number("router_aux_loss_coef", 0.0)
        reading.carry("router_aux_loss_coef", "train.router_aux_loss", weight)
    reading.ignore("router_aux_loss_coef", "it is not given")
    if reading.value("disable_dropout", True):
        reading.ignore("disable_dropout", "dropout is off, as here")
    elif "disable_dropout" in given:
        reading.lost["disable_dropout"] = "dropout is off in training here"
    reading.by_table(LOST, MEANINGLESS)
    return reading


def _model(reading: Reading) -> None:
    if not reading.has("model_name_or_path"):
        raise ConfigError(f"{reading.source} names no model: add model_name_or_path.")
    reading.carry("model_name_or_path", "model.path", str(reading.value("model_name_or_path")))
    if reading.value("model_revision", "main") != "main":
        reading.carry("model_revision", "model.revision", str(reading.value("model_revision")))
    reading.ignore("model_revision", "main is what a hub id means anyway")
    if reading.value("trust_remote_code"):
        reading.carry("trust_remote_code", "model.trust_remote_code", True)
    reading.ignore("trust_remote_code", "it is off")
    trainer.precision(reading, "torch_dtype" if "torch_dtype" in reading.given else "dtype", bf16=True)
    named = ("lora_r", "lora_alpha", "lora_target_modules", "lora_dropout", "use_rslora")
    if not reading.value("use_peft"):
        for key in (*named, "lora_modules_to_save", "lora_target_parameters", "use_dora"):
            reading.ignore(key, "use_peft is off, so all weights are trained")
        reading.ignore("use_peft", "it is off")
        return
    reading.carried["use_peft"] = "model.lora"
    targets = reading.value("lora_target_modules", "all-linear")
    single = targets[0] if isinstance(targets, list) and len(targets) == 1 else targets
    layers = "all-linear" if single == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    trainer.lora(reading, ("lora_r", 16), ("lora_alpha", 32.0), layers, "lora_target_modules")
    _adapters_decided(reading)
    if reading.value("load_in_4bit"):
        trainer.quantization(reading, "load_in_4bit", "nf4")
        if reading.value("bnb_4bit_quant_type", "nf4") == "nf4":
            reading.ignore("bnb_4bit_quant_type", "4 bits are nf4 here")
    elif reading.value("load_in_8bit"):
        trainer.quantization(reading, "load_in_8bit", "int8")


def _adapters_decided(reading: Reading) -> None:
    if not reading.has("lora_target_modules"):
        reading.decided[-1] = (
            "model.lora.target_modules=all-linear: lora_target_modules is not given, and PEFT takes layers by the "
            "model's kind"
        )


def _files(path: str, config: Any, split: str) -> str:
    """Where the files of a split are: locally as it is named, on the hub where they mostly are."""
    if "://" in path or path.startswith((".", "/", "~")) or Path(path).exists():
        return path
    folder = config if config not in (None, "default", "main") else "data"
    return f"hf://datasets/{path}/{folder}/{split}-*"


def _data(reading: Reading, data: str | None) -> None:
    named = [k for k in ("dataset_name", "dataset_mixture", "datasets", "dataset_mixer") if reading.has(k)]
    others = ("dataset_config", "dataset_train_split", "dataset_splits", "dataset_configs")
    held_out = reading.value("test_split_size")
    if data is not None:
        reading.set("data.train", data)
        reading.decided.append(f"data.train={data}: as told")
        for key in (*named, *others):
            reading.ignore(key, "the data are named otherwise")
    elif not named:
        raise ConfigError(f"{reading.source} names no data: say what to train on with --data.")
    elif named[0] == "dataset_name":
        split = str(reading.value("dataset_train_split", "train"))
        path = _files(str(reading.value("dataset_name")), reading.value("dataset_config"), split)
        reading.carry("dataset_name", "data.train", path)
        for key in ("dataset_config", "dataset_train_split"):
            if key in reading.given:
                reading.carried[key] = "data.train"
    elif named[0] == "dataset_mixer":
        _mixer(reading)
    else:
        mixture = reading.value(named[0])
        sets = mixture.get("datasets", []) if isinstance(mixture, dict) else mixture
        held_out = mixture.get("test_split_size", held_out) if isinstance(mixture, dict) else held_out
        reading.carry(named[0], "data.train", list(_sources(reading, named[0], sets)))
        for key in others:
            reading.ignore(key, f"{named[0]} names the data")
    if str(reading.tree["data"]["train"]).find("hf://") >= 0:
        reading.decided.append(
            "Files of a split are looked for as the hub mostly calls them, hf://datasets/…/data/SPLIT-*: where they "
            "are called "
            "otherwise, name them in data.train; `dpo-ray data` shows what they are taken for"
        )
    _held_out(reading, held_out, data)


def _mixer(reading: Reading) -> None:
    """The alignment handbook's earlier form: name → share of its rows, and splits of all of them."""
    splits = [str(split) for split in reading.value("dataset_splits", ["train"])]
    train = [split for split in splits if "test" not in split]
    mixer = reading.value("dataset_mixer")
    sources = [
        {"name": _called(f"{name}-{split}"), "path": _files(str(name), None, split)}
        for name in mixer
        for split in train
    ]
    reading.carry("dataset_mixer", "data.train", sources if len(sources) > 1 else sources[0]["path"])
    if part := [name for name, share in mixer.items() if float(share) != 1.0]:
        del reading.carried["dataset_mixer"]
        reading.lost["dataset_mixer"] = (
            f"its files are in data.train, but of {part[0]} a share of the rows is taken there: set max_rows of that "
            "source"
        )
    if reading.has("dataset_splits"):
        reading.carried["dataset_splits"] = "data.train, data.eval"
        tests = [_files(str(name), None, split) for name in mixer for split in splits if "test" in split]
        if tests and trainer.evaluates(reading):
            reading.set("data.eval", tests if len(tests) > 1 else tests[0])
    reading.lose("dataset_configs", "name the files in data.train")


def _sources(reading: Reading, key: str, sets: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    weighted = all(one.get("fraction") is not None for one in sets)
    for number, one in enumerate(sets):
        path, config = str(one.get("path") or one.get("id")), one.get("name") or one.get("config")
        split = str(one.get("split", "train"))
        files = one.get("data_files") or _files(path, config, split)
        source = {"name": _called(f"{path.rpartition('/')[2]}-{split}"), "path": files}
        if weighted and len(sets) > 1:
            source["weight"] = float(one["fraction"])
        rows = one.get("weight")
        if rows is not None and float(rows) != 1.0:
            reading.lost[f"{key}[{number}].weight"] = (
                f"{rows:g} is the share of its rows that is taken there: set max_rows of {source['name']}"
            )
        if one.get("data_dir"):
            reading.lost[f"{key}[{number}].data_dir"] = f"name its files as the path of {source['name']}"
        yield source
    if any(one.get("columns") for one in sets):
        reading.decided.append("Columns that are not read do no harm: `columns` of the data sets are left aside")


def _called(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip("-._") or "data"


def _held_out(reading: Reading, size: Any, data: str | None) -> None:
    key = "test_split_size" if "test_split_size" in reading.given else None
    if isinstance(size, float) and 0 < size < 1 and "eval" not in reading.tree["data"]:
        reading.set("data.held_out_fraction", size)
        if key:
            reading.carried[key] = "data.held_out_fraction"
        else:
            reading.decided.append(f"data.held_out_fraction={size}: test_split_size of the mixture")
    elif size:
        reading.decided.append(
            f"data.held_out_fraction is ours: test_split_size={size} is a number of rows there, and a share of the "
            "prompts here"
        )
        if key:
            reading.lost[key] = "a share of the prompts is held out here: data.held_out_fraction"
    if (
        trainer.evaluates(reading)
        and reading.has("dataset_name")
        and data is None
        and reading.has("dataset_test_split")
    ):
        split = str(reading.value("dataset_test_split"))
        path = _files(str(reading.value("dataset_name")), reading.value("dataset_config"), split)
        if path != reading.tree["data"]["train"]:
            reading.carry("dataset_test_split", "data.eval", path)
    if trainer.evaluates(reading) and "eval" not in reading.tree["data"]:
        reading.decided.append(
            "Held-out pairs are a share of the prompts (data.held_out_fraction), where no split is named for them; "
            "data.eval names one"
        )
    reading.ignore("dataset_test_split", "data.held_out_fraction of the prompts is held out")


def _loss(reading: Reading) -> None:
    named = reading.value("loss_type", ["sigmoid"])
    types = [named] if isinstance(named, str) else [str(one) for one in named]
    weights = [float(weight) for weight in reading.value("loss_weights", [1.0] * len(types))]
    if len(weights) != len(types):
        raise ConfigError(
            f"{reading.source}: loss_weights has {len(weights)} numbers for {len(types)} of loss_type: give each its "
            "own."
        )
    nll = sum(weight for name, weight in zip(types, weights, strict=True) if name == "sft")
    if reading.has("rpo_alpha"):
        nll += reading.number("rpo_alpha", 0.0)
        reading.carried["rpo_alpha"] = "train.loss.nll_weight"
    reading.ignore("rpo_alpha", "it is not given")
    terms = [(name, weight) for name, weight in zip(types, weights, strict=True) if name != "sft" and weight > 0]
    if unknown := [name for name, _ in terms if name not in _LOSSES]:
        raise ConfigError(
            f"{reading.source}: loss_type={unknown[0]} is none of TRL's losses of DPO ({', '.join(_LOSSES)}, sft): "
            "take one "
            "of these, or write train.loss of your own (docs/configuration.md)."
        )
    if not terms:
        raise ConfigError(
            f"{reading.source}: loss_type={named} compares no answers: name a file of preference training, with a loss "
            "such as sigmoid."
        )
    coupled = [name for name, _ in terms if name.startswith("aot")]
    in_sum = len(terms) > 1 or (terms[0][1] != 1.0 and not coupled)
    if coupled and in_sum:
        raise ConfigError(
            f"{reading.source}: loss_type has {coupled[0]} in a sum, and it is a function of a whole batch: run it "
            "alone."
        )
    used: dict[str, set[str]] = {}
    made = [_options(reading, name, in_sum, used) for name, _ in terms]
    loss: dict[str, Any] = made[0]
    if in_sum:
        summed = [{"weight": weight, "loss": one} for (_, weight), one in zip(terms, made, strict=True)]
        loss = {"type": "weighted", "terms": summed}
    if nll:
        if "nll_weight" not in _kinds()[loss["type"]].model_fields:
            raise ConfigError(
                f"{reading.source}: {loss['type']} takes no likelihood term (sft, rpo_alpha): leave it out."
            )
        loss["nll_weight"] = nll
        reading.decided.append(
            f"train.loss.nll_weight={nll:g}: a mean per answer, then over pairs; TRL's is over all tokens of a "
            "micro-batch"
        )
    reading.set("train.loss", loss)
    for key in ("loss_type", "loss_weights", "beta"):
        if reading.has(key):
            reading.carried[key] = "train.loss"
    reading.ignore("loss_weights", "it is not given")
    if not reading.has("beta"):
        reading.decided.append("beta is not given, and .1 there whatever the loss")
    if coupled and terms[0][1] != 1.0:
        reading.lost["loss_weights"] = f"{coupled[0]} stands alone, and has no weight here"
    if "bco_pair" in types:
        reading.decided.append("bco_pair subtracts the running mean of the rewards, as its paper has it; TRL does not")
    _told(reading, [name for name, _ in terms], used)


def _kinds() -> dict[str, Any]:
    """Name → the class of its options, of the losses that TRL and we have; and the sum."""
    union, _ = get_args(Loss)
    return {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(union)}


def _options(reading: Reading, name: str, in_sum: bool, used: dict[str, set[str]]) -> dict[str, Any]:
    """Those of one loss. used: option of TRL → the losses that have it now."""
    fields = _kinds()[name].model_fields
    options: dict[str, Any] = {"type": name, "beta": reading.number("beta", 0.1)}

    def use(key: str, ours: str, value: Any) -> None:
        options[ours] = value
        used.setdefault(key, set()).add(name)

    if "label_smoothing" in fields:
        smoothing = reading.number("label_smoothing", 0.0)
        if name == "exo_pair" and not smoothing:
            reading.decided.append("exo_pair's label_smoothing is above 0, or its divergence would be infinite: .001")
        elif name in ("robust", "exo_pair") or smoothing:
            use("label_smoothing", "label_smoothing", smoothing)
    if reading.has("ld_alpha") and "ld_alpha" in fields and not in_sum and name != "ipo":
        use("ld_alpha", "ld_alpha", reading.number("ld_alpha", 1.0))
    if reading.value("use_weighting") and "wpo" in fields:
        use("use_weighting", "wpo", True)
    if name == "discopop":
        use("discopop_tau", "tau", reading.number("discopop_tau", 0.05))
    divergence = reading.value("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl" and "divergence" in fields:
        if divergence not in _DIVERGENCES:
            raise ConfigError(
                f"{reading.source}: f_divergence_type={divergence} is not known: name one of {', '.join(_DIVERGENCES)}."
            )
        kind: dict[str, Any] = {"type": _DIVERGENCES[divergence]}
        if kind["type"] == "alpha":
            kind["alpha"] = reading.number("f_alpha_divergence_coef", 0.5)
            used.setdefault("f_alpha_divergence_coef", set()).add(name)
        use("f_divergence_type", "divergence", kind)
    return options


def _told(reading: Reading, types: Sequence[str], used: Mapping[str, set[str]]) -> None:
    """What became of the options that only some losses read."""
    for key, readers in _READ_BY.items():
        if key not in reading.given:
            continue
        have = used.get(key, set())
        theirs = [name for name in types if readers is None or name in readers]
        if have:
            reading.carried[key] = f"train.loss, of {', '.join(sorted(have))}"
            if not set(theirs) & have:
                reading.decided.append(
                    f"{key} is kept with {types[0]}; TRL 1.16 does not read it there, earlier ones did"
                )
            if lacking := sorted(set(theirs) - have):
                reading.decided.append(
                    f"{key} is not carried over to {', '.join(lacking)}, which has no such option here"
                )
        elif any(reading.given[key] == off for off in (*OFF, "reverse_kl")):
            reading.meaningless[key] = "it is off"
        elif key == "f_alpha_divergence_coef" and reading.value("f_divergence_type") != "alpha_divergence":
            reading.meaningless[key] = "it is for f_divergence_type=alpha_divergence"
        elif theirs:
            reading.lost[key] = f"{', '.join(theirs)} has no such option here{' in a sum' if len(types) > 1 else ''}"
        else:
            reading.meaningless[key] = f"{', '.join(types)} does not read it"
