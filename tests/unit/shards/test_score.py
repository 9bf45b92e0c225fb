"""Scored shards, mismatched completions, and rows that cannot be scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.pairs import MISMATCHED, QUARANTINE, REFERENCE, TOKENIZED, TokenizedPair
from dpo_ray.shards.isolation import Attempts
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.shards.score import MismatchShard, ScoreShard
from dpo_ray.storage.artifact import read_shard, write_shard
from dpo_ray.storage.location import Location


class ByToken:
    """Scores that show what was asked for: a token's is minus its id, less a hundredth of the prompt's first id."""

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        def of(pair: TokenizedPair, ids: list[int]) -> list[float]:
            return [-float(i) - pair.prompt_ids[0] / 128 for i in ids]

        return [of(p, p.chosen_loss_ids) for p in pairs], [of(p, p.rejected_loss_ids) for p in pairs]


def shard(folder: Path, rows: list[tuple[str, str, int, list[int], list[int]]]) -> Shard:
    """A tokenized shard of (prompt_id, split, prompt token, chosen, rejected), scored by ByToken."""
    values = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(rows)
    ]
    place = Location.of(folder) / "rows.parquet"
    write_shard(place, pa.Table.from_pylist(values, schema=TOKENIZED), {})
    scored = ScoreShard(ByToken(), ("chosen_ref_logprobs", "rejected_ref_logprobs"))(Shard(place.uri))
    write_shard(place, scored.table, {})
    return Shard(place.uri)


class Broken(ByToken):
    """Raises where one of the pairs has a certain token in its prompt."""

    def __init__(self, token: int):
        self.token = token

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        if any(self.token in pair.prompt_ids for pair in pairs):
            raise RuntimeError(f"no token {self.token} here")
        return super().score(pairs)


FOUR = [(p, "train", i, [10 * i], [10 * i + 1]) for i, p in enumerate("abcd")]


def quarantined(output: ShardOutput) -> list[tuple[int, str, dict[str, str]]]:
    assert output.quarantine is not None and output.quarantine.schema.equals(QUARANTINE)
    return [(row["row"], row["reason"], json.loads(row["raw"])) for row in output.quarantine.to_pylist()]


def attempts_in(folder: Path) -> Attempts:
    return Attempts(Location.of(folder) / "attempts" / "rows.json")


def test_a_row_that_cannot_be_scored_is_quarantined_and_the_others_are_not(tmp_path: Path):
    columns = ("chosen_ref_logprobs", "rejected_ref_logprobs")
    source = Shard(str(tmp_path / "tokenized.parquet"))
    rows = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(FOUR)
    ]
    write_shard(Location(source.file), pa.Table.from_pylist(rows, schema=TOKENIZED), {})
    output = ScoreShard(Broken(2), columns)(source, attempts_in(tmp_path))
    assert output.table.schema.equals(REFERENCE)
    assert output.table["pair_id"].to_pylist() == ["0", "1", "3"]
    assert output.table["chosen_ref_logprobs"].to_pylist() == [[0.0], [-10 - 1 / 128], [-30 - 3 / 128]]
    assert output.counters == {"read": 4, "engine_error": 1}
    message = {"pair_id": "2", "message": "RuntimeError: no token 2 here"}
    assert quarantined(output) == [(2, "engine_error", message)]
    with pytest.raises(RuntimeError, match="no token 2"):
        ScoreShard(Broken(2), columns)(source)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_with_a_log_prob_that_is_not_finite_is_quarantined(tmp_path: Path, value: float):
    class Overflows(ByToken):
        def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
            chosen, rejected = super().score(pairs)
            return chosen, [[value] if 2 in pair.prompt_ids else r for pair, r in zip(pairs, rejected, strict=True)]

    source = shard(tmp_path, FOUR)
    rows = read_shard(Location(source.file)).select(TOKENIZED.names)
    write_shard(Location(source.file), rows, {})
    columns = ("chosen_ref_logprobs", "rejected_ref_logprobs")
    output = ScoreShard(Overflows(), columns)(source, attempts_in(tmp_path))
    assert output.table["pair_id"].to_pylist() == ["0", "1", "3"]
    [(place, reason, raw)] = quarantined(output)
    assert (place, reason) == (2, "engine_error") and "not finite" in raw["message"]


def test_a_row_whose_mismatched_completion_cannot_be_scored_is_quarantined(tmp_path: Path):
    source = shard(tmp_path, [("z", "eval", 9, [90], [91]), *FOUR])  # the first row has no mismatched completion
    output = MismatchShard(Broken(2))(source, attempts_in(tmp_path))
    assert output.table.schema.equals(MISMATCHED)
    assert output.table["pair_id"].to_pylist() == ["0", "1", "2", "4"]
    assert [n for n, scored in enumerate(output.table["mismatched_ref_logprobs"].to_pylist()) if scored is None] == [0]
    assert output.table["mismatched_ref_logprobs"].to_pylist()[1:] == [[-11.0], [-20 - 1 / 128], [-3 / 128]]
    assert [(place, reason) for place, reason, _ in quarantined(output)] == [(3, "engine_error")]


def test_mismatched_completions_are_of_other_prompts_of_either_kind_and_scored_after_this_one(tmp_path: Path):
    source = shard(
        tmp_path,
        [
            ("a", "train", 1, [10, 11], [12]),
            ("b", "train", 2, [20], [21, 22]),
            ("b", "eval", 2, [20], [23]),
            ("c", "train", 3, [30], [31]),
        ],
    )
    output = MismatchShard(ByToken())(source)
    assert output.table.schema.equals(MISMATCHED)
    # Even places take the chosen side of the next other prompt, odd ones the rejected side; "eval" has one prompt.
    assert output.table["mismatched_ids"].to_pylist() == [[20], [31], None, [12]]
    assert output.table["mismatched_ref_logprobs"].to_pylist() == [
        [-20 - 1 / 128],
        [-31 - 2 / 128],
        None,
        [-12 - 3 / 128],
    ]
    assert output.table.num_rows == output.counters["read"] == 4


def test_a_row_takes_the_side_that_a_single_answer_has(tmp_path: Path):
    rows = [("a", "train", 1, [10], []), ("b", "train", 2, [], [21]), ("c", "train", 3, [30], [])]
    table = MismatchShard(ByToken())(shard(tmp_path, rows)).table
    assert table["rejected_ref_logprobs"].to_pylist() == [[], [-21 - 2 / 128], []]
    assert table["mismatched_ids"].to_pylist() == [[21], [30], [10]]


def test_a_mismatched_completion_takes_its_mask_along(tmp_path: Path):
    place = Location.of(tmp_path) / "rows.parquet"
    rows = [
        {
            "pair_id": p,
            "prompt_id": p,
            "split": "train",
            "prompt_ids": [n],
            "chosen_ids": [10, 11],
            "rejected_ids": [12],
        }
        for n, p in enumerate("ab")
    ]
    rows[1]["chosen_mask"] = [False, True]
    write_shard(place, pa.Table.from_pylist(rows, schema=TOKENIZED), {})
    scored = ScoreShard(ByToken(), ("chosen_ref_logprobs", "rejected_ref_logprobs"))(Shard(place.uri))
    assert scored.table["chosen_ref_logprobs"].to_pylist() == [[-10.0, -11.0], [-11 - 1 / 128]]
    write_shard(place, scored.table, {})
    table = MismatchShard(ByToken())(Shard(place.uri)).table
    assert table.schema.equals(MISMATCHED)
    assert table["mismatched_ids"].to_pylist() == [[10, 11], [12]]
    assert table["mismatched_mask"].to_pylist() == [[False, True], None]
    assert table["mismatched_ref_logprobs"].to_pylist() == [[-11.0], [-12 - 1 / 128]]
