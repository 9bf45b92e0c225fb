"""On a CUDA device the longest pair is tried before the first step: too long a one is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dpo_ray.config import Model, Train
from dpo_ray.errors import PairTooLong
from dpo_ray.model.policy import CompletionScorer, load_policy, torch_dtype
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.longest import LongestPair
from dpo_ray.training.memory import worker_memory
from dpo_ray.training.optim import make_optimizer
from dpo_ray.training.parallel import Rank, parallelize
from dpo_ray.training.rehearsal import require_that_it_fits
from dpo_ray.training.step import Learner
from tests.training import small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
GIB = 2**30


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Rank]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Rank(0, 1, torch.device("cuda", 0))
    dist.destroy_process_group()


@pytest.fixture
def eight_gib() -> Iterator[None]:
    """No more than that of the device, so that a long pair need not be very long."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 8 * GIB / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def learner(folder: Path, me: Rank, strategy: str, dtype: str) -> tuple[Learner, Model]:
    options = Train.model_validate({"use_gpu": True, "strategy": strategy, "loss": {"type": "simpo"}})
    policy = load_policy(folder)
    scorer = CompletionScorer(policy).to(me.device).train()
    forward = parallelize(scorer, options.strategy, me, torch_dtype(dtype))
    made = Learner(forward, scorer, make_optimizer(policy, options), None, options, me, TrainState())
    return made, Model(path=str(folder), dtype=dtype)


def pair_of(tokens: int) -> LongestPair:
    third = tokens // 3
    pair = TokenizedPair("a1b2", [3] * (tokens - 2 * third), [4] * third, [5] * third)
    return LongestPair(pair, "shard-7.parquet", 41)


def _whole(made: Learner) -> dict[str, torch.Tensor]:
    parameters = {name: p.detach() for name, p in made.scorer.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


@pytest.mark.usefixtures("eight_gib")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_too_long_a_pair_is_refused_by_name_and_what_fits_goes_through(
    tmp_path: Path, alone: Rank, strategy: str, dtype: str, capfd: pytest.CaptureFixture[str]
):
    folder = small_model(tmp_path / "model", **SIZES, max_position_embeddings=1 << 18)
    made, model = learner(folder, alone, strategy, dtype)
    before = {name: p.clone() for name, p in _whole(made).items()}
    state = torch.cuda.get_rng_state()
    require_that_it_fits(made, pair_of(1536), model, 8 * GIB)
    assert "of 1536 tokens" in capfd.readouterr().err
    assert all(torch.equal(p, before[name]) for name, p in _whole(made).items())
    with pytest.raises(PairTooLong, match=r"a1b2 \(row 41 of shard-7\.parquet\), of 240000 tokens .*out of memory"):
        require_that_it_fits(made, pair_of(240_000), model, 8 * GIB)
    assert all(p.grad is None for p in made.scorer.parameters())
    assert not made.optimizer.state
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.usefixtures("eight_gib")
def test_a_pair_for_which_only_the_moments_leave_no_room_is_refused_too(tmp_path: Path, alone: Rank):
    folder = small_model(tmp_path / "model", **SIZES)
    made, _ = learner(folder, alone, "ddp", "float32")
    trained = sum(p.numel() for p in made.scorer.parameters())
    left = 8 * GIB - torch.cuda.memory_reserved()
    # All but what gradients and half of the moments need.
    taken = torch.empty(left - 8 * trained, dtype=torch.uint8, device=alone.device)
    with pytest.raises(PairTooLong, match="out of memory"):
        require_that_it_fits(made, pair_of(96), Model(path=str(folder)), 8 * GIB)
    del taken


def test_the_memory_of_a_worker_is_that_of_its_gpu():
    total = torch.cuda.mem_get_info()[1]
    assert worker_memory(4, 1.0) == total
    assert worker_memory(1, 0.5) == total // 2
