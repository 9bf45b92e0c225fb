"""Low-rank adapters (arXiv:2106.09685), by PEFT: put on a model, saved as a PEFT folder, merged into the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_ray.config import LoRA
from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import ADAPTER_WEIGHTS
from dpo_ray.model.quantization import QuantizedLinear, quiet_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"  # PEFT's own name for the only adapter of a model; in its parameters' names, not in its files
_MERGE_TOLERANCE = 1e-3  # nats: float32 rounding of the two orders of summation, and far from a wrong merge


def add_adapters(model: PreTrainedModel, options: LoRA, *, seed: int = 0) -> None:
    """Put adapters on a model in place: its class stays, its own weights are frozen, only the adapters train.

    The second factor of each update starts at 0, so that the model computes what it did before. The first one is
    drawn from the seed alone: equal on every data-parallel rank, whatever was drawn before; no generator moves.

    Raises ConfigError where a target module is not a linear layer of the model, or is read past its adapter.
    """
    quiet_bitsandbytes()  # which PEFT loads where it is installed
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.rank,
        # A whole number stays one in adapter_config.json: other readers of that file want it so.
        lora_alpha=int(options.alpha) if options.alpha.is_integer() else options.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=_targets(model, options.target_modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)


def save_adapter(
    folder: Path, *, policy: PreTrainedModel, state: Mapping[str, Tensor], base: str, revision: str | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in PEFT's format.

    Args:
        policy: a model with adapters; only its configuration is read.
        state: at least its adapters' tensors, whole, on the CPU, under their names in policy.state_dict().
        base: hub id or folder of the model that the adapters belong to.
        revision: of the hub id.
    """
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(policy, dict(state), adapter_name=_NAME, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = copy.copy(policy.peft_config[_NAME])
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = base
    config.revision = revision
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules or ())  # a set; its order would change from process to process
    config.save_pretrained(str(folder))


def merged_weights(
    policy: PreTrainedModel, state: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """What the state of a policy with adapters is without them: each weight by its name in the plain model, and those
    that are quantized as they are computed with.

    Args:
        state: of the policy, frozen weights too, possibly sharded.
        whole: makes a tensor of it whole.

    Returns a tensor of the weight's shape, and the function that makes the weight whole, its adapter added.
    """
    found: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".base_layer.")
        if ".lora_A." in name or ".lora_B." in name:
            continue
        plain = f"{layer}.{rest}" if rest else name
        base, made = value, partial(whole, value)
        frozen = policy.get_submodule(name.rpartition(".")[0])
        if isinstance(frozen, QuantizedLinear) and name.endswith(".weight"):
            base = torch.empty(frozen.out_features, frozen.in_features, device="meta")
            made = partial(_dequantized, frozen, value, whole)
        if rest == "weight":
            down, up = (state[f"{layer}.lora_{factor}.{_NAME}.weight"] for factor in ("A", "B"))
            made = partial(_added, policy.get_submodule(layer), made, down, up, whole)
        found[plain] = base, made
    return found


def _dequantized(layer: QuantizedLinear, packed: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
    return layer.whole(whole(packed))


def _added(
    layer: Any, base: Callable[[], Tensor], down: Tensor, up: Tensor, whole: Callable[[Tensor], Tensor]
) -> Tensor:
    update = whole(up) @ whole(down)
    scale: float = layer.scaling[_NAME]
    return base() + (update.T if layer.fan_in_fan_out else update) * scale


def merge(base: Path, adapter: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder with the PEFT adapter of another folder merged into its weights, in float32.

    Raises ConfigError where the adapter does not fit the model, is of a kind that weights cannot express, or where
    the merged model does not compute what model and adapter compute together.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        difference, merged = _merge(model.eval(), adapter)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    else:
        if difference <= _MERGE_TOLERANCE:
            return merged
        reason = (
            f"merged, the log-probs differ by {difference:.2g} from those of model and adapter side by side, as where "
            "an adapter is on tied embeddings"
        )
    raise ConfigError(
        f"The adapter {adapter} cannot be merged into its base model {base} ({reason}). Check that it was trained on "
        "this base model, or merge it with the library that made it, and name the folder of the merged model."
    )


def _merge(model: PreTrainedModel, adapter: Path) -> tuple[float, PreTrainedModel]:
    """The merged model, and the largest difference of its log-probs from model and adapter side by side."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} adds to the prompt and changes no weight")
    config.inference_mode = True
    adapted = PeftModel(model, config, adapter_name=_NAME).eval()
    loaded: Any = set_peft_model_state_dict(adapted, load_file(adapter / ADAPTER_WEIGHTS), adapter_name=_NAME)
    # PEFT passes over both in silence, and what is left is the bare base.
    missing = [name for name in loaded.missing_keys if _NAME in name.split(".")]
    if loaded.unexpected_keys or missing:
        raise ValueError(
            f"{len(loaded.unexpected_keys)} of its tensors have no place in the model and {len(missing)} places stay "
            f"empty, the first being {[*loaded.unexpected_keys, *missing][0]}"
        )
    ids = torch.arange(7, 7 + 19)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        expected = adapted(input_ids=ids).logits.log_softmax(-1)
    merged = adapted.merge_and_unload(safe_merge=True)
    with torch.inference_mode():
        got = merged(input_ids=ids).logits.log_softmax(-1)
    return float((got - expected).abs().max()), merged


def _targets(model: PreTrainedModel, asked: str | tuple[str, ...]) -> list[str]:
    """Names for PEFT, each of which ends the names of linear layers and of nothing else. Raises ConfigError."""
    from transformers.pytorch_utils import Conv1D

    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    modules = dict(model.named_modules())
    linear = {n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and id(m) not in ends}
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    given = [asked] if isinstance(asked, str) else list(asked)
    names = sorted(linear) if asked == "all-linear" else given
    if not names:
        raise ConfigError(
            f"model.lora.target_modules={asked!r} names no layer of {type(model).__name__}. Its linear layers: "
            f"{known or 'none, so leave model.lora out'}."
        )
    for name in names:
        matched = {n for n in modules if n == name or n.endswith(f".{name}")}
        if any(id(modules[n]) in ends for n in matched):
            raise ConfigError(
                f"model.lora.target_modules names {name}, which is the output head or the embeddings of "
                f"{type(model).__name__}: they are read past their adapters, and cannot have any. Choose among its "
                f"other linear layers: {known}."
            )
        if not matched or not matched <= linear:
            raise ConfigError(
                f"model.lora.target_modules names {name}, which is no linear layer of {type(model).__name__}. Choose "
                f"among {known}, or set model.lora.target_modules=all-linear."
            )
    return names
