"""The reward of own_reward.py: in a file of its own, for Ray's workers import it."""

from __future__ import annotations

import re


def house_style(prompt: str, completion: str, finished: bool, *, words: int = 12) -> dict[str, float]:
    """Parts, whose sum is the score: a short answer, that comes to its end, and that is no list."""
    length = len(completion.split())
    return {
        "short": min(1.0, words / max(length, 1)),
        "complete": 0.5 * finished,
        "no_list": -1.0 * bool(re.search(r"^\s*(?:[-*]|\d+\.)\s", completion, re.M)),
    }
