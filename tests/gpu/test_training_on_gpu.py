"""The training core on a CUDA device as large models use it: FSDP2, bfloat16, activation checkpointing, resume."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpo_ray.config import Model
from dpo_ray.model.policy import CompletionScorer, compute_in, load_policy
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.parallel import Rank
from tests.training import Trained, run, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ONE_BILLION = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
BATCH, STEPS = 16, 4
# The reference is scored a pair at a time, training takes several at once: bfloat16 rounds otherwise, in either
# direction. Summed over a completion that is a fraction of a nat.
FIRST_LOSS = 0.02
RESUMED = 0.005  # CUDA adds up in no fixed order, so two runs differ by a rounding in bfloat16


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Rank]:
    """A process group of this process, as FSDP2 wants one."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Rank(0, 1, torch.device("cuda", 0))
    dist.destroy_process_group()


def long_pairs(vocabulary: int, tokens: int) -> list[TokenizedPair]:
    """Pairs of random tokens: prompts and completions of `tokens` and a little more."""
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=random).tolist()

    return [TokenizedPair(f"pair-{i}", ids(tokens), ids(tokens + i), ids(tokens + 2 * i)) for i in range(BATCH)]


def scored_in_bfloat16(pairs: list[TokenizedPair], model: Path, device: torch.device) -> list[TokenizedPair]:
    """With reference log-probs as the engine torch gives them."""
    policy = load_policy(model).to(device)
    compute_in(policy, torch.bfloat16)
    scorer = CompletionScorer(policy).eval()
    done = []
    with torch.inference_mode():
        for pair in pairs:
            values = scorer(scorer.collate([pair]).to(device)).logprobs.tolist()
            cut = len(pair.chosen_ids)
            done.append(replace(pair, chosen_ref_logprobs=values[:cut], rejected_ref_logprobs=values[cut:]))
    return done


def train_and_resume(
    model: Path, pairs: list[TokenizedPair], me: Rank, folder: Path, **more: Any
) -> tuple[Trained, Trained]:
    """A run over the same pairs again and again, and one that goes on from its half."""
    options: dict[str, Any] = {
        "strategy": "fsdp",
        "activation_checkpointing": True,
        "global_batch_size": BATCH,
        "checkpoint_every_steps": STEPS // 2,
        "tokens_per_microbatch": 4096,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        **more,
    }
    policy = Model(path=str(model), dtype="bfloat16")
    run(policy, pairs * STEPS, folder / "whole", me=me, **options)
    whole = Trained(folder / "whole")
    shutil.rmtree(whole.last)  # 18 GB
    run(policy, pairs * STEPS, folder / "resumed", me=me, resume=folder / "whole" / f"step-{STEPS // 2}", **options)
    return whole, Trained(folder / "resumed")


def require_training(whole: Trained, resumed: Trained) -> None:
    assert whole.losses[0] == pytest.approx(math.log(2), abs=FIRST_LOSS)
    assert whole.losses[-1] < math.log(2) - 0.05
    assert resumed.losses[: STEPS // 2] == whole.losses[: STEPS // 2]  # read from the checkpoint
    assert resumed.losses == pytest.approx(whole.losses, abs=RESUMED)
    assert resumed.checkpoints == [STEPS]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_of_a_billion_weights_trains_and_resumes(tmp_path: Path, alone: Rank, compiled: bool):
    model = small_model(tmp_path / "model", dtype=torch.bfloat16, **ONE_BILLION)
    pairs = scored_in_bfloat16(long_pairs(ONE_BILLION["vocab_size"], 128), model, alone.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole, resumed = train_and_resume(model, pairs, alone, tmp_path, compile=compiled, use_gpu=True)
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"\n{max(whole.of('tokens_per_second')):.0f} tokens/s, {gib:.1f} GiB at most; losses {whole.losses}")
    require_training(whole, resumed)
    weights = resumed.weights
    assert sum(t.numel() for t in weights.values()) > 0.9e9
    assert all(bool(t.isfinite().all()) for t in weights.values())
