"""Trainings in fewer bytes on a CUDA device: each resumes to what it would have come to, and takes less memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpo_ray.config import Model, backend
from dpo_ray.model.pair_scorer import TorchScorer
from dpo_ray.training.parallel import Rank
from tests.gpu.test_training_on_gpu import BATCH, FIRST_LOSS, RESUMED, STEPS, long_pairs
from tests.training import Trained, run, small_model, with_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
]

SIZES = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
LORA = {"rank": 16, "export": "merged"}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Rank]:
    """A process group of this process, which exchanges what lies on the host too."""
    torch.cuda.set_device(0)
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group(backend(on_gpu=True, offload=True), init_method=store, rank=0, world_size=1)
    yield Rank(0, 1, torch.device("cuda", 0))
    dist.destroy_process_group()


def trained(model: Model, folder: Path, me: Rank, resume: Path | None = None, **more: Any) -> tuple[Trained, int]:
    """A training, and the most bytes that it took on the device."""
    pairs = with_reference(long_pairs(SIZES["vocab_size"], 64), TorchScorer(model))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {
        "strategy": "fsdp",
        "use_gpu": True,
        "global_batch_size": BATCH,
        "checkpoint_every_steps": STEPS // 2,
        "tokens_per_microbatch": 4096,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        **more,
    }
    run(model, pairs * STEPS, folder, me=me, resume=resume, **options)
    return Trained(folder), torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    ("of_model", "plain", "few"),
    [
        ({}, {}, {"optimizer": "adamw_8bit"}),
        ({}, {}, {"optimizer": "adamw_bf16"}),
        ({}, {}, {"optimizer": "adamw_8bit_bf16"}),
        ({}, {}, {"offload": True}),
        ({}, {"activation_checkpointing": True}, {"activation_checkpointing": True, "activation_offload": True}),
        ({}, {}, {"activation_checkpointing": 2}),
        ({"lora": {**LORA, "quantization": "nf4"}}, {}, {"offload": True}),
        ({"lora": {**LORA, "quantization": "int8"}}, {}, {"strategy": "ddp", "activation_checkpointing": True}),
    ],
    ids=str,
)
def test_it_takes_less_and_resumes(
    of_model: dict[str, Any], plain: dict[str, Any], few: dict[str, Any], tmp_path: Path, alone: Rank
):
    folder = small_model(tmp_path / "model", dtype=torch.bfloat16, **SIZES)
    model = Model.model_validate({"path": str(folder), "dtype": "bfloat16", **of_model})
    expected, most = trained(model, tmp_path / "plain", alone, **plain)
    found, less = trained(model, tmp_path / "few", alone, **few)
    print(f"\n{most / 2**20:.0f} MiB, and {less / 2**20:.0f}; losses {expected.losses}, {found.losses}")
    assert less < most
    assert found.losses[0] == pytest.approx(expected.losses[0], abs=FIRST_LOSS)
    assert found.losses[-1] < found.losses[0]
    resumed, _ = trained(model, tmp_path / "on", alone, resume=tmp_path / "few" / f"step-{STEPS // 2}", **few)
    assert resumed.losses == pytest.approx(found.losses, abs=RESUMED)
