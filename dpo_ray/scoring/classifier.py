"""Sequence classifiers of Hugging Face, as transformers runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpo_ray.config import RewardModel
from dpo_ray.errors import ConfigError
from dpo_ray.model.policy import torch_dtype
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.scoring.models import model_of

_BATCH_TOKENS = 4096


class TorchClassifier:
    """A classifier in the precision that the source names, on a GPU where there is one. Dialogues are batched by their
    tokens.

    Raises ConfigError where the model is no sequence classifier.
    """

    def __init__(self, source: RewardModel):
        folder = ModelFolder.of(model_of(source))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = _load(source, folder)
        self.model = model.to(self._device, torch_dtype(source.dtype)).eval()
        # It finds a dialogue's last token by what is no padding. As it was trained: its own padding, before the
        # tokenizer's; without either, no dialogue is padded.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = folder.tokenizer().pad_token_id
        self._pad = model.config.pad_token_id
        self.num_logits: int = model.config.num_labels

    @torch.inference_mode()
    def logits(self, dialogues: Sequence[list[int]]) -> list[list[float]]:
        """Token ids of each dialogue → [dialogues, num_logits], not normalised."""
        found: list[list[float]] = [[] for _ in dialogues]
        lengths = [len(one) for one in dialogues]
        for group in self._batches(lengths):
            longest = max(lengths[i] for i in group)
            padded = [dialogues[i] + [self._pad or 0] * (longest - lengths[i]) for i in group]
            mask = [[1] * lengths[i] + [0] * (longest - lengths[i]) for i in group]
            output = self.model(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
            )
            for i, logits in zip(group, output.logits.float().tolist(), strict=True):
                found[i] = logits
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


_OTHER_MODEL = (
    "Name a model that was trained as a reward model; for a policy trained by DPO use a source of type implicit."
)


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
            f"The reward model {source.path} cannot be loaded as a sequence classifier ({error}). {_OTHER_MODEL}"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ConfigError(
            f"The reward model {source.path} lacks {', '.join(missing[:3])}: it is no sequence classifier, and its "
            f"scores would be those of a head drawn at random. {_OTHER_MODEL}"
        )
    return model
