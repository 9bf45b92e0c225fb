"""A reward model: a sequence classifier of Hugging Face, whose logit of a whole dialogue is the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from dpo_ray.config import RewardModel
from dpo_ray.data.chat import ChatTokenizer, parse_tools, require_chat_template
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import Message
from dpo_ray.scoring.models import model_of
from dpo_ray.scoring.scorer import Row, Scored


class Classifier(Protocol):
    """A model that gives logits to a whole dialogue."""

    num_logits: int
    """Logits of a dialogue."""

    def logits(self, dialogues: Sequence[list[int]]) -> list[list[float]]:
        """Token ids of each dialogue → [dialogues, num_logits], not normalised."""
        ...


class RewardModelScorer:
    """Scores each completion by the logit of its dialogue, as the chat template writes it.

    Args:
        classifier: the source's model.

    Raises ConfigError where it has several logits and none is named.
    """

    def __init__(self, source: RewardModel, classifier: Classifier):
        tokenizer = ModelFolder.of(model_of(source)).tokenizer()
        require_chat_template(tokenizer, source.path)
        self._chat = ChatTokenizer(tokenizer)
        self._max_tokens = source.max_tokens
        self._classifier = classifier
        self._logit = _logit(source, classifier.num_logits)

    def score(self, rows: Sequence[Row]) -> list[list[Scored]]:
        """Raises DataError on a logit that is not finite, or where the template refuses a dialogue."""
        dialogues = [
            ([*row["prompt"], Message(role="assistant", content=completion["text"])], parse_tools(row.get("tools")))
            for row in rows
            for completion in row["completions"]
        ]
        ids = self._chat.dialogues(dialogues)
        logits = [of_one[self._logit] for of_one in self._classifier.logits([one[-self._max_tokens :] for one in ids])]
        cut = [("reward_cut",) if len(one) > self._max_tokens else () for one in ids]
        scored = iter([Scored(logit, {}, noted) for logit, noted in zip(logits, cut, strict=True)])
        found = [[next(scored) for _ in row["completions"]] for row in rows]
        for row, of_row in zip(rows, found, strict=True):
            if not all(math.isfinite(one.score) for one in of_row):
                raise DataError(
                    f"The reward model gave a completion of the prompt {row['prompt_id']} a logit that is not finite. "
                    "Its weights may be damaged, or its dtype too narrow: try float32."
                )
        return found


def _logit(source: RewardModel, count: int) -> int:
    if source.logit is None and count > 1:
        raise ConfigError(
            f"The reward model {source.path} has {count} logits, and it is not said which one is the score: set "
            f"`logit` to one of 0 to {count - 1}."
        )
    if source.logit is not None and source.logit >= count:
        raise ConfigError(
            f"The reward model {source.path} has {count} logits, and `logit` is {source.logit}. They are counted from "
            f"0: set it to {count - 1} at most."
        )
    return source.logit or 0
