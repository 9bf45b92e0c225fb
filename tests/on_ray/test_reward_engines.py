"""A reward model by vLLM's pooling runner, beside transformers."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_ray.config import VLLM, Model, RewardModel
from dpo_ray.scoring.models import model_of
from tests.command_line import LONGEST
from tests.rounding import of_logprob
from tests.training import small_model

pytestmark = pytest.mark.vllm

NEAR = 20 * of_logprob(512)  # as for log-probs: a wrong token, or an activation, is a thousand times that
BLOCK = 128  # tokens of a block of vLLM's cache on CPU
LABELS = 3


def ids(count: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (count,), generator=random).tolist()


PROMPT = ids(2 * BLOCK, 1)
DIALOGUES = [
    [*PROMPT, *ids(9, 2)],
    [*PROMPT, *ids(70, 3)],
    [*PROMPT, *ids(9, 2)],
    ids(1, 4),
    ids(500, 5),
    PROMPT,
]


def set_up() -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def both_engines(folder: str) -> dict[str, Any]:
    """vLLM's logits, a second time, and transformers'."""
    from dpo_ray.on_ray.vllm_engine import VLLMClassifier
    from dpo_ray.scoring.classifier import TorchClassifier

    source = RewardModel(path=folder)
    by_vllm, by_torch = VLLMClassifier(model_of(source), VLLM(kv_cache_gib=1), 600), TorchClassifier(source)
    return {
        "numbers": (by_vllm.num_logits, by_torch.num_logits),
        "vllm": [by_vllm.logits(DIALOGUES), by_vllm.logits(DIALOGUES)],
        "torch": by_torch.logits(DIALOGUES),
    }


def refusal(folder: str) -> str:
    """What is said where this reward model is served by vLLM."""
    from dpo_ray.on_ray.vllm_engine import VLLMClassifier

    try:
        VLLMClassifier(Model(path=folder), VLLM(kv_cache_gib=1), 600)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "max_position_embeddings": 1024}  # vLLM has no attention for heads under 32
    folder: Path = small_model(tmp_path_factory.mktemp("policy") / "model", **sizes)
    return folder


@pytest.fixture(scope="module")
def classifier(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(policy, num_labels=LABELS, pad_token_id=0)
    folder = tmp_path_factory.mktemp("classifier")
    shutil.copytree(policy, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(config)
        # As drawn it is near zero, and so would be its logits, right or wrong.
        torch.nn.init.normal_(model.score.weight, std=1.0)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """Runs a function in a process of its own: vLLM starts a process group where it runs."""
    pytest.importorskip("vllm")

    def run(function: Any, *arguments: Any) -> Any:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=set_up) as pool:
            return pool.submit(function, *arguments).result(timeout=LONGEST)

    return run


def test_vllm_gives_the_logits_of_transformers_whatever_is_in_its_cache(alone, classifier: Path):
    found = alone(both_engines, str(classifier))
    assert found["numbers"] == (LABELS, LABELS)
    assert max(abs(logit) for logits in found["torch"] for logit in logits) > 1
    for logits in found["vllm"]:
        for got, right in zip(logits, found["torch"], strict=True):
            assert got == pytest.approx(right, abs=NEAR)
    assert found["vllm"][0][0] == pytest.approx(found["vllm"][0][2], abs=NEAR)


def test_vllm_refuses_a_model_without_a_head_for_scores(alone, policy: Path):
    said = alone(refusal, str(policy))
    assert said.startswith("ConfigError: ") and "config.json names LlamaForCausalLM. Name a" in said


def test_vllm_refuses_a_classifier_whose_head_is_not_in_its_files(alone, classifier: Path, tmp_path: Path):
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    tensors = load_file(classifier / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = alone(refusal, str(tmp_path))
    assert said.startswith("ConfigError: ") and "its weights hold no score.weight" in said
