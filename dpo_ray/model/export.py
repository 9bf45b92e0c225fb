"""The trained policy as an ordinary folder: a Hugging Face model, or a PEFT adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dpo_ray.config import Model
from dpo_ray.model.folders import is_copy, is_hub_id, is_made_here, load_tokenizer
from dpo_ray.model.lora import merge, save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_policy(
    target: Path, *, policy: PreTrainedModel, source: Path, options: Model, state: Mapping[str, Tensor]
) -> None:
    """Write the trained model, its tokenizer and its chat template; weights in safetensors only.

    Without model.lora a Hugging Face folder. With it, by model.lora.export, the adapter as PEFT's folder, or a
    Hugging Face folder of the base with the adapter merged into it.

    Args:
        policy: as load_policy made it, possibly sharded: its configuration is read, its weights are not.
        source: the folder that it was loaded from.
        state: its trained tensors, whole, on the CPU, under their names in policy.state_dict().

    Raises ConfigError where the adapter cannot be merged.
    """
    weights = _without_tied(policy, state)
    target.mkdir(parents=True, exist_ok=True)
    if options.lora is None:
        policy.save_pretrained(target, state_dict=weights)
    elif options.lora.export == "adapter":
        base, revision = _name_of_base(options, source)
        save_adapter(target, policy=policy, state=weights, base=base, revision=revision)
    else:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-adapter-") as scratch:
            save_adapter(Path(scratch), policy=policy, state=weights, base=str(source))
            merged = merge(source, Path(scratch), trust_remote_code=options.trust_remote_code)
        merged.save_pretrained(target)
    load_tokenizer(source, trust_remote_code=options.trust_remote_code).save_pretrained(target)


def _without_tied(policy: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with each tied weight once, under the name that it is saved under."""
    weights = dict(state)
    # Gathered from shards, tied weights are copies, which save_pretrained would take for two.
    for alias, name in policy.all_tied_weights_keys.items():
        if alias in weights:
            value = weights.pop(alias)
            weights.setdefault(name, value)
    missing = {name for name, p in policy.named_parameters() if p.requires_grad} - weights.keys()
    if missing:
        raise ValueError(f"{len(missing)} trained parameters are not in the state to export, as {min(missing)}")
    return weights


def _name_of_base(options: Model, source: Path) -> tuple[str, str | None]:
    """Where others find the base: its hub id and revision, its place in an object store, or the absolute folder."""
    # What stands for an adapter was merged here: the base is the merged folder, not the adapter that was named.
    if is_hub_id(options.path) and not is_made_here(source):
        return options.path, options.revision
    if is_copy(source, options.path):
        return options.path, None
    return str(source.absolute()), None
