"""What is measured: the sizes on a GPU, and tiny ones for a rehearsal on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_ray.config import Model, Train


@dataclass(frozen=True)
class Scale:
    """Sizes of everything."""

    device: torch.device
    large: Mapping[str, int]
    """The model whose steps are timed, as Qwen2Config names its sizes."""
    small: Mapping[str, int]
    """The model that exactness and resuming are looked at with."""
    medians: tuple[int, int, int]
    """Of tokens of prompt, chosen and rejected, log-normal."""
    pairs_per_step: int
    pairs_per_microbatch: int
    """Of the plain padded step too, whose every row is as wide as the widest."""
    steps: int
    """Timed ones, after two that are not."""
    attention: tuple[tuple[int, int, int], ...]
    """Shared, chosen and rejected tokens of the segments of a packed row."""
    window: int
    """Tokens that a layer with a sliding window sees, shorter than the longest segments."""
    head_size: int
    logprobs: tuple[int, int, int]
    """Tokens, hidden size and vocabulary."""
    tiles: tuple[int, ...]
    """Tokens whose logits exist at once."""
    repeats: int
    """Of what is timed by itself."""


ON_GPU = Scale(
    device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cuda"),
    # As Qwen2.5-1.5B has it: 1.5 billion weights.
    large={
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    small={
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    medians=(400, 200, 200),
    pairs_per_step=32,
    pairs_per_microbatch=8,
    steps=8,
    attention=((700, 200, 90), (1, 1, 1), (64, 0, 300), (900, 513, 0), (0, 127, 129), (333, 2, 1000)),
    window=128,
    head_size=128,
    logprobs=(8192, 4096, 151_936),
    tiles=(256, 512, 1024, 2048, 4096),
    repeats=5,
)

_TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

REHEARSAL = Scale(
    device=torch.device("cpu"),
    large=_TINY,
    small=_TINY,
    medians=(12, 6, 6),
    pairs_per_step=4,
    pairs_per_microbatch=2,
    steps=2,
    attention=((7, 3, 2), (1, 1, 1), (4, 0, 5), (6, 4, 0), (0, 3, 4)),
    window=3,
    head_size=8,
    logprobs=(64, 32, 96),
    tiles=(16, 64),
    repeats=2,
)


def write_model(folder: Path, sizes: Mapping[str, int]) -> Path:
    """A random model of these sizes, in bfloat16 as models are published; made where it fits, written once."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, tie_word_embeddings=True, use_sliding_window=False)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def model_options(folder: Path, dtype: str) -> Model:
    """The section `model`."""
    return Model(path=str(folder), dtype=dtype)


def train_options(scale: Scale, **values: Any) -> Train:
    """The section `train`."""
    return Train.model_validate(
        {
            "loss": {"type": "sigmoid", "beta": 0.1},
            "learning_rate": 5e-6,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "global_batch_size": scale.pairs_per_step,
            "use_gpu": scale.device.type == "cuda",
            **values,
        }
    )
