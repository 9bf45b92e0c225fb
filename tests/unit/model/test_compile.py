"""Compiled decoder layers: the same numbers, and one compilation for all packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_ray.config import Train
from dpo_ray.errors import ConfigError
from dpo_ray.model import attention
from dpo_ray.model.policy import CompletionScorer, compile_layers, load_policy
from dpo_ray.training.parallel import Rank, parallelize
from tests.rounding import GRADIENT, GRADIENT_BFLOAT16, of_logprob, require_gradients, ulps
from tests.training import random_pairs

# Other lengths and other numbers of pairs.
ROWS = [random_pairs(count, seed=count) for count in (3, 5, 2, 8, 4, 7)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    AttentionInterface.register(attention.IMPLEMENTATION, attention.packed_attention)


def values_and_gradients(forward: torch.nn.Module, scorer: CompletionScorer) -> list[list[torch.Tensor]]:
    found = []
    for pairs in ROWS:
        scorer.zero_grad()
        logprobs = forward(scorer.collate(pairs)).logprobs
        logprobs.sum().backward()
        gradients = [p.grad for p in scorer.parameters()]
        found.append([logprobs.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients)])
    return found


@pytest.mark.parametrize(
    ("dtype", "near", "gradients_near", "checkpointing"),
    [
        (torch.float32, of_logprob(512), GRADIENT, False),
        (torch.bfloat16, ulps(8, 0.25, torch.bfloat16), GRADIENT_BFLOAT16, True),  # logits are below ½
    ],
)
def test_compiled_layers_give_the_same_and_are_compiled_once(
    small_model: Path, dtype: torch.dtype, near: float, gradients_near: float, checkpointing: bool
):
    found = []
    counter = CompileCounterWithBackend("aot_eager")
    compilations = []
    for compiled in (False, True):
        policy = load_policy(small_model, activation_checkpointing=checkpointing)
        if compiled:
            compile_layers(policy, backend=counter)
        scorer = CompletionScorer(policy).train()
        assert scorer.packs
        # In bfloat16 as on a GPU, the only place where layers are compiled: wrapped by FSDP.
        strategy = "ddp" if dtype == torch.float32 else "fsdp"
        forward = parallelize(scorer, strategy, Rank(0, 1, torch.device("cpu")), dtype)
        if compiled:
            forward(scorer.collate(ROWS[0])).logprobs.sum().backward()
            compilations.append(counter.frame_count)
        found.append(values_and_gradients(forward, scorer))
    compilations.append(counter.frame_count)
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other[0], plain[0], rtol=0, atol=near)
        require_gradients(other[1:], plain[1:], gradients_near)
    assert compilations[0] > 0
    assert compilations[0] == compilations[1], "a packed row of other lengths was compiled again"


def test_a_model_that_names_no_layers_is_not_compiled(small_model: Path):
    policy = load_policy(small_model)
    policy._no_split_modules = None
    with pytest.raises(ConfigError, match=r"train\.compile=false"):
        compile_layers(policy)


def test_compiling_on_cpu_is_refused():
    with pytest.raises(ValidationError, match=r"train\.use_gpu is false"):
        Train(compile=True)
    assert Train(compile=True, use_gpu=True).identity() == Train(use_gpu=False).identity()


def test_a_model_that_is_compiled_before_its_layout_is_chosen_keeps_its_attention_from_the_compiler(small_model: Path):
    attention.register()
    attention.hide_from_compiler()
    hidden = ALL_ATTENTION_FUNCTIONS[attention.IMPLEMENTATION]
    load_policy(small_model)  # as a training does after it has compiled the layers
    assert ALL_ATTENTION_FUNCTIONS[attention.IMPLEMENTATION] is hidden is not attention.packed_attention
