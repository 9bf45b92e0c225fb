"""Scored candidates → pairs, a shard at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.config import CandidatePairing
from dpo_ray.errors import DataError
from dpo_ray.pairs import CANDIDATES, GENERATED_PAIRS, REWARDS, PreferencePair, pair_row, prompt_id
from dpo_ray.shards.output import ShardOutput
from dpo_ray.shards.pair import PairShard, ScoredShard
from dpo_ray.storage.artifact import read_shard, write_shard
from dpo_ray.storage.location import Location
from tests.dialogues import stored

Samples = dict[str, list[tuple[str, bool, dict[str, float]]]]
"""Prompt → its completions, whether each is finished, and its scores by source."""


def question(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)


def scored_shard(folder: Path, samples: Samples, tools: dict[str, str] | None = None) -> ScoredShard:
    """tools: of some of the prompts."""
    of_prompts = tools or {}
    ids = {text: prompt_id(list(question(text)), of_prompts.get(text)) for text in samples}
    rows = [
        {
            "prompt_id": ids[text],
            "split": "eval",
            "prompt": list(question(text)),
            "tools": of_prompts.get(text),
            "completions": [{"text": t, "finished": finished, "num_tokens": 3} for t, finished, _ in of_prompt],
        }
        for text, of_prompt in samples.items()
    ]
    location = Location.of(folder) / "candidates.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=CANDIDATES), {})
    sources = {name: 0 for of_prompt in samples.values() for *_, scores in of_prompt for name in scores}
    files = {}
    for name in sources:
        scores = [{"prompt_id": ids[text], "scores": [s[name] for *_, s in of_one]} for text, of_one in samples.items()]
        file = Location.of(folder) / f"{name}.parquet"
        write_shard(file, pa.Table.from_pylist(scores, schema=REWARDS), {})
        files[name] = file.uri
    return ScoredShard(location.uri, files)


def paired(shard: ScoredShard, weights: dict[str, float] | None = None, **rules: Any) -> ShardOutput:
    return PairShard(CandidatePairing(**rules), weights or {"length": 1.0}, {"candidates": "c0"})(shard)


def by_length(*texts: str) -> list[tuple[str, bool, dict[str, float]]]:
    return [(text, True, {"length": float(len(text))}) for text in texts]


def test_scored_candidates_become_pairs(tmp_path: Path):
    samples = {
        "Say a": by_length("aa", "aaaa", "aaaaaa", "aa "),
        "Say b": by_length("b", "c"),
        "Say c": by_length("c", ""),
    }
    output = paired(scored_shard(tmp_path, samples), min_score_gap=1.0)
    [pair] = output.table.to_pylist()
    lineage = json.loads(pair.pop("lineage"))
    assert pair == {
        **pair_row(PreferencePair(question("Say a"), "aaaaaa", "aa"), "eval"),
        "prompt": stored(question("Say a")),
    }
    assert output.table.schema.equals(GENERATED_PAIRS)
    assert lineage == {
        "candidates": "c0",
        "chosen": {"sample": 2, "model": None, "system_prompt": None, "scores": {"length": 6.0}},
        "rejected": {"sample": 0, "model": None, "system_prompt": None, "scores": {"length": 2.0}},
    }
    assert output.counters == {
        "read": 3,
        "duplicate": 1,
        "tie": 1,
        "empty_response": 1,
        "too_few_distinct": 1,
        "without_pair": 2,
    }


def test_generated_pairs_keep_the_tools_that_the_model_was_shown(tmp_path: Path):
    answers, tools = by_length("a", "aaa"), json.dumps([{"name": "look_up"}])
    shard = scored_shard(tmp_path, {"Say a": answers, "Say b": answers}, tools={"Say a": tools})
    table = paired(shard).table
    assert table["tools"].to_pylist() == [tools, None]
    with_tools = PreferencePair(question("Say a"), "aaa", "a", tools)
    assert table["pair_id"].to_pylist() == [with_tools.pair_id, PreferencePair(question("Say b"), "aaa", "a").pair_id]
    assert table["prompt_id"].to_pylist() == read_shard(Location(shard.candidates))["prompt_id"].to_pylist()


def test_weights_decide_and_below_zero_less_is_better(tmp_path: Path):
    sides = [("kind", True, {"good": 1.0, "words": 9.0}), ("short", True, {"good": 0.5, "words": 1.0})]
    shard = scored_shard(tmp_path, {"Say a": sides})
    chosen = {
        weights: paired(shard, dict(zip(("good", "words"), weights, strict=True))).table["chosen"].to_pylist()
        for weights in ((1.0, 0.0), (1.0, -1.0), (0.0, 1.0))
    }
    assert chosen == {(1.0, 0.0): ["kind"], (1.0, -1.0): ["short"], (0.0, 1.0): ["kind"]}


def test_sources_that_disagree_make_no_pair_where_they_must_agree(tmp_path: Path):
    sides = [("kind", True, {"good": 1.0, "words": 9.0}), ("short", True, {"good": 0.5, "words": 1.0})]
    shard = scored_shard(tmp_path, {"Say a": sides})
    # More words are worse: the sources disagree, also under the sum, unless words do not count.
    output = paired(shard, {"good": 20.0, "words": -1.0}, sources_agree=True)
    assert output.table.num_rows == 0 and output.counters["sources_disagree"] == 1
    assert paired(shard, {"good": 20.0, "words": 0.0}, sources_agree=True).table.num_rows == 1
    assert paired(shard, {"good": 20.0, "words": 1.0}, sources_agree=True).table.num_rows == 1


def test_scores_of_other_rows_are_refused(tmp_path: Path):
    shard = scored_shard(tmp_path / "one", {"Say a": by_length("a", "aaa")})
    other = scored_shard(tmp_path / "two", {"Say b": by_length("a", "aaa")})
    with pytest.raises(DataError, match=r"length\.parquet holds the scores of other prompts"):
        paired(ScoredShard(shard.candidates, other.rewards))
