"""How evenly the experts of a mixture are used over a global batch: the loss of it, and what is told of it.

The balance loss is a product of two means over the batch's tokens, so it cannot be summed over micro-batches before the
first of the two is known: how often each expert is chosen, which has no gradient. A batch of several micro-batches is
looked at once without gradients therefore, and each micro-batch adds its part then. The result does not depend on how a
step is cut or spread over ranks, as that of the preference loss does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_ray.config import Train
from dpo_ray.errors import ConfigError
from dpo_ray.model.policy import CompletionScorer
from dpo_ray.model.routing import Routing, balance_loss, most_and_least, router_coefficient
from dpo_ray.training.parallel import Rank, summed


def balance_coefficient(scorer: CompletionScorer, options: Train) -> float:
    """What the balance of experts counts in the loss: as train.router_aux_loss says, or else as the model does.

    Raises ConfigError where the option is set and the model has no routers whose balance could be taken.
    """
    asked, config = options.router_aux_loss, scorer.model.config
    if asked and not scorer.routes:
        raise _without_routers(asked, config)
    if asked is not None:
        return asked
    says = scorer.routes and getattr(config.get_text_config(), "output_router_logits", False)
    return float(router_coefficient(config) or 0.0) if says else 0.0


def require_routers(asked: float | None, config: Any) -> None:
    """What a model's configuration alone tells, before the model is loaded. Raises ConfigError.

    Args:
        asked: train.router_aux_loss.
    """
    if asked and router_coefficient(config) is None:
        raise _without_routers(asked, config)


def _without_routers(asked: float, config: Any) -> ConfigError:
    return ConfigError(
        f"train.router_aux_loss={asked:g} is for mixtures of experts whose configuration has a "
        f"router_aux_loss_coef; {config.model_type} has none. Leave train.router_aux_loss out."
    )


def added(parts: Sequence[Routing]) -> Routing:
    """Of micro-batches together, without gradients and in float64."""
    fields = zip(*parts, strict=True)
    return Routing(*(torch.stack([value.detach().double() for value in values]).sum(0) for values in fields))


def nothing(like: Routing) -> Routing:
    """Of no tokens."""
    return Routing(*(torch.zeros_like(field) for field in like))


def over_ranks(mine: Routing, me: Rank) -> Routing:
    """The sum over all ranks, on each of them."""
    flat = summed(torch.cat([field.flatten() for field in mine]), me)
    parts = flat.split([field.numel() for field in mine])
    return Routing(*(part.view_as(field) for part, field in zip(parts, mine, strict=True)))


@dataclass(frozen=True)
class Balance:
    """Of a step's global batch."""

    coefficient: float
    whole: Routing
    """Over all micro-batches of all ranks; the probabilities need not be known."""

    def part(self, routing: Routing) -> Tensor:
        """A micro-batch's part of the loss, with its gradient; over all of them it adds up to the whole."""
        choices, tokens = self.whole.choices.float(), self.whole.tokens.float()
        return self.coefficient * balance_loss(choices, routing.probabilities, tokens)


def told(routing: Routing) -> dict[str, float]:
    """Metrics of a step: the balance loss before its coefficient, and the shares of the experts chosen most and least.

    Args:
        routing: over the global batch.
    """
    most, least = most_and_least(routing.choices)
    return {"aux_loss": float(balance_loss(*routing)), "experts/most_used": most, "experts/least_used": least}
