"""The policy: loaded to be trained or to score, and its forward pass down to token log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_ray.config import LoRA, Quantization
from dpo_ray.errors import ConfigError
from dpo_ray.model import attention
from dpo_ray.model.libraries import require_bitsandbytes
from dpo_ray.model.logprobs import Head, TokenScores, token_scores
from dpo_ray.model.lora import add_adapters
from dpo_ray.model.packing import MicroBatch, pack, pad
from dpo_ray.model.part import Held, Part, PartOfModel, read_part, set_everywhere, without_memory
from dpo_ray.model.quantization import (
    QuantizedLinear,
    linear_layers,
    quantize,
    require_quantizable,
    use_quantized_layers,
)
from dpo_ray.model.recurrent import Separation, separated
from dpo_ray.model.routing import routing, tells_routing
from dpo_ray.pairs import TokenizedPair
from dpo_ray.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU = torch.device("cpu")


SHARED = "shared"
PADDED = "padded"


def load_policy(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    lora: LoRA | None = None,
    seed: int = 0,
    activation_checkpointing: int = 0,
    activation_offload: bool = False,
) -> PreTrainedModel:
    """A causal language model with float32 weights, dropout off, on the packed attention where it can serve.

    Args:
        lora: put adapters on it, and freeze all else; it still computes what the model of the folder does.
        seed: of the adapters' start; the same on every rank, for each must start equal.
        activation_checkpointing: in train mode, compute the activations of every layer (1) or of every n-th one (n)
            again in the backward pass.
        activation_offload: keep what such a layer starts from in the host's memory.

    Raises ConfigError where adapters or activation checkpointing do not go with the model, or where its output layer
    is not linear.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    prepare(model)
    use_packed_attention(CompletionScorer(model))
    if lora is not None:
        add_adapters(model, lora, seed=seed)
    _checkpoint_activations(model, activation_checkpointing, activation_offload)
    return model


def load_part_of_policy(
    folder: Path,
    part: Part,
    *,
    trust_remote_code: bool = False,
    lora: LoRA | None = None,
    seed: int = 0,
    activation_checkpointing: int = 0,
    activation_offload: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PartOfModel:
    """The same without its weights, and this process's part of these: nothing is whole, on any process.

    Adapters are whole. Whoever puts the weights in calls use_packed_attention then.

    Args:
        dtype: that the model's weights are held in; where lora.quantization says so, those of linear layers are not.

    Raises as load_policy does, and where quantization does not go with the model, or bitsandbytes is not installed.
    """
    quantization = lora.quantization if lora is not None else None
    found = read_part(
        folder, part, trust_remote_code=trust_remote_code, held=lambda model: _held(model, dtype, quantization)
    )
    prepare(found.model)
    if lora is not None:
        with without_memory(found.model):
            add_adapters(found.model, lora, seed=seed)
    if quantization is not None:
        layers = decoder_layers(found.model, wanted_by=f"model.lora.quantization={quantization}")
        use_quantized_layers(found.model, layers, quantization)
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=p.requires_grad)
        for p in found.model.parameters()
        if p.is_meta and p.is_floating_point()
    }
    set_everywhere(found.model, empty)
    _checkpoint_activations(found.model, activation_checkpointing, activation_offload)
    return found


def _held(model: PreTrainedModel, dtype: torch.dtype, quantization: Quantization | None) -> Held:
    """How the weights of a model are held: in a dtype, and those of its decoder layers' linear layers packed."""
    packed = quantized_weights(model, quantization)

    def hold(name: str, value: Tensor) -> Tensor:
        if quantization is not None and name in packed:
            return quantize(value, quantization)
        return value.to(dtype)

    return hold


def quantized_weights(model: PreTrainedModel, quantization: Quantization | None) -> set[str]:
    """Names of the weights that are quantized, of a model without adapters. Raises ConfigError where it cannot be."""
    if quantization is None:
        return set()
    require_bitsandbytes(quantization)
    layers = decoder_layers(model, wanted_by=f"model.lora.quantization={quantization}")
    require_quantizable(model, layers, quantization)
    return {f"{name}.weight" for name, _ in linear_layers(model, layers)}


