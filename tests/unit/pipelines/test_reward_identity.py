"""Editing a reward makes anew what was made with it: pairs and win rates."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray import reward_source
from dpo_ray.config import load_config
from dpo_ray.pairs import CANDIDATES, REFERENCE, SCORES
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
from pipelines.context import RunContext
from pipelines.evaluate import _evaluate
from pipelines.generate import _pair
from tests.command_line import CONFIGS

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
        reward_source._identity.cache_clear()

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


def test_pairs_are_made_again(context: RunContext, tmp_path: Path, edit: Callable[[str], None]):
    options = context.config.generate
    assert options is not None
    candidates = artifact(tmp_path, "candidates", [], CANDIDATES)

    # There is no shard, and so no worker.
    edit("1")
    first, reused = _pair(context, options, candidates)
    assert not reused
    edit("(1)")
    assert _pair(context, options, candidates) == (first, True)
    edit("-1")
    second, reused = _pair(context, options, candidates)
    assert not reused and second.fingerprint != first.fingerprint


def test_a_win_rate_is_measured_again(context: RunContext, tmp_path: Path, edit: Callable[[str], None]):
    options = context.config.evaluate.win_rate
    assert options is not None
    answers = {"base": "Yes.", "tuned": "Yes, it is."}
    base, tuned = (
        artifact(
            tmp_path / side,
            "candidates",
            [
                {
                    "prompt_id": "00ff",
                    "split": "eval",
                    "prompt": [{"role": "user", "content": "Is it?"}],
                    "completions": [{"text": text, "finished": True, "num_tokens": 3}],
                }
            ],
            CANDIDATES,
        )
        for side, text in answers.items()
    )
    sides = {"chosen_logprobs": [-1.0], "rejected_logprobs": [-2.0]}
    scores = artifact(tmp_path, "policy_scores", [{"pair_id": "0", **sides}], SCORES)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    reference = {"chosen_ref_logprobs": [-1.5], "rejected_ref_logprobs": [-1.5]}
    rows = artifact(
        tmp_path, "reference", [{"pair_id": "0", "prompt_id": "00ff", "split": "eval", **ids, **reference}], REFERENCE
    )

    def measured() -> tuple[float, float, bool]:
        made, reused = _evaluate(context, scores, rows, None, (base, tuned, options))
        metrics = made.manifest.metrics
        return metrics["win_rate"]["value"], metrics["mean_reward"]["tuned"], reused

    edit("1")
    assert measured() == (1.0, 11.0, False)
    assert measured() == (1.0, 11.0, True)
    edit("-1")
    assert measured() == (0.0, -11.0, False)
