"""Rounds in which the policy is trained on pairs of its own samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section


class Iterate(Section):
    """Rounds of sampling, training and measuring."""

    rounds: int = Field(3, ge=1)
    """At most so many."""
    stop_early: bool = True
    """No further round after one that does not improve the held-out win rate: where the lower end of its interval does
    not lie above the best round's value. false: all rounds."""
    prompts: Literal["fresh", "repeated"] = "fresh"
    """fresh: each round has its own part of the prompts. repeated: each round has all of them."""
    reference: Literal["current", "first"] = "current"
    """What the loss compares with: the policy that the round begins with, or the model of the first round."""
    replay: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of a round's training pairs that are of earlier rounds, where these have enough."""
