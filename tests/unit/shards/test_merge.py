"""Candidates of several models → one row for each prompt."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from dpo_ray.pairs import CANDIDATES
from dpo_ray.shards.merge import MergeShard, OfModels
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location


def shard(folder: Path, model: str, samples: dict[str, list[str]]) -> str:
    rows = [
        {
            "prompt_id": prompt,
            "split": "train",
            "prompt": [{"role": "user", "content": prompt}],
            "answer": f"of {prompt}",
            "completions": [{"text": text, "model": model} for text in texts],
        }
        for prompt, texts in samples.items()
    ]
    location = Location.of(folder) / f"{model}.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=CANDIDATES), {})
    return location.uri


def test_a_prompt_has_the_completions_of_all_models_that_took_it(tmp_path: Path):
    files = (shard(tmp_path, "m", {"a": ["1", "2"], "b": ["3"]}), shard(tmp_path, "n", {"c": ["4"], "a": ["5"]}))
    output = MergeShard()(OfModels(files))
    rows = output.table.to_pylist()
    found = {row["prompt_id"]: [(c["model"], c["text"]) for c in row["completions"]] for row in rows}
    assert found == {"a": [("m", "1"), ("m", "2"), ("n", "5")], "b": [("m", "3")], "c": [("n", "4")]}
    assert [row["answer"] for row in rows] == ["of a", "of b", "of c"]
    assert output.table.schema.equals(CANDIDATES)
    assert output.counters == {"read": 3}
