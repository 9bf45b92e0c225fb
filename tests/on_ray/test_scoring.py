"""Margins of held-out rows as the loss sees them, and mismatched completions; no Ray is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from dpo_ray.artifacts import Artifact, publish, write_shard
from dpo_ray.config import VLLM, Model
from dpo_ray.errors import DataError
from dpo_ray.loss_options import Loss
from dpo_ray.on_ray import engines
from dpo_ray.on_ray.engines import MismatchShard, ScoreShard, VLLMScorer
from dpo_ray.on_ray.scoring import held_out_margins
from dpo_ray.pairs import MISMATCHED, REFERENCE, SCORES, TOKENIZED, TokenizedPair
from dpo_ray.storage import Location

Sides = tuple[list[float], list[float]]


def loss(**options: Any) -> Loss:
    return TypeAdapter(Loss).validate_python(options)


def artifact(folder: Path, kind: str, shards: list[pa.Table]) -> Artifact:
    location = Location.of(folder) / kind
    files = [write_shard(location / f"{i}.parquet", table, {}) for i, table in enumerate(shards)]
    return publish(location, kind, identity={}, inputs={}, files=files)


def scores(folder: Path, rows: dict[str, Sides]) -> Artifact:
    """One shard of a policy's token log-probs by pair_id."""
    values = [{"pair_id": i, "chosen_logprobs": c, "rejected_logprobs": r} for i, (c, r) in rows.items()]
    return artifact(folder, "policy_scores", [pa.Table.from_pylist(values, schema=SCORES)])


def reference(folder: Path, rows: dict[str, Sides], split: str = "eval") -> Artifact:
    """A shard a row of reference token log-probs by pair_id, and a last shard with a row of the training side."""
    shards = [
        {
            "pair_id": pair_id,
            "prompt_id": f"prompt of {pair_id}",
            "split": split,
            "prompt_ids": [1],
            "chosen_ids": [2] * len(chosen),
            "rejected_ids": [3] * len(rejected),
            "chosen_ref_logprobs": chosen,
            "rejected_ref_logprobs": rejected,
        }
        for pair_id, (chosen, rejected) in rows.items()
    ]
    shards.append({**shards[0], "pair_id": "training", "prompt_id": "t", "split": "train"})
    return artifact(folder, "reference", [pa.Table.from_pylist([row], schema=REFERENCE) for row in shards])


POLICY: dict[str, Sides] = {"a": ([-1.0, -2.0], [-4.0]), "b": ([-1.0], [-0.5, -0.5, -2.0])}
BASE: dict[str, Sides] = {"a": ([-2.0, -2.0], [-3.0]), "b": ([-0.5], [-1.0, -1.0, -1.0])}


def test_margins_of_dpo_are_differences_of_summed_log_ratios(tmp_path: Path):
    margins = held_out_margins(loss(type="sigmoid", beta=0.7), scores(tmp_path, POLICY), reference(tmp_path, BASE))
    # a: (−3 + 4) − (−4 + 3) = 2; b: (−1 + .5) − (−3 + 3) = −.5. Beta has no part in it.
    assert margins.tolist() == [2.0, -0.5]


def test_margins_of_other_losses_are_those_that_the_loss_sees(tmp_path: Path):
    made, base = scores(tmp_path, POLICY), reference(tmp_path, BASE)
    # By token: a: 1/2 − (−1/1); b: −.5/1 − 0/3.
    assert held_out_margins(loss(type="sigmoid_norm"), made, base).tolist() == pytest.approx([1.5, -0.5])
    # Means of the policy alone: a: −1.5 + 4; b: −1 + 1.
    assert held_out_margins(loss(type="simpo"), made, base).tolist() == pytest.approx([2.5, 0.0])
    # Tokens behind the shared length weigh nothing: a: (−1 + 2) + 1; b: −.5 − (−.5 + 1).
    options = loss(type="sigmoid", ld_alpha=0.0)
    assert held_out_margins(options, made, base).tolist() == pytest.approx([2.0, -1.0])


def test_a_loss_without_a_reference_needs_no_reference_columns(tmp_path: Path):
    rows = [
        {"pair_id": i, "prompt_id": i, "split": "eval", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
        for i in POLICY
    ]
    tokenized = artifact(tmp_path, "tokenized", [pa.Table.from_pylist(rows, schema=TOKENIZED)])
    assert held_out_margins(loss(type="simpo"), scores(tmp_path, POLICY), tokenized).tolist() == [2.5, 0.0]


def test_unpaired_rows_are_compared_in_couples_by_the_order_of_their_ids(tmp_path: Path):
    # Log-ratios: desirable d1 = 1, d2 = 3, d3 = 9; undesirable u1 = −2, u2 = 5. The shards have another order.
    policy: dict[str, Sides] = {
        "u2": ([], [-1.0]), "d3": ([-1.0], []), "d1": ([-1.0], []), "u1": ([], [-3.0]), "d2": ([-1.0, -1.0], []),
    }  # fmt: skip
    base: dict[str, Sides] = {
        "d3": ([-10.0], []), "u1": ([], [-1.0]), "d2": ([-2.0, -3.0], []), "d1": ([-2.0], []), "u2": ([], [-6.0]),
    }  # fmt: skip
    margins = held_out_margins(loss(type="kto"), scores(tmp_path, policy), reference(tmp_path, base))
    # d1 with u1: 1 − (−2); d2 with u2: 3 − 5; d3 has no counterpart.
    assert margins.tolist() == [3.0, -2.0]


def test_where_some_rows_are_pairs_only_these_count(tmp_path: Path):
    policy = {**POLICY, "d": ([-1.0], []), "u": ([], [-1.0])}
    base = {**BASE, "d": ([-2.0], []), "u": ([], [-2.0])}
    assert held_out_margins(loss(type="kto"), scores(tmp_path, policy), reference(tmp_path, base)).tolist() == [2, -0.5]


def test_single_answers_of_one_kind_alone_have_no_margin(tmp_path: Path):
    one_kind: dict[str, Sides] = {"d": ([-1.0], []), "e": ([-1.0], [])}
    assert len(held_out_margins(loss(type="kto"), scores(tmp_path, one_kind), reference(tmp_path, one_kind))) == 0


def test_nothing_held_out_has_no_margin(tmp_path: Path):
    assert len(held_out_margins(loss(type="sigmoid"), scores(tmp_path, {}), reference(tmp_path, BASE, "train"))) == 0


def test_a_held_out_row_without_scores_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"1 held-out pairs .* have no scores in .*: b\. Remove"):
        held_out_margins(loss(type="sigmoid"), scores(tmp_path, {"a": POLICY["a"]}), reference(tmp_path, BASE))


