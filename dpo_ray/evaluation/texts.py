"""What can be told of sampled answers without a judge: length, repetition, diversity, refusals, nothing at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m\s+(?:very\s+)?sorry\b|i\s+am\s+(?:very\s+)?sorry\b|sorry\b|i\s+apologi[sz]e\b|my\s+apologies\b"
    r"|(?:unfortunately|regrettably)\W+i\b|as\s+an?\s+(?:ai|language\s+model|assistant)\b"
    r"|i\s+(?:cannot|can['’]?t|can\s+not|won['’]?t|will\s+not|am\s+unable|am\s+not\s+able|must\s+decline)\b"
    r"|i['’]m\s+(?:unable|not\s+able|not\s+comfortable)\b)",
    re.I,
)


def is_refusal(text: str) -> bool:
    """Whether an English answer opens as refusals do. An apology that goes on to answer counts as well."""
    return bool(_REFUSAL.match(text))


def repetition(text: str, n: int = 3) -> float:
    """The share of its sequences of n words that stand before in it; 0 for less than n words."""
    sequences = list(_sequences(text, n))
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n (Li et al. 2016, arXiv:1510.03055): of all sequences of n words of the texts, the share that are
    different ones. It falls with the number of texts, so that only as many texts may be compared. 0 without sequences.
    """
    counts = Counter(sequence for text in texts for sequence in _sequences(text, n))
    total = sum(counts.values())
    return len(counts) / total if total else 0.0


def _sequences(text: str, n: int) -> Iterable[Sequence[str]]:
    words = text.lower().split()
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
