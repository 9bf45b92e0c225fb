"""The section `publish`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dpo_ray.config.push import PushToHub
from dpo_ray.config.section import Section


class Gate(Section):
    """Conditions, each of which must hold for a model to become the latest one."""

    accuracy_above: float | None = Field(0.5, ge=0.0, lt=1.0)
    """The lower end of the interval of the held-out accuracy must lie above this; null: not required."""
    win_rate_above: float | None = Field(None, ge=0.0, lt=1.0)
    """The lower end of the interval of the win rate must lie above this; null: not required."""
    length_controlled_win_rate_above: float | None = Field(None, ge=0.0, lt=1.0)
    """The same of the win rate that would be at answers of equal length; null: not required."""
    kl_below: float | None = Field(None, gt=0.0)
    """The upper end of the interval of the KL from the base model, in nats a token, must lie below this; null: not
    required."""
    chosen_drop_below: float | None = Field(None, gt=0.0)
    """Nats by which the summed log-probs of held-out chosen answers may have fallen: the upper end of the interval of
    their mean fall must lie below this; null: not required."""
    length_ratio_within: tuple[float, float] | None = None
    """Tokens of sampled answers for each token of the other model's (evaluate.win_rate.against): the interval must lie
    within these two; null: not required."""

    no_regression: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default_factory=dict)
    """Set → by how much its accuracy may be below that of the model that is published now: the lower end of the
    interval of the change must lie above minus this. A set of evaluate.sets, or held_out, the run's own. Where nothing
    is published yet the condition holds."""

    @property
    def asks_for_samples(self) -> list[str]:
        """The conditions that need sampled answers."""
        named = ("win_rate_above", "length_controlled_win_rate_above", "kl_below", "length_ratio_within")
        return [name for name in named if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _ordered(self) -> Gate:
        if self.length_ratio_within is not None and not 0 < self.length_ratio_within[0] < self.length_ratio_within[1]:
            raise ValueError(
                f"publish.gate.length_ratio_within={list(self.length_ratio_within)} holds no ratio: name two, the "
                "smaller first, such as [0.5, 1.5]"
            )
        return self


class Publish(Section):
    """What is published."""

    gate: Gate = Gate()
    """What a model must show before it is published."""
    push_to_hub: PushToHub | None = None
    """Where on the Hugging Face Hub it goes then; left out: nowhere."""
