"""The main job on a CUDA device: vLLM's GPU build, NCCL workers, bfloat16."""

from __future__ import annotations

import pytest
import torch

from tests.command_line import CONFIGS, dpo_ray, overrides, summary_of
from tests.on_ray.test_main_job import preference_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_main_job_runs_on_a_gpu(tmp_path, demo_model, write_preferences, dtype):
    write_preferences(tmp_path / "data", preference_rows(0, 40))
    settings = {
        "run__output": str(tmp_path / "out"),
        "model__path": str(demo_model),
        "model__dtype": dtype,
        "data__train": str(tmp_path / "data"),
        "vllm__gpus_per_actor": 1,
        "vllm__gpu_memory_utilization": 0.3,
        "train__use_gpu": True,
        "train__num_workers": 1,
        "train__cpus_per_worker": 1,
        "train__global_batch_size": 8,
        "publish__gate__accuracy_above": None,
    }
    done = dpo_ray("run", str(CONFIGS / "align_cpu.yaml"), *overrides(**settings))
    assert done.code == 0, done.log
    summary = summary_of(tmp_path / "out")
    assert summary["train"]["first_step_loss"] == pytest.approx(0.6931, abs=1e-3 if dtype == "float32" else 0.05)


def test_the_packed_forward_on_a_gpu_equals_the_one_on_cpu(tiny_model):
    from dpo_ray.model.policy import CompletionScorer, load_policy
    from dpo_ray.pairs import TokenizedPair

    pairs = [TokenizedPair("a", [5, 6, 7], [8, 9], [10, 11, 12]), TokenizedPair("b", [20] * 17, [21] * 9, [22])]
    scorer = CompletionScorer(load_policy(tiny_model)).eval()
    with torch.inference_mode():
        expected = scorer(scorer.collate(pairs)).logprobs
        cuda = torch.device("cuda")
        found = scorer.to(cuda)(scorer.collate(pairs).to(cuda)).logprobs.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
