"""Editing a reward makes anew what was made with it: scores, pairs, win rates; another weight changes no scores."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.config import CandidatePairing, Rule, load_config
from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage
from dpo_ray.on_ray.reward import pair_candidates, score_candidates
from dpo_ray.pairs import CANDIDATES, REFERENCE, SCORES
from dpo_ray.scoring import rule_source
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.shards.reward import RuleShard, rule_identity
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
from pipelines.context import RunContext
from pipelines.evaluate import _Drawn, _evaluate
from pipelines.generate import _pair
from tests.command_line import CONFIGS
from tests.shard_stages import without_ray

PROMPT = [{"role": "user", "content": "Why?"}]

REWARD = """
def score(prompt, completion, finished):
    return {} * len(completion)
"""


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the reward with a factor, as a process that starts now finds it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget() -> None:
        sys.modules.pop("edited_reward", None)
        importlib.invalidate_caches()
        rule_source._identity.cache_clear()

    def write(factor: str) -> None:
        (tmp_path / "edited_reward.py").write_text(REWARD.format(factor))
        forget()

    yield write
    forget()


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    name = "edited_reward:score"
    overrides = [f"run.output={tmp_path / 'out'}", f"generate.reward={name}", f"evaluate.win_rate.reward={name}"]
    return RunContext.start(load_config(CONFIGS / "demo_cpu.yaml", overrides), "run")


def artifact(folder: Path, kind: str, rows: list[dict], schema: pa.Schema) -> Artifact:
    location = Location.of(folder / kind)
    files = [write_shard(location / "0.parquet", pa.Table.from_pylist(rows, schema=schema), {})] if rows else []
    return publish(location, kind, identity={"at": folder.name}, inputs={}, files=files)


def judged(candidates: Artifact, folder: Path) -> Artifact:
    """Their scores by the reward, as the stage makes them on a worker."""
    rule = Rule(function="edited_reward:score")
    identity = rule_identity(rule)
    location = Location.of(folder / identity["reward_source"])
    [shard] = candidates.shards()
    table = RuleShard(rule, identity["reward_source"])(Shard(shard.uri)).table
    files = [write_shard(location / "0.parquet", table, {})]
    return publish(location, "rewards", identity=identity, inputs={"c": candidates.fingerprint}, files=files)


def test_scores_and_pairs_are_made_again(context: RunContext, tmp_path: Path, edit: Callable[[str], None]):
    options = context.config.generate
    assert options is not None
    candidates = artifact(tmp_path, "candidates", [], CANDIDATES)

    def made() -> tuple[Artifact, bool]:
        # There is no shard, and so no worker.
        [source] = options.reward
        scores, _ = score_candidates(context.output, context.config, source, candidates)
        return _pair(context, options, candidates, {"score": scores})

    edit("1")
    first, reused = made()
    assert not reused
    edit("(1)")
    assert made() == (first, True)
    edit("-1")
    second, reused = made()
    assert not reused and second.fingerprint != first.fingerprint


def test_another_weight_or_rule_scores_nothing_anew(context: RunContext, tmp_path: Path, edit: Callable[[str], None]):
    edit("1")
    candidates = artifact(tmp_path, "candidates", [], CANDIDATES)
    fingerprints = set()
    for weight, gap in ((1.0, 0.1), (2.0, 0.1), (2.0, 0.3)):
        reward = (Rule(function="edited_reward:score", weight=weight),)
        scores, reused = score_candidates(context.output, context.config, reward[0], candidates)
        assert reused == bool(fingerprints)
        rules = CandidatePairing(min_score_gap=gap)
        pairs, _ = pair_candidates(context.output, context.config, rules, reward, candidates, {"score": scores})
        fingerprints.add(pairs.fingerprint)
    assert len(fingerprints) == 3


def test_a_win_rate_is_measured_again(context: RunContext, tmp_path: Path, edit: Callable[[str], None]):
    options = context.config.evaluate.win_rate
    assert options is not None
    texts = ["Yes."] * 3 + ["Yes, it is."] * 3
    merged = artifact(
        tmp_path,
        "merged_candidates",
        [
            {
                "prompt_id": "00ff",
                "split": "eval",
                "prompt": [{"role": "user", "content": "Is it?"}],
                "completions": [{"text": text, "finished": True, "num_tokens": 3} for text in texts],
            }
        ],
        CANDIDATES,
    )
    scored = {"chosen_tokens": 1, "rejected_tokens": 1, "chosen_reward": 0.5, "rejected_reward": -0.5}
    logps = {"chosen_logps": -1.0, "chosen_ref_logps": -1.5}
    scores = artifact(tmp_path, "policy_scores", [{"pair_id": "0", **scored, **logps}], SCORES)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    reference = {"chosen_ref_logprobs": [-1.5], "rejected_ref_logprobs": [-1.5]}
    rows = artifact(
        tmp_path, "reference", [{"pair_id": "0", "prompt_id": "00ff", "split": "eval", **ids, **reference}], REFERENCE
    )

    def measured() -> tuple[float, float, bool]:
        scored = judged(merged, tmp_path / "rewards")
        drawn = _Drawn(merged, {"score": scored}, scored, options)
        made, reused = _evaluate(context, scores, rows, None, {}, drawn)
        metrics = made.manifest.metrics
        return metrics["win_rate"]["value"], metrics["mean_reward"]["tuned"], reused

    edit("1")
    assert measured() == (1.0, 11.0, False)
    assert measured() == (1.0, 11.0, True)
    edit("-1")
    assert measured() == (0.0, -11.0, False)


class Sampled:
    """A row of candidates, or of a block of prompts that are all too long, none."""

    def __call__(self, source: int) -> ShardOutput:
        completions = [{"text": text, "finished": True, "num_tokens": 1} for text in ("one", "of two words")]
        row = {"prompt_id": f"{source:016x}", "split": "train", "prompt": PROMPT, "completions": completions}
        rows = [row] if source else []
        return ShardOutput(
            pa.Table.from_pylist(rows, schema=CANDIDATES), Counter(read=1, prompt_too_long=1 - len(rows))
        )


def test_blocks_of_prompts_that_are_all_too_long_have_scores_and_pairs_of_none(context: RunContext):
    tasks = [ShardTask(source=n, content=content, rows=1) for n, content in ((0, "a"), (1, "b"), (0, "c"), (2, "d"))]
    rule = Rule(function="dpo_ray.rewards:length_window", arguments={"at_most": 1})
    rules = CandidatePairing()
    with without_ray():
        candidates, _ = shard_stage(
            context.output, "candidates", identity={}, inputs={}, tasks=tasks, pool=Pool(Sampled, {})
        )
        scores, _ = score_candidates(context.output, context.config, rule, candidates)
        pairs, _ = pair_candidates(context.output, context.config, rules, (rule,), candidates, {rule.label: scores})
    assert len(candidates.shards()) == len(scores.shards()) == len(pairs.shards()) == 4
    assert pairs.manifest.rows == 2 and pairs.manifest.counters["kept"] == 2
