"""Rules by which scored completions of a prompt become pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section


class Pairing(Section):
    """Which completions of a prompt are set against each other. What a rule drops is counted under the rule's name."""

    strategy: Literal["best_worst", "best_random", "all", "top_k"] = "best_worst"
    """best_worst: best against worst, second best against second worst, and so on, each completion in one pair at most.
    best_random: the best against others, drawn by their hash. all: every two, those furthest apart first. top_k: the
    best, the second best and so on, each against the worst."""
    min_score_gap: float = Field(0.1, gt=0.0)
    """A pair whose scores are nearer than this is no pair: `tie` where they are equal, else `small_gap`."""
    pairs_per_prompt: int = Field(1, ge=1)
    """At most so many pairs a prompt."""
    max_similarity: float | None = Field(None, gt=0.0, lt=1.0)
    """`near_identical`: two answers more alike than this, by the share of their words that stand in both in the same
    order (2·matching / all, the ratio of difflib). null: only equal ones are left out."""
    max_length_ratio: float | None = Field(None, gt=1.0)
    """`length_ratio`: the longer answer has more than so many times the characters of the shorter. null: any."""
    drop_echoes: bool = True
    """`echo`: an answer that begins by saying the whole of the user's last turn again, if that has five words or more,
    is a side of no pair."""


class CandidatePairing(Pairing):
    """The same for generated candidates, of which more is known."""

    truncated: Literal["keep", "only_rejected", "drop"] = "keep"
    """Of an answer that was cut at sampling.max_tokens. only_rejected: it is chosen in no pair. drop: it is a side of
    none; either is counted as `truncated`."""
    sources_agree: bool = False
    """`sources_disagree`: where several sources score, none may prefer the rejected answer to the chosen one."""
    max_logprob_margin: float | None = None
    """`already_likely`: the model that sampled both answers prefers the chosen one by more than so many nats of summed
    log-probs already, and there is little left to learn. null: any. Answers of two models, or with two
    system prompts, are not compared."""
