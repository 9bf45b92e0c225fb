"""How many floating-point operations a DPO step needs on the shared layout.

P, C, R tokens of a pair's prompt, chosen and rejected completion. A multiplication and its addition count as two. Each
matrix of the model costs 2 operations a token and weight forward, and twice that backward. Norms, activations, softmax
and the optimizer are not counted: it is what the matrices alone need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.config import LoRA, Train

Lengths = tuple[int, int, int]
"""P, C, R."""


@dataclass(frozen=True)
class ModelShape:
    """The matrices of a decoder."""

    backbone: tuple[tuple[int, int], ...]
    """[out, in] of every matrix between the embeddings and the head, in all layers."""
    head: tuple[int, int]
    """[V, H] of the LM head."""
    num_layers: int
    attention_width: int
    """Query heads times their size."""

    @classmethod
    def of(cls, config: Any, *, trust_remote_code: bool = False) -> ModelShape:
        """Read from the model that a transformers configuration makes, without its weights.

        Of a mixture's experts those count that a token goes through.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        config = config.get_text_config()
        found = [tuple(m.weight.shape) for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        per_token = getattr(config, "num_experts_per_tok", None) or 1
        experts = [p.shape for p in model.base_model.parameters() if p.dim() == 3]
        found += [(per_token * rows, columns) for _, rows, columns in experts]
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            backbone=tuple((rows, columns) for rows, columns in found),
            head=(vocabulary, hidden),
            num_layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * head_size,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelShape:
        """What dataclasses.asdict and JSON made of one."""
        vocabulary, hidden = value["head"]
        return cls(
            backbone=tuple((rows, columns) for rows, columns in value["backbone"]),
            head=(vocabulary, hidden),
            num_layers=value["num_layers"],
            attention_width=value["attention_width"],
        )


def scored_pairs(lengths: Lengths) -> int:
    """Query-key pairs of a layer's causal attention over [prompt|chosen] and the rejected tokens behind the prompt."""
    prompt, chosen, rejected = lengths
    whole = prompt + chosen
    return whole * (whole + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2


def attention_flops(shape: ModelShape, lengths: Lengths) -> int:
    """Forward two products of queries with keys and of scores with values; backward four of that size."""
    return 12 * shape.attention_width * shape.num_layers * scored_pairs(lengths)


def pair_flops(shape: ModelShape, lengths: Lengths) -> int:
    """Forward and backward of a pair whose prompt is computed once; the head on the completions alone."""
    prompt, chosen, rejected = lengths
    weights = sum(rows * columns for rows, columns in shape.backbone)
    vocabulary, hidden = shape.head
    backbone = 6 * weights * (prompt + chosen + rejected)
    head = 6 * vocabulary * hidden * (chosen + rejected)
    return backbone + head + attention_flops(shape, lengths)


def flops(shape: ModelShape, pairs: Iterable[Lengths]) -> int:
    """Of all the pairs together."""
    return sum(pair_flops(shape, lengths) for lengths in pairs)


def total_flops(shape: ModelShape, lengths: np.ndarray) -> float:
    """The same of many pairs at once: lengths [n, 3]."""
    prompt, chosen, rejected = lengths.T.astype(np.float64)
    weights = sum(rows * columns for rows, columns in shape.backbone)
    vocabulary, hidden = shape.head
    whole = prompt + chosen
    scored = whole * (whole + 1) / 2 + rejected * prompt + rejected * (rejected + 1) / 2
    in_tokens = 6.0 * weights * float(lengths.sum(dtype=np.int64))
    in_head = 6.0 * vocabulary * hidden * float(lengths[:, 1:].sum(dtype=np.int64))
    return in_tokens + in_head + 12.0 * shape.attention_width * shape.num_layers * float(scored.sum())


FORWARD = 1 / 3
"""Of forward and backward together."""


def passes(options: Train, lora: LoRA | None) -> float:
    """What a step computes, in forward-and-backward passes over its pairs."""
    # Frozen matrices have no gradient of their own: of three products a matrix two are left.
    whole = 2 / 3 if lora is not None else 1.0
    again = FORWARD / options.recomputes_every if options.recomputes_every else 0.0
    # All log-probs are known before the first gradient, and so is the use of experts; mismatched completions are never
    # trained on.
    before = FORWARD * (options.loss.couples_batch + options.loss.needs_mismatched + bool(options.router_aux_loss))
    return whole + again + before
