"""What a worker of a sharded model holds once it is loaded, seen from outside: its part, and a layer at most beside."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sharding import measure, write_model

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 6000}
LAYER = 4 * (4 * 384**2 + 3 * 384 * 1024)
HEAP = 8 * 2**20  # what threads and the heap of the C library take on the way


@pytest.mark.parametrize("world", [1, 2])
def test_no_worker_loads_more_than_its_part_and_a_layer(world: int, tmp_path: Path):
    (tmp_path / "model").mkdir()
    part = 4 * write_model(tmp_path / "model", SIZES) / world
    for peak in measure(world, tmp_path, {"lora": 0, "dtype": "float32", "whole": False, "trains": False}):
        assert peak["load"] < part + LAYER + HEAP
