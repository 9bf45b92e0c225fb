"""What a worker of a sharded model holds, seen from outside: its part, and a layer at a time of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sharding import measure, write_model

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 6000}
LAYER = 4 * (4 * 384**2 + 3 * 384 * 1024)
END = 4 * 384 * 6000  # embedding or head
HEAP = 8 * 2**20  # what imports, threads and the heap of the C library take on the way


@pytest.mark.parametrize("world", [1, 2])
def test_no_worker_holds_more_than_its_part_and_what_it_computes_with(world: int, tmp_path: Path):
    (tmp_path / "model").mkdir()
    part = 4 * write_model(tmp_path / "model", SIZES) / world
    for peak in measure(world, tmp_path, {"lora": 0, "dtype": "float32", "whole": False, "trains": True}):
        assert peak["load"] < part + LAYER + HEAP
        # The head arrives, and is put where it is used.
        assert peak["try"] < part + LAYER + 2 * END + HEAP
        assert peak["score"] < part + LAYER + 2 * END + HEAP
        assert peak["export"] < part + LAYER + 2 * END + HEAP
        # Weights, two moments, and room for the gradients.
        assert peak["checkpoint"] < 3 * part + LAYER + HEAP
        assert peak["resume"] < 4 * part + LAYER + HEAP
