"""The benchmark for a GPU, rehearsed on a CPU: every part runs, one that fails is recorded and the next one runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.exactness import attention
from benchmarks.gpu.report import markdown, read
from benchmarks.gpu.scale import REHEARSAL
from benchmarks.gpu.stand_in import attend, in_place_of_the_kernel
from dpo_ray.model import varlen

OF_OURS = [part for part in gpu.PARTS if part != "TRL's steps"]


@pytest.mark.parametrize("part", OF_OURS)
def test_every_part_runs(tmp_path: Path, part: str):
    gpu.run_part(part, True, tmp_path, tmp_path / "result.json")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert rows and all(rows)


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path):
    out = tmp_path / "out"
    (out / f"{list(gpu.PARTS).index('resume')}.rows").mkdir(parents=True)  # where that part is to write
    command = ["-m", "benchmarks.gpu", "--rehearse", "--out", str(out), "--parts", "resume", "exactness"]
    done = subprocess.run([sys.executable, *command], cwd=gpu.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    found = {result["part"]: result for result in read(out)}
    assert "IsADirectoryError" in found["resume"]["failed"] and len(found["exactness"]["rows"]) == 6
    written = (out / "gpu.md").read_text()
    assert f"Failed: {found['resume']['failed']}" in written and "grouped heads" in written


def test_what_no_time_is_left_for_is_recorded(tmp_path: Path):
    assert gpu._outcome("resume", True, tmp_path, tmp_path / "5.json", 0.0) == {"failed": "no time was left"}


def test_a_kernel_that_is_aligned_to_the_top_left_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def top_left(query, key, value, query_ends, key_ends, longest_query, longest_key, **options):
        lengths = key_ends.diff().tolist()
        cut = [x[:n] for x, n in zip(key.split(lengths), query_ends.diff().tolist(), strict=True)]
        values = [x[:n] for x, n in zip(value.split(lengths), query_ends.diff().tolist(), strict=True)]
        if any(len(x) < n for x, n in zip(cut, query_ends.diff().tolist(), strict=True)):
            raise AssertionError("keys are fewer than queries")
        return attend(
            query, torch.cat(cut), torch.cat(values), query_ends, query_ends, longest_query, longest_key, **options
        )

    with in_place_of_the_kernel():
        attention(REHEARSAL, tmp_path)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", top_left)
        with pytest.raises(AssertionError, match="the kernel is off by"):
            attention(REHEARSAL, tmp_path)


def test_a_kernel_without_grouped_heads_is_given_repeated_keys(monkeypatch: pytest.MonkeyPatch):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    query = torch.randn(5, 4, 8)
    key, value = torch.randn(2, 7, 2, 8).unbind()
    ends = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32)
    expected = attend(query, key, value, *ends, 5, 7, window_size=(-1, 0), enable_gqa=True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    varlen._arguments.cache_clear()
    try:
        assert torch.equal(varlen.attend(query, key, value, *ends, 5, 7), expected)
        assert "grouped heads" in varlen.missing()[0]
    finally:
        varlen._arguments.cache_clear()


def test_a_report_tells_what_was_left_out():
    results = [
        {"part": "one", "about": "About.", "seconds": 1.0, "rows": [{"a": 0.123456, "b": None}, {"a": 1e6, "c": "x"}]},
        {"part": "two", "about": "Of two.", "seconds": 0.0, "left_out": "TRL is not installed here."},
    ]
    told = markdown(results, "On a GPU.")
    assert "| a | b | c |" in told and "| 0.1235 | – | – |" in told and "| 1,000,000 | – | x |" in told
    assert "TRL is not installed here." in told
