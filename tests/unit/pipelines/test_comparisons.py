"""What is compared with what: the published model on a set, and answers by a judge's shares of wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.config import Judge, Reward, Rule, Sampling, WinRate, parse_config
from dpo_ray.config.losses import SigmoidLoss
from dpo_ray.evaluation.gate import failed_conditions
from dpo_ray.evaluation.held_out import score_table
from dpo_ray.pairs import CANDIDATES, PROMPTS, REFERENCE, REWARDS, SCORES
from dpo_ray.pairs import PAIRS as PAIRS_OF
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
from pipelines.evaluate import _compare, _Drawn, _sources
from pipelines.held_out_sets import ScoredSet, measure_sets

PAIRS = 40


def artifact(folder: Path, kind: str, rows: list[dict[str, Any]], schema: pa.Schema) -> Artifact:
    location = Location.of(folder)
    files = [write_shard(location / "0.parquet", pa.Table.from_pylist(rows, schema=schema), {})]
    return publish(location, kind, identity={}, inputs={}, files=files)


def scored(folder: Path, chosen: float, rejected: float) -> Artifact:
    reference = {"chosen_ref_logprobs": [-1.5], "rejected_ref_logprobs": [-1.5]}
    rows = [{"pair_id": f"{n}", **reference} for n in range(PAIRS)]
    table = score_table(SigmoidLoss(type="sigmoid"), rows, [([chosen], [rejected])] * PAIRS)
    return artifact(folder, "policy_scores", table.to_pylist(), SCORES)


@pytest.mark.parametrize(("published", "change"), [((-1.5, -1.5), None), ((-2.0, -1.0), 1.0), ((-1.0, -2.0), 0.0)])
def test_a_published_model_that_is_the_reference_is_compared_with_nothing(tmp_path, published, change):
    gate = {"no_regression": {"held_out": 0.1}, "accuracy_above": None}
    config = parse_config(
        {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}, "publish": {"gate": gate}}
    )
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "split": "eval"}
    reference = {"chosen_ref_logprobs": [-1.5], "rejected_ref_logprobs": [-1.5]}
    rows = artifact(
        tmp_path / "rows",
        "reference",
        [{"pair_id": f"{n}", "prompt_id": f"{n:016x}", **ids, **reference} for n in range(PAIRS)],
        REFERENCE,
    )
    mine, theirs = scored(tmp_path / "mine", -1.0, -2.0), scored(tmp_path / "theirs", *published)
    measured = measure_sets({"held_out": ScoredSet(rows, mine, theirs, "v1")})
    assert measured["held_out"]["accuracy"]["value"] == 1.0
    if change is not None:
        assert measured["held_out"]["change"]["value"] == change
        assert failed_conditions(config.publish.gate, {"sets": measured}) == []
        return
    assert measured["held_out"]["published"] is None and "change" not in measured["held_out"]
    [reason] = failed_conditions(config.publish.gate, {"sets": measured})
    assert "from the published version v1 is undefined (the published model is this run's reference" in reason


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("with_rule", [False, True])
def test_a_share_of_wins_stays_one_whatever_the_judges_weight(tmp_path, weight: float, with_rule: bool):
    prompt = [{"role": "user", "content": "Why?"}]
    completions = [{"text": text, "finished": True, "num_tokens": 1} for text in "ab"]
    row = {"prompt_id": "00ff", "split": "eval", "prompt": prompt, "completions": completions}
    candidates = artifact(tmp_path / "candidates", "candidates", [row], CANDIDATES)

    def rewards(name: str, values: list[float]) -> Artifact:
        given = {"prompt_id": "00ff", "scores": values, "parts": [[] for _ in values]}
        return artifact(tmp_path / name, "rewards", [given], REWARDS)

    reward: Reward = (Judge(model="j", weight=weight),)
    scores = {reward[0].label: rewards("judge", [0.25, 0.75])}
    if with_rule:
        reward = (*reward, Rule(function="a:b", weight=0.0))
        scores[reward[1].label] = rewards("rule", [9.0, -9.0])
    drawn = _Drawn(candidates, scores, rewards("ratios", [0.0]), WinRate(reward=reward))
    [answered] = drawn.answered()
    assert list(answered.rewards) == [0.25, 0.75]


def test_the_win_rate_is_told_by_source_of_the_prompt(tmp_path: Path):
    row = {"split": "eval", "prompt": [{"role": "user", "content": "Why?"}]}
    completions = [
        {"text": text, "finished": True, "num_tokens": 2, "token_ids": [1, 2], "finish_reason": "stop"} for text in "ab"
    ]
    ids = [f"{n:016x}" for n in range(6)]
    rows = [{**row, "prompt_id": one, "completions": completions} for one in ids]
    candidates = artifact(tmp_path / "candidates", "candidates", rows, CANDIDATES)
    scores = [[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2
    parts = [[{"r": 0.0}] * 2] * 6
    rewards, ratios = (
        artifact(
            tmp_path / name,
            "rewards",
            [{"prompt_id": one, "scores": s, "parts": p} for one, s, p in zip(ids, of_each, parts, strict=True)],
            REWARDS,
        )
        for name, of_each in (("rewards", scores), ("ratios", [[0.5]] * 6))
    )
    reward: Reward = (Rule(function="a:b"),)
    options = WinRate(reward=reward, sampling=Sampling(samples=1))
    sources = dict(zip(ids[:5], ["math", "math", "chat", "math", "chat"], strict=True))
    found, samples = _compare(_Drawn(candidates, {reward[0].label: rewards}, ratios, options, sources))
    assert {name: (one["value"], one["n"]) for name, one in found["sources"].items()} == {
        "chat": (0.5, 2),
        "math": (pytest.approx(2 / 3), 3),
    }
    assert [one["outcome"] for one in samples] == ["won", "won", "lost", "lost", "won", "won"]
    assert [one["source"] for one in samples] == ["math", "math", "chat", "math", "chat", None]
    assert "sources" not in _compare(_Drawn(candidates, {reward[0].label: rewards}, ratios, options))[0]


def test_of_a_prompt_in_two_sources_the_first_one_counts(tmp_path: Path):
    prompts = artifact(tmp_path / "prompts", "prompts", [{"prompt_id": one} for one in "pq"], PROMPTS)
    rows = [("p", "math"), ("p", "chat"), ("r", "chat"), ("q", None), ("q", "chat")]
    pairs = artifact(tmp_path / "pairs", "pairs", [{"prompt_id": p, "source": s} for p, s in rows], PAIRS_OF)
    assert _sources(pairs, prompts) == {"p": "math", "q": "chat"}


def calibration(folder: Path, largest: float) -> Artifact:
    metrics = {
        "sequence": {"max": largest},
        "token": {"max": largest},
        "bias_per_token": 0.0,
        "bias_standard_error": 0.0,
    }
    return publish(Location.of(folder), "calibration", identity={}, inputs={}, files=[], metrics=metrics)


def test_a_published_model_whose_margins_are_its_engines_noise_is_compared_with_nothing(tmp_path):
    mine = scored(tmp_path / "mine", -1.0, -2.0)
    rows = [{"pair_id": f"{n}", "chosen_ref_logprobs": [-1.5], "rejected_ref_logprobs": [-1.5]} for n in range(PAIRS)]
    table = score_table(SigmoidLoss(type="sigmoid"), rows, [([-1.5 + (-1) ** n / 100], [-1.5]) for n in range(PAIRS)])
    theirs = artifact(tmp_path / "theirs", "policy_scores", table.to_pylist(), SCORES)
    reference_rows = artifact(tmp_path / "rows", "reference", [], REFERENCE)
    for largest, is_told in ((0.001, True), (0.1, False)):
        of_engines = calibration(tmp_path / f"calibration-{largest}", largest)
        measured = measure_sets({"held_out": ScoredSet(reference_rows, mine, theirs, "v1", of_engines)})["held_out"]
        assert (measured["published"] is not None) is is_told and ("change" in measured) is is_told


def test_pairs_that_all_agree_are_not_taken_for_certain(tmp_path):
    mine, theirs = scored(tmp_path / "mine", -1.0, -2.0), scored(tmp_path / "theirs", -1.0, -2.0)
    rows = artifact(tmp_path / "rows", "reference", [], REFERENCE)
    change = measure_sets({"held_out": ScoredSet(rows, mine, theirs, "v1")})["held_out"]["change"]
    assert change["value"] == 0.0 and change["n"] == PAIRS
    assert -0.12 < change["low"] < -0.03 and 0.03 < change["high"] < 0.12
