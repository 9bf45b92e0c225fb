"""Which completions are set against each other: candidates of a prompt as pairs, and rows as mismatched ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dpo_ray.errors import DataError
from dpo_ray.pairs import Message, PreferencePair, TokenizedPair


def make_pairs(
    prompt: Sequence[Message],
    completions: Sequence[str],
    scores: Sequence[float],
    *,
    min_score_gap: float,
    pairs_per_prompt: int,
    tools: str | None = None,
) -> tuple[list[PreferencePair], Counter[str]]:
    """Best against worst, second best against second worst, and so on, each completion in one pair at most.

    Completions that are equal but for outer white space count once (`duplicate`), empty ones not at all
    (`empty_response`); a pair whose scores differ by less than `min_score_gap` is a `tie` and ends the prompt,
    for the pairs after it are nearer still.

    Args:
        tools: those of the prompt, as PreferencePair has them.

    Returns the pairs and the counts of what was passed over, by reason. Raises DataError on a score that is not finite.
    """
    passed_over: Counter[str] = Counter()
    distinct: dict[str, float] = {}
    for completion, score in zip(completions, scores, strict=True):
        if not math.isfinite(score):
            raise DataError(
                f"The reward gave {score} to the completion {completion[:80]!r}. It must give a finite number."
            )
        text = completion.strip()
        if not text:
            passed_over["empty_response"] += 1
        elif text in distinct:
            passed_over["duplicate"] += 1
        else:
            distinct[text] = score
    # Ties in score are broken by the text, so that the order in which an engine returns samples is no matter.
    ranked = sorted(distinct, key=lambda text: (-distinct[text], text))
    pairs = []
    for i in range(min(pairs_per_prompt, len(ranked) // 2)):
        chosen, worst = ranked[i], ranked[-1 - i]
        gap = distinct[chosen] - distinct[worst]
        # 0.3 − 0.2 is a little less than 0.1 in binary.
        if gap < min_score_gap and not math.isclose(gap, min_score_gap):
            passed_over["tie"] += 1
            break
        pairs.append(PreferencePair(tuple(prompt), chosen, worst, tools))
    if not ranked or len(ranked) == 1:
        passed_over["too_few_distinct"] += 1
    return pairs, passed_over


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
        )
        for pair in pairs
        if pair.mismatched_ids is not None
    ]