def test_margins_that_are_not_finite_are_an_error_that_names_the_rows(tmp_path: Path):
    damaged = {**POLICY, "b": ([float("nan")], POLICY["b"][1])}
    with pytest.raises(DataError, match=r"1 held-out pairs have margins that are not finite, the first: b\."):
        held_out_margins(loss(type="sigmoid"), scores(tmp_path, damaged), reference(tmp_path, BASE))


class ByToken:
    """Scores that show what was asked for: a token's is minus its id, less a hundredth of the prompt's first id."""

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        def of(pair: TokenizedPair, ids: list[int]) -> list[float]:
            return [-float(i) - pair.prompt_ids[0] / 128 for i in ids]

        return [of(p, p.chosen_ids) for p in pairs], [of(p, p.rejected_ids) for p in pairs]


def shard(folder: Path, rows: list[tuple[str, str, int, list[int], list[int]]]) -> dict[str, Any]:
    """A tokenized shard of (prompt_id, split, prompt token, chosen, rejected), scored by ByToken."""
    values = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(rows)
    ]
    place = Location.of(folder) / "rows.parquet"
    write_shard(place, pa.Table.from_pylist(values, schema=TOKENIZED), {})
    scored = ScoreShard(ByToken(), ("chosen_ref_logprobs", "rejected_ref_logprobs"))({"file": place.uri})
    write_shard(place, scored.table, {})
    return {"file": place.uri}


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


class FakeVLLM:
    """Gives each token the log-prob −id; for prompts in `cached` none to be trusted, unless it may not read them."""

    def __init__(self, by_token_ids: bool, cached: tuple[int, ...] = ()):
        self.cached = cached
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=by_token_ids))
        self.asked: list[tuple[list[int], bool]] = []

    def generate(self, inputs: list[dict[str, list[int]]], sampling: list[dict[str, Any]], **_: Any) -> list[Any]:
        return [self._output(i["prompt_token_ids"], params) for i, params in zip(inputs, sampling, strict=True)]

    def _output(self, ids: list[int], params: dict[str, Any]) -> Any:
        skips = params["skip_reading_prefix_cache"]
        self.asked.append((ids, skips))
        found = len(ids) - 1 if ids[0] in self.cached and not skips else 0
        logprobs = [math.nan if n < found else -float(t) for n, t in enumerate(ids)]
        wanted = params.get("prompt_logprob_token_ids")
        by_token_ids = None if wanted is None or found else -wanted.astype(float)
        return SimpleNamespace(
            num_cached_tokens=found,
            prompt_logprobs=SimpleNamespace(start_indices=list(range(len(ids))), token_ids=ids, logprobs=logprobs),
            prompt_token_id_logprobs=by_token_ids,
        )


def vllm_scorer(monkeypatch: pytest.MonkeyPatch, llm: FakeVLLM) -> VLLMScorer:
    monkeypatch.setitem(__import__("sys").modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: options))
    monkeypatch.setattr(engines, "_engine", lambda *_: llm)
    return VLLMScorer(Model(path="m"), VLLM(), 16)


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_vllm_is_not_asked_about_absent_sides(monkeypatch: pytest.MonkeyPatch, by_token_ids: bool):
    llm = FakeVLLM(by_token_ids)
    scorer = vllm_scorer(monkeypatch, llm)
    pairs = [TokenizedPair("d", [1], [2, 3], []), TokenizedPair("u", [4], [], [5]), TokenizedPair("p", [6], [7], [8])]
    assert scorer.score(pairs) == ([[-2.0, -3.0], [], [-7.0]], [[], [-5.0], [-8.0]])
    assert llm.asked == [([1, 2, 3], False), ([6, 7], False), ([4, 5], False), ([6, 8], False)]
    assert scorer.score(pairs[:1])[1] == [[]]


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_what_the_cache_has_of_a_completion_is_scored_again_without_it(
    monkeypatch: pytest.MonkeyPatch, by_token_ids: bool
):
    llm = FakeVLLM(by_token_ids, cached=(4,))
    pairs = [TokenizedPair("a", [1], [2, 3], [9]), TokenizedPair("b", [4], [5, 6], [7, 8])]
    assert vllm_scorer(monkeypatch, llm).score(pairs) == ([[-2.0, -3.0], [-5.0, -6.0]], [[-9.0], [-7.0, -8.0]])
    assert [ids for ids, skips in llm.asked if skips] == [[4, 5, 6], [4, 7, 8]]