def prepare(model: PreTrainedModel) -> None:
    """What is done to every model, before its first forward pass. Raises ConfigError."""
    _turn_dropout_off(model)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ConfigError(
            f"The output layer of {type(model).__name__} is a {type(model.get_output_embeddings()).__name__}, not a "
            "linear layer from hidden states to logits: its log-probs cannot be computed tile by tile. Choose another "
            "model.path."
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # the others leave the cap out without a word


def _turn_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # of attention weights, for which there is no module
                setattr(module, name, 0.0)


def decoder_layers(model: PreTrainedModel, *, wanted_by: str) -> list[nn.Module]:
    """The layers that the model says must stay whole, in order.

    Raises ConfigError naming `wanted_by`, the options that need them, where the model does not name its own.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{wanted_by}: this takes the decoder layers one by one, but {type(model).__name__} does not name its own "
            "(_no_split_modules). Use train.strategy=ddp, model.dtype=float32 and train.compile=false for this model, "
            "and no model.lora.quantization."
        )
    return layers


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile each decoder layer on its own, once for all shapes; the attention in it is called as it is.

    Raises ConfigError where the model does not name its decoder layers.
    """
    attention.hide_from_compiler()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):  # what makes its weight whole is one kernel already
            setattr(module, "forward", torch.compiler.disable(module.forward))  # noqa: B010
    for layer in decoder_layers(model, wanted_by="train.compile=true"):
        # Not layer.compile(), which would take FSDP's hooks into what is compiled.
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def _checkpoint_activations(model: PreTrainedModel, every: int, offload: bool) -> None:
    if not every:
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"train.activation_checkpointing is on, but {type(model).__name__} does not support it. Turn it off, and "
            "lower train.tokens_per_microbatch where memory is short."
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant checkpoints need inputs with gradients; with adapters they would cost a backward pass through
    # the frozen embeddings' outputs, and inference mode refuses them.
    model.disable_input_require_grads()
    if every == 1 and not offload:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"The layers of {type(model).__name__} are not transformers' own, so that none can be chosen: set "
            "train.activation_checkpointing=true, and train.activation_offload=false."
        )
    layer: Any
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
        if offload:
            layer._gradient_checkpointing_func = partial(_from_host, layer._gradient_checkpointing_func)


def _from_host(checkpointed: Callable[..., Any], *arguments: Any) -> Any:
    """What a checkpoint keeps to begin from is kept on the host; all else in it is not kept at all."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpointed(*arguments)


def run_packed(model: PreTrainedModel) -> Separation:
    """Switch to the packed layout, whether or not the model computes the same on it. Returns what takes its layers back
    that carry state between tokens.

    Raises ValueError where transformers does not let the model's attention be chosen.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(f"the attention of {type(model).__name__} is not transformers' to choose")
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    names = set(model._no_split_modules or ())
    # Of a sharded model each layer is of a class that torch has derived from its own.
    layers = [m for m in model.modules() if any(kind.__name__ in names for kind in type(m).__mro__)]
    return Separation(layers)


def use_packed_attention(
    scorer: CompletionScorer, device: torch.device = _CPU, dtype: torch.dtype = torch.float32
) -> None:
    """Switch to the packed layout if the model gives the same log-probs on it; otherwise leave it as it was. Say what
    is not simply packed with shared prompts.

    Some models claim to call transformers' attention interface and do not, or keep state between tokens where nobody
    looks for it; their packed log-probs would be wrong without any error, so it is tried on a few tokens. Where a model
    is sharded every process calls it.

    Args:
        device, dtype: that the scorer computes on and in.
    """
    model = scorer.model
    if attention.serves(model.config):
        was_training = scorer.training
        scorer.eval()
        with torch.no_grad():
            _pack_where_it_is_exact(scorer, device, dtype)
        scorer.train(was_training)
    if (told := _told_of_layout(model)) is not None:
        say("model", told)


def _pack_where_it_is_exact(scorer: CompletionScorer, device: torch.device, dtype: torch.dtype) -> None:
    """Try it, and leave the model on the layout that it is exact on."""
    model = scorer.model
    before = model.config._attn_implementation
    ids = [i % model.config.get_text_config().vocab_size for i in range(7, 7 + 19)]
    pairs = [TokenizedPair("a", ids[:5], ids[5:8], ids[8:12]), TokenizedPair("b", ids[12:15], ids[15:18], ids[18:])]
    expected = scorer(pad(pairs).to(device)).logprobs
    allowed = 1e-3
    if dtype != torch.float32:
        # Roundings are larger than that. A layout that is wrong hides some of a pair from some of it, which changes
        # log-probs as much as leaving most of the prompt out does.
        without = [replace(pair, prompt_ids=pair.prompt_ids[-1:]) for pair in pairs]
        allowed = max(allowed, float((scorer(pad(without).to(device)).logprobs - expected).abs().max()) / 4)
    separation = None
    try:
        separation = run_packed(model)
        serves = torch.allclose(scorer(pack(pairs).to(device)).logprobs, expected, rtol=0, atol=allowed)
    except (RuntimeError, TypeError, ValueError, IndexError):
        serves = False  # it cannot take the layout at all
    if not serves:
        if separation is not None:
            separation.end()
        model.set_attn_implementation(before)


