"""Ingest of ranked rows under other column names, with tools, beside paired files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, Finished, overrides, shards_of, summary_of

pytestmark = pytest.mark.ray

TOOLS = json.dumps([{"name": "look_up", "parameters": {"type": "object"}}])


def ingest(folder: Path, run: Callable[..., Finished], **more) -> Finished:
    values = {
        "run__output": str(folder / "out"),
        "model__path": "not/needed",
        "data__train": str(folder / "data" / "*.parquet"),
        "data__max_quarantined_fraction": 0.5,
        **more,
    }
    return run("ingest", str(CONFIGS / "align_cpu.yaml"), *overrides(**values))


def test_ranked_and_paired_files_become_pairs_together(one_ray, tmp_path, write_preferences):
    ranked = [
        {"prompt": f"Number {n}?", "answers": ["a", "b", "c", "d"], "scores": scores, "tools": TOOLS}
        for n, scores in enumerate([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.0]])
    ]
    write_preferences(tmp_path / "data", ranked, name="ranked.parquet")
    write_preferences(tmp_path / "data", [{"prompt": "Who?", "chosen": "x", "rejected": "y"}], name="paired.parquet")
    options = {"data__columns": {"completions": "answers"}}
    done = ingest(tmp_path, one_ray, **options, data__pairing={"pairs_per_prompt": 2})
    assert done.code == 0, done.log
    stage = summary_of(tmp_path / "out")["stages"]["ingest"]
    # Of four rows read, the tie is quarantined, two make one pair each, and one makes two.
    assert stage["rows"] == {"in": 4, "kept": 4, "dropped": {"tie": 1}}
    shards = shards_of(tmp_path / "out", "pairs", stage["fingerprint"])
    pairs = [(r["chosen"], r["rejected"], r["tools"]) for shard in shards for r in pq.read_table(shard).to_pylist()]
    assert sorted(pairs, key=str) == [("c", "b", TOOLS), ("d", "a", TOOLS), ("d", "c", TOOLS), ("x", "y", None)]

    # Other pairs of the ranked rows are computed anew, and of the paired ones none.
    done = ingest(tmp_path, one_ray, **options)
    assert done.code == 0, done.log
    assert done.lines("1 of 2 shards are finished already")
    assert summary_of(tmp_path / "out")["stages"]["ingest"]["rows"]["kept"] == 3
