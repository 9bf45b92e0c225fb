"""Which completions are set against each other: candidates of a prompt as pairs, and rows as mismatched ones."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpo_ray.config import CandidatePairing, Pairing
from dpo_ray.errors import DataError
from dpo_ray.pairs import TIE, Message, PreferencePair, TokenizedPair

RULES = 1
"""Raised when the same candidates and options make other pairs than before."""
_ECHOED_WORDS = 5  # "Hello" may be answered by "Hello"


@dataclass(frozen=True)
class Candidate:
    """A completion that a pair may be made of."""

    text: str
    score: float
    finished: bool = True
    """It ended of itself, and was not cut."""
    logprob: float | None = None
    """Its summed log-prob, in nats, under the model that sampled it."""
    model: str = ""
    """Hash of that model."""
    system_prompt: str | None = None
    """What it was asked with in place of the prompt's own."""
    by_source: Mapping[str, float] = field(default_factory=dict)
    """Source → its share in the score."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """For the lineage of its pairs."""


class Couple(NamedTuple):
    """Two candidates of a prompt, of which one is the better."""

    chosen: Candidate
    rejected: Candidate

    def pair(self, prompt: Sequence[Message], tools: str | None = None) -> PreferencePair:
        preference = TIE if self.chosen.score == self.rejected.score else None
        return PreferencePair(tuple(prompt), self.chosen.text, self.rejected.text, tools, preference=preference)


def make_pairs(
    prompt: Sequence[Message], candidates: Sequence[Candidate], rules: Pairing, *, keep_ties: bool = False
) -> tuple[list[Couple], Counter[str]]:
    """The pairs of a prompt, by the rules of dpo_ray.config.pairing.

    Candidates that are equal but for outer white space count once, the first of them (`duplicate`), and empty ones not
    at all (`empty_response`). Under every strategy but best_random a pair whose scores are too near (`tie`,
    `small_gap`) ends the prompt, for those after it are nearer still; unless equal scores make a pair too (keep_ties).
    Texts of the pairs are without outer white space.

    Returns the pairs and the counts of what was passed over, by reason. Raises DataError on a score that is not finite.
    """
    passed_over: Counter[str] = Counter()
    sides: dict[str, Candidate] = {}
    for candidate in candidates:
        if not math.isfinite(candidate.score):
            raise DataError(
                f"The score of the completion {candidate.text[:80]!r} is {candidate.score}. It must be a finite number."
            )
        text = candidate.text.strip()
        reason = _unfit(text, candidate, prompt, rules) or ("duplicate" if text in sides else None)
        if reason is None:
            sides[text] = Candidate(**{**vars(candidate), "text": text})
        else:
            passed_over[reason] += 1
    # Ties in score are broken by the text, so that the order in which an engine returns samples is no matter.
    ranked = sorted(sides.values(), key=lambda c: (-c.score, c.text))
    if len(ranked) < 2:
        passed_over["too_few_distinct"] += 1
    pairs: list[Couple] = []
    for couple in _STRATEGIES[rules.strategy](ranked, prompt):
        if len(pairs) == rules.pairs_per_prompt:
            break
        reason = _refused(couple, rules, keep_ties=keep_ties)
        if reason is None:
            pairs.append(couple)
            continue
        passed_over[reason] += 1
        if reason in {"tie", "small_gap"} and rules.strategy != "best_random" and not keep_ties:
            break
    return pairs, passed_over


def _unfit(text: str, candidate: Candidate, prompt: Sequence[Message], rules: Pairing) -> str | None:
    """Why a candidate is a side of no pair."""
    if not text:
        return "empty_response"
    if rules.drop_echoes and _is_echo(text, prompt[-1]["content"]):
        return "echo"
    if isinstance(rules, CandidatePairing) and rules.truncated == "drop" and not candidate.finished:
        return "truncated"
    return None


def _is_echo(text: str, asked: str) -> bool:
    words = _words(asked)
    return len(words) >= _ECHOED_WORDS and _words(text)[: len(words)] == words


def _refused(couple: Couple, rules: Pairing, *, keep_ties: bool) -> str | None:
    """Why two candidates make no pair."""
    chosen, rejected = couple
    gap = chosen.score - rejected.score
    if gap == 0 and not keep_ties:
        return "tie"
    # 0.3 − 0.2 is a little less than 0.1 in binary.
    if 0 < gap < rules.min_score_gap and not math.isclose(gap, rules.min_score_gap):
        return "small_gap"
    lengths = sorted((len(chosen.text), len(rejected.text)))
    if rules.max_length_ratio is not None and lengths[1] > rules.max_length_ratio * lengths[0]:
        return "length_ratio"
    if rules.max_similarity is not None and _similarity(chosen.text, rejected.text) > rules.max_similarity:
        return "near_identical"
    return _refused_candidates(couple, rules) if isinstance(rules, CandidatePairing) else None


def _refused_candidates(couple: Couple, rules: CandidatePairing) -> str | None:
    chosen, rejected = couple
    if rules.truncated == "only_rejected" and not chosen.finished:
        return "truncated"
    if rules.sources_agree and any(chosen.by_source[s] < rejected.by_source[s] for s in chosen.by_source):
        return "sources_disagree"
    if rules.max_logprob_margin is not None and _same_source(chosen, rejected):
        if chosen.logprob is None or rejected.logprob is None:
            raise DataError(
                f"pairing.max_logprob_margin={rules.max_logprob_margin:g} needs the log-probs of the samples, and "
                "these candidates have none: sample them anew, or leave the rule out."
            )
        if chosen.logprob - rejected.logprob > rules.max_logprob_margin:
            return "already_likely"
    return None


def _same_source(one: Candidate, other: Candidate) -> bool:
    return (one.model, one.system_prompt) == (other.model, other.system_prompt)


def _similarity(one: str, other: str) -> float:
    """2·m / (a + b) of the words of two texts, m of which match in order; the order of the two does not matter."""
    first, second = sorted((_words(one), _words(other)))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def _words(text: str) -> list[str]:
    return text.lower().split()


def _nested(ranked: Sequence[Candidate], prompt: Sequence[Message]) -> Iterator[Couple]:
    for i in range(len(ranked) // 2):
        yield Couple(ranked[i], ranked[-1 - i])


def _best_against_random(ranked: Sequence[Candidate], prompt: Sequence[Message]) -> Iterator[Couple]:
    asked = "\n".join(message["content"] for message in prompt)

    def drawn(candidate: Candidate) -> str:
        return hashlib.sha256(f"{asked}\n{candidate.text}".encode()).hexdigest()

    for other in sorted(ranked[1:], key=drawn):
        yield Couple(ranked[0], other)


def _all(ranked: Sequence[Candidate], prompt: Sequence[Message]) -> Iterator[Couple]:
    couples = [Couple(*two) for two in itertools.combinations(ranked, 2)]
    yield from sorted(couples, key=lambda c: c.rejected.score - c.chosen.score)  # sorted keeps the order of equals


def _best_against_worst(ranked: Sequence[Candidate], prompt: Sequence[Message]) -> Iterator[Couple]:
    for better in ranked[:-1]:
        yield Couple(better, ranked[-1])


_STRATEGIES: dict[str, Callable[[Sequence[Candidate], Sequence[Message]], Iterator[Couple]]] = {
    "best_worst": _nested,
    "best_random": _best_against_random,
    "all": _all,
    "top_k": _best_against_worst,
}


def mismatched_rows(prompt_ids: Sequence[str], splits: Sequence[str]) -> list[int | None]:
    """For each row the row whose completion does not answer its prompt: KTO's mismatched completion.

    It is the next row, cyclically, of the same split that has another prompt; None where the split has only this
    prompt. The cyclic shift is that of arXiv:2402.01306, where it runs over a batch; here it is over a shard, so that
    the reference log-probs can be computed once, before training.
    """
    found: list[int | None] = [None] * len(prompt_ids)
    for split in set(splits):
        rows = [i for i, side in enumerate(splits) if side == split]
        after: int | None = None
        # Backwards and twice around, for what follows the last rows stands at the start.
        for k in reversed(range(2 * len(rows))):
            here, beside = rows[k % len(rows)], rows[(k + 1) % len(rows)]
            if prompt_ids[beside] != prompt_ids[here]:
                after = beside
            found[here] = after
    return found


def mismatched(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Each pair's prompt with its mismatched completion as the chosen side, and no rejected one.

    For KTO's z0 (arXiv:2402.01306). Pairs without a mismatched completion are left out.
    """
    return [
        TokenizedPair(
            pair_id=pair.pair_id,
            prompt_ids=pair.prompt_ids,
            chosen_ids=pair.mismatched_ids,
            rejected_ids=[],
            chosen_ref_logprobs=pair.mismatched_ref_logprobs,
            chosen_mask=pair.mismatched_mask,
            weight=pair.weight,
        )
        for pair in pairs
        if pair.mismatched_ids is not None
    ]
