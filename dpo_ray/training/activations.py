"""What the backward pass keeps of each token, counted on a cut-down model: two layers of the real width, few words.

The estimate of dpo_ray.training.memory, by which train.tokens_per_microbatch=auto goes, is a bound for all models; this
is the number of one.
"""

from __future__ import annotations

import copy
from typing import Any

from dpo_ray.config import Model, Train
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.memory import recomputed_layers

_WORDS = 32
_TOKENS = 64  # of each of the three parts of a pair
_MOST_PARAMETERS = 1_000_000_000  # of a layer: more would take a minute


def counted_bytes_per_token(folder: ModelFolder, model: Model, train: Train) -> float | None:
    """Bytes of a token of a micro-batch, over all layers; None where a layer is too large to be tried here, or where
    the cut-down model does not run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    try:
        of_one, of_two = (_kept(_cut_down(config, number), folder, model) for number in (1, 2))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return None  # not every architecture goes by these names
    if of_one is None or of_two is None:
        return None
    layer = (of_two - of_one) / (3 * _TOKENS)
    again = recomputed_layers(layers, train)
    size = 2 if model.dtype == "bfloat16" else 4
    begins = 0 if train.activation_offload else size * config.get_text_config().hidden_size
    return float((layers - again + (again > 0)) * layer + again * begins)


def _cut_down(config: Any, layers: int) -> Any:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, _WORDS
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return small


def _kept(config: Any, folder: ModelFolder, model: Model) -> int | None:
    """Bytes that a forward pass over a pair keeps, beside the weights; None where the model is too large."""
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_ray.model import attention
    from dpo_ray.model.lora import add_adapters
    from dpo_ray.model.policy import CompletionScorer, run_packed, torch_dtype

    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config, trust_remote_code=folder.trust_remote_code)
    if sum(p.numel() for p in policy.parameters()) > _MOST_PARAMETERS * config.get_text_config().num_hidden_layers:
        return None
    # What stands in the weights does not matter; what is not written takes no memory.
    policy.to(torch_dtype(model.dtype)).to_empty(device="cpu")
    if attention.serves(policy.config):
        run_packed(policy)
    if model.lora is not None:
        add_adapters(policy, model.lora)
    policy.to(torch_dtype(model.dtype)).train()  # the adapters too
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other comes to lie there
        return tensor

    ids = [number % _WORDS for number in range(_TOKENS)]
    scorer = CompletionScorer(policy)
    batch = scorer.collate([TokenizedPair("counted", ids, ids[1:] + ids[:1], ids[2:] + ids[:2])])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = scorer(batch).logprobs
    return sum(size for size, _ in kept.values())
