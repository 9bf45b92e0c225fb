"""A reward model: a sequence classifier of Hugging Face, whose logit of a whole dialogue is the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dpo_ray.config import RewardModel
from dpo_ray.data.chat import ChatTokenizer, parse_tools, require_chat_template
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.policy import torch_dtype
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import Message
from dpo_ray.scoring.models import model_of
from dpo_ray.scoring.scorer import Row, Scored

_BATCH_TOKENS = 4096


class RewardModelScorer:
    """Scores each completion by the logit of its dialogue, as the chat template writes it.

    Raises ConfigError where the model is no sequence classifier, or has several logits and none is named.
    """

    def __init__(self, source: RewardModel):
        folder = ModelFolder.of(model_of(source))
        tokenizer = folder.tokenizer()
        require_chat_template(tokenizer, source.path)
        self._chat = ChatTokenizer(tokenizer)
        self._max_tokens = source.max_tokens
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = _load(source, folder)
        self._model = model.to(self._device, torch_dtype(source.dtype)).eval()
        # It finds a dialogue's last token by what is no padding. As it was trained: its own padding, before the
        # tokenizer's; without either, no dialogue is padded.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self._pad = model.config.pad_token_id
        self._logit = _logit(source, model.config.num_labels)

    def score(self, rows: Sequence[Row]) -> list[list[Scored]]:
        """Raises DataError on a logit that is not finite, or where the template refuses a dialogue."""
        dialogues = [
            ([*row["prompt"], Message(role="assistant", content=completion["text"])], parse_tools(row.get("tools")))
            for row in rows
            for completion in row["completions"]
        ]
        ids = self._chat.dialogues(dialogues)
        logits = self._logits([one[-self._max_tokens :] for one in ids])
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

    @torch.inference_mode()
    def _logits(self, sequences: list[list[int]]) -> list[float]:
        found = [0.0] * len(sequences)
        lengths = [len(one) for one in sequences]
        for group in self._batches(lengths):
            longest = max(lengths[i] for i in group)
            padded = [sequences[i] + [self._pad or 0] * (longest - lengths[i]) for i in group]
            mask = [[1] * lengths[i] + [0] * (longest - lengths[i]) for i in group]
            output = self._model(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
            )
            for i, logit in zip(group, output.logits[:, self._logit].float().tolist(), strict=True):
                found[i] = logit
        return found

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        if self._pad is None:
            return [[i] for i in range(len(lengths))]
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        groups: list[list[int]] = []
        for i in order:
            if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= _BATCH_TOKENS:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups


def _load(source: RewardModel, folder: ModelFolder) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            folder.path,
            dtype=torch.float32,
            trust_remote_code=folder.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ValueError as error:
        raise ConfigError(
            f"The reward model {source.path} cannot be loaded as a sequence classifier: {error}."
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ConfigError(
            f"The reward model {source.path} lacks {', '.join(missing[:3])}: it is no sequence classifier, and its "
            "scores would be those of a head drawn at random. Name a model that was trained as a reward model; for a "
            "policy trained by DPO use a source of type implicit."
        )
    return model


def _logit(source: RewardModel, count: int) -> int:
    if source.logit is None and count > 1:
        raise ConfigError(
            f"The reward model {source.path} has {count} logits, and it is not said which one is the score: set "
            f"`logit` to one of 0 to {count - 1}."
        )
    if source.logit is not None and source.logit >= count:
        raise ConfigError(f"The reward model {source.path} has {count} logits, and `logit` is {source.logit}.")
    return source.logit or 0