def _told_of_layout(model: PreTrainedModel) -> str | None:
    """A line on how pairs are computed, where it is not simply packed with shared prompts."""
    config, layout = model.config.get_text_config(), CompletionScorer(model).layout
    if layout == PADDED:
        return f"{config.model_type} does not run on packed pairs; each completion is computed with its prompt"
    parts = []
    if layout != SHARED:
        parts.append(f"{layout.removeprefix(f'{SHARED}, ')}: each completion with its prompt by itself")
    if (window := attention.window_of(config)) is not None:
        parts.append(f"sliding windows of {window} tokens")
    if attention.is_stepwise(model):
        parts.append("attention step by step, for no kernel has its soft cap or its sinks")
    return f"{config.model_type} runs on packed pairs with shared prompts; {'; '.join(parts)}" if parts else None


class CompletionScorer(nn.Module):
    """The trainer's forward pass: micro-batch → log-probs of its tokens that bear the loss.

    The same module scores the reference (engine `torch`), calibrates vLLM's scores, trains and evaluates.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.adds_gradients_up_at_once = False
        """Whether gradients of a micro-batch go at once to where they are kept, and are added up there."""

    @property
    def packs(self) -> bool:
        """Whether the model runs on the packed, prefix-shared layout."""
        return bool(self.model.config._attn_implementation == attention.IMPLEMENTATION)

    @property
    def layout(self) -> str:
        """How pairs are computed, in words: `padded`, or `shared` and which layers share nothing."""
        if not self.packs:
            return PADDED
        apart = separated(self.model)
        return f"{SHARED}, {' and '.join(sorted(apart))} apart" if apart else SHARED

    def collate(self, pairs: list[TokenizedPair]) -> MicroBatch:
        """The layout that this model can take."""
        return pack(pairs) if self.packs else pad(pairs)

    @property
    def routes(self) -> bool:
        """Whether the model is a mixture of experts that tells what its routers compute."""
        return tells_routing(backbone(self.model))

    def forward(
        self,
        batch: MicroBatch,
        *,
        with_collisions: bool = False,
        with_entropies: bool = False,
        with_routing: bool = False,
    ) -> TokenScores:
        """Scores of the micro-batch's N tokens that bear the loss, in float32; see token_scores.

        Args:
            with_routing: also which experts its tokens went to; for a model that routes.
        """
        extra: dict[str, Any] = {"output_router_logits": True} if with_routing else {}
        if batch.segments is not None:
            extra["segments"] = attention.Segments(batch.segments)
        outputs = backbone(self.model)(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **extra,
        )
        output = self.model.get_output_embeddings()

        def scored(rows: Tensor) -> TokenScores:
            head = output_head(self.model)
            rows = rows.to(head.weight.dtype)
            return token_scores(
                rows, head, batch.targets, with_collisions=with_collisions, with_entropies=with_entropies
            )

        # As the output layer's own forward pass, so that FSDP gathers its weights for this.
        output.forward = scored
        try:
            scores: TokenScores = output(outputs.last_hidden_state.flatten(0, 1)[batch.predictors])
        finally:
            del output.forward
        if not with_routing:
            return scores
        per_token = self.model.config.get_text_config().num_experts_per_tok
        return scores._replace(routing=routing(outputs.router_logits, batch.occurrences, per_token))


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model up to its last hidden states. Some models say that they have it under another name than they do."""
    from transformers import PreTrainedModel

    base = model.base_model
    return base if base is not model else next(m for m in model.children() if isinstance(m, PreTrainedModel))


def output_head(model: PreTrainedModel) -> Head:
    """The model's output layer, with the scaling and soft cap that its configuration names."""
    output = model.get_output_embeddings()
    scale = getattr(model.config, "logit_scale", None) or 1 / (getattr(model.config, "logits_scaling", None) or 1)
    return Head(output.weight, output.bias, scale, getattr(model.config, "final_logit_softcapping", None))


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the weights of a model that only scores to a dtype, in place.

    Buffers, as the rotary frequencies, stay in float32: FSDP's mixed precision leaves them so in training.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def torch_dtype(name: str) -> torch.dtype:
    """float32 or bfloat16 by its name in the configuration."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
