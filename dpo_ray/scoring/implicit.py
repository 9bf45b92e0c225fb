"""The implicit reward of a policy trained by DPO: beta·(log π(y|x) − log π_ref(y|x)) (arXiv:2305.18290, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

from dpo_ray.config import ImplicitReward, Model
from dpo_ray.data.chat import ChatTokenizer, Prompt, parse_tools, require_chat_template
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.pair_scorer import PairScorer, TorchScorer
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.scoring.models import model_of
from dpo_ray.scoring.scorer import Row, Scored


class ImplicitScorer:
    """Scores by the difference of two models' log-probs, as the trainer's own forward gives them.

    Raises ConfigError where the two do not have the same tokenizer.
    """

    def __init__(self, source: ImplicitReward, reference: Model):
        policy = model_of(source)
        tokenizer, other = (ModelFolder.of(model).tokenizer() for model in (policy, reference))
        # Not by their files: a tokenizer that is loaded and saved again writes others.
        if _writes(tokenizer) != _writes(other):
            raise ConfigError(
                f"The policy {source.policy} and the reference {reference.path} have other tokenizers or chat "
                "templates, so their log-probs are of other tokens. Name the model that the policy was trained from."
            )
        require_chat_template(tokenizer, source.policy)
        self._chat = ChatTokenizer(tokenizer, reference.template_arguments)
        self._source = source
        self._models = [TorchScorer(policy), TorchScorer(reference)]

    def score(self, rows: Sequence[Row]) -> list[list[Scored]]:
        """Raises DataError on log-probs that are not finite, or where the template refuses a dialogue."""
        prompts = self._chat.prompts([(row["prompt"], parse_tools(row.get("tools"))) for row in rows])
        answers = [(p, c["text"]) for p, row in zip(prompts, rows, strict=True) for c in row["completions"]]
        completions = iter(self._chat.completions(answers))
        of_rows = [[_said(next(completions).ids, one["finished"]) for one in row["completions"]] for row in rows]
        policy, reference = (_logprobs(model, prompts, of_rows) for model in self._models)
        return [
            [self._scored(*both) for both in zip(*of_row, strict=True)]
            for of_row in zip(policy, reference, strict=True)
        ]

    def _scored(self, policy: list[float], reference: list[float]) -> Scored:
        count = len(policy) if self._source.per_token else 1
        logps = {"policy": math.fsum(policy) / count, "reference": math.fsum(reference) / count}
        score = self._source.beta * (logps["policy"] - logps["reference"])
        if not math.isfinite(score):
            raise DataError(
                f"The implicit reward of {self._source.policy} is not finite: the weights of the policy or of the "
                "reference are damaged, or dtype is too narrow: try float32."
            )
        return Scored(score, logps)


def _said(ids: list[int], finished: bool) -> list[int]:
    """A completion's ids; of one that was cut, without the end of the turn, to which it did not come."""
    return ids if finished or len(ids) == 1 else ids[:-1]


def _logprobs(
    model: PairScorer, prompts: Sequence[Prompt], completions: Sequence[list[list[int]]]
) -> list[list[list[float]]]:
    """Row → completion → log-probs of its tokens. Two completions of a prompt go as the sides of a pair, for which the
    prompt is computed once.
    """
    pairs = []
    for prompt, of_row in zip(prompts, completions, strict=True):
        for n in range(0, len(of_row), 2):
            second = of_row[n + 1] if n + 1 < len(of_row) else []
            pairs.append(TokenizedPair("", prompt.ids, of_row[n], second))
    chosen, rejected = model.score(pairs)
    found = iter([side for both in zip(chosen, rejected, strict=True) for side in both])
    return [list(islice(found, len(of_row) + len(of_row) % 2))[: len(of_row)] for of_row in completions]


def _writes(tokenizer: Any) -> tuple[dict[str, int], Any]:
    """What a dialogue's tokens are made by: the vocabulary and the chat template."""
    return tokenizer.get_vocab(), tokenizer.chat_template
