"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from dpo_ray.config import Train


def make_optimizer(model: nn.Module, config: Train) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused; biases and norms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate(step: int, num_steps: int, config: Train) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then cosine or linear decay to 0, or constant."""
    warmup = math.ceil(round(config.warmup_fraction * num_steps, 9))  # .07 · 100 is a little over 7 in floats
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * factor[config.schedule]
