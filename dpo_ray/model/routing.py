"""Which experts the tokens of a micro-batch are sent to, and how evenly, as a mixture of experts says of itself.

L layers with a router, E experts, T positions of a micro-batch. A token counts once for each sequence that it stands in
and by its pair's weight, and padding does not: so figures do not depend on how pairs are laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Sums over the tokens of one or more micro-batches, which add up."""

    choices: Tensor
    """[L, E] float32: how often each expert was chosen; a token chooses several."""
    probabilities: Tensor
    """[E] float32, over all layers: what the routers give each expert before they choose. With gradient."""
    tokens: Tensor
    """[] float32: tokens, once for each layer."""


def routing(router_logits: Sequence[Tensor], occurrences: Tensor, experts_per_token: int) -> Routing:
    """Count a micro-batch.

    Args:
        router_logits: of each layer, [T, E] or [rows, T / rows, E].
        occurrences: [rows, T / rows] what each position counts.
    """
    counts = occurrences.flatten().float()
    chosen, probabilities = [], []
    for logits in router_logits:
        flat = logits.reshape(len(counts), -1).float()
        best = flat.detach().topk(experts_per_token, dim=-1).indices
        chosen.append(torch.zeros_like(flat).scatter_(1, best, 1.0).T @ counts)
        probabilities.append((flat.softmax(-1) * counts[:, None]).sum(0))
    return Routing(
        choices=torch.stack(chosen).detach(),
        probabilities=torch.stack(probabilities).sum(0),
        tokens=counts.sum() * len(chosen),
    )


def balance_loss(choices: Tensor, probabilities: Tensor, tokens: Tensor) -> Tensor:
    """E Σ_e f_e P_e: f_e how often a token chooses expert e, P_e its mean probability (arXiv:2101.03961, eq. 4–6).

    Over all layers together, as transformers takes it; where k of E experts are chosen evenly it is k. It is linear in
    the probabilities: given the whole batch's choices and tokens, its parts add up to the loss of the whole.

    Args:
        choices: [L, E]; probabilities: [E]; tokens: [], all as in Routing.
    """
    return choices.shape[1] * ((choices.sum(0) / tokens) * (probabilities / tokens)).sum()


def most_and_least(choices: Tensor) -> tuple[float, float]:
    """The largest and the smallest share that an expert has of the choices of its layer, over all layers.

    Args:
        choices: [L, E].
    """
    shares = choices / choices.sum(1, keepdim=True)
    return float(shares.max()), float(shares.min())


def router_coefficient(config: Any) -> float | None:
    """What a configuration counts the balance of its routers in the loss; None where it has none to be balanced."""
    return getattr(config.get_text_config(), "router_aux_loss_coef", None)


def tells_routing(backbone: Any) -> bool:
    """Whether transformers hands out what a model's routers compute, and means to balance them."""
    recorded = getattr(backbone, "_can_record_outputs", None) or {}
    return "router_logits" in recorded and router_coefficient(backbone.config) is not None
