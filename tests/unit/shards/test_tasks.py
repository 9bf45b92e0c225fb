"""What makes a model's figures on a task others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dpo_ray.config import Model, Tasks
from dpo_ray.shards import tasks
from dpo_ray.shards.tasks import BenchmarkTask, identity


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "require_harness", lambda: "0.4.13")


def test_model_and_options_count_by_content_and_places_do_not(tiny_model: Path, tmp_path: Path):
    options = Tasks(names=("a",), include_path="here")
    found = identity(Model(path=str(tiny_model)), options, "files")
    shutil.copytree(tiny_model, tmp_path / "copy")
    elsewhere = options.model_copy(update={"names": ("a", "b"), "include_path": "there", "batch_size": 1})
    assert identity(Model(path=str(tmp_path / "copy")), elsewhere, "files") == found
    assert found["engine_version"].startswith("lm_eval 0.4.13, torch ")
    others = [
        identity(Model(path=str(tiny_model), dtype="bfloat16"), options, "files"),
        identity(Model(path=str(tiny_model), template_arguments={"enable_thinking": False}), options, "files"),
        identity(Model(path=str(tiny_model)), options, "other files"),
        identity(Model(path=str(tiny_model)), options.model_copy(update={"num_fewshot": 0}), "files"),
        identity(Model(path=str(tiny_model)), options.model_copy(update={"limit": 10}), "files"),
    ]
    assert all(other != found for other in others)


def test_a_task_is_known_by_its_name():
    assert BenchmarkTask("a").content == BenchmarkTask("a").content != BenchmarkTask("b").content
