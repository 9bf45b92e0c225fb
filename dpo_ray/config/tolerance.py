"""How far the reference log-probs may be from the trainer's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from dpo_ray.config.reward import Dtype
from dpo_ray.config.section import Section


@dataclass(frozen=True)
class Limits:
    """Three limits in nats, each of which catches what the other two let pass."""

    bias_per_token: float
    p99_per_token: float
    worst_token: float


_BY_DTYPE: dict[Dtype, Limits] = {
    "float32": Limits(bias_per_token=5e-4, p99_per_token=1e-2, worst_token=5e-2),
    "bfloat16": Limits(bias_per_token=5e-3, p99_per_token=0.5, worst_token=1.0),
}
"""From benchmarks/reference_gate.md, which says how far above rounding they are."""


class Tolerance(Section):
    """What is left out follows from model.dtype: rounding alone makes differences, far larger ones in bfloat16."""

    bias_per_token: float | None = Field(None, gt=0.0)
    """Largest mean of Δ over all tokens, in nats, its sign kept; three standard errors of it are allowed for. Noise
    averages out over a completion, and a bias does not: it prefers long or short answers."""
    p99_per_token: float | None = Field(None, gt=0.0)
    """Largest 99th percentile of |Δ| over the tokens, in nats: of another model, most tokens are off."""
    worst_token: float | None = Field(None, gt=0.0)
    """Largest |Δ| of the token of a completion that is farthest off, in nats, in the median over completions: a wrong
    first token in each is less than a percent of all tokens."""

    @model_validator(mode="before")
    @classmethod
    def _no_number(cls, given: Any) -> Any:
        if not isinstance(given, int | float):
            return given
        raise ValueError(
            f"reference.tolerance={given} is its earlier form, one number for the sum over a completion, which grows "
            "with its length. It has limits per token now: leave it out, and they follow from model.dtype; or name "
            f"them: reference.tolerance={{{', '.join(f'{name}: …' for name in cls.model_fields)}}}"
        )

    def limits(self, dtype: Dtype) -> Limits:
        """All three, in nats."""
        return Limits(**(vars(_BY_DTYPE[dtype]) | self.model_dump(exclude_none=True)))
