"""What benchmark tasks are known by; lm-evaluation-harness is not needed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import Tasks, load_config
from dpo_ray.errors import ConfigError
from dpo_ray.scoring.task_source import (
    _unknown,
    _with_members,
    require_same_files,
    require_tasks,
    task_files_hash,
    tasks_folder,
)
from pipelines.preflight import preflight
from tests.command_line import CONFIGS, overrides


def entry(kind: str, **more: Any) -> SimpleNamespace:
    """As lm_eval's TaskIndex has it."""
    return SimpleNamespace(kind=SimpleNamespace(name=kind), **{"cfg": None, "tags": set(), **more})


INDEX = {
    "school": entry("GROUP", cfg={"group": "school", "task": ["maths", {"group": "languages"}, {"task": "inline"}]}),
    "languages": entry("GROUP", cfg={"group": "languages", "task": "english"}),
    "hard": entry("TAG", tags={"maths", "code"}),
    **{name: entry("TASK", cfg={"task": name}) for name in ("maths", "english")},
    "code": entry("TASK", cfg={"task": "code", "unsafe_code": True}),
}


@pytest.fixture
def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )


def test_without_the_library_the_error_names_the_extra(without_lm_eval):
    with pytest.raises(ConfigError, match=r"pip install 'dpo-ray\[tasks\]'"):
        require_tasks(Tasks(names=("arc_easy",)))


@pytest.mark.parametrize(("until", "refused"), [("train", False), ("evaluate", True), ("publish", True)])
def test_a_run_that_comes_to_tasks_is_refused_before_it_starts(
    without_lm_eval, tmp_path, tiny_model, write_preferences, until, refused
):
    write_preferences(tmp_path / "data", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    settings = overrides(
        data__train=str(tmp_path / "data/*.parquet"), model__path=str(tiny_model), evaluate__tasks={"names": ["mmlu"]}
    )
    config = load_config(CONFIGS / "align_cpu.yaml", settings[1::2])
    if not refused:
        preflight(config, until)
        return
    with pytest.raises(ConfigError, match=r"dpo-ray\[tasks\]"):
        preflight(config, until)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"include_path is .*/none"):
        tasks_folder(Tasks(names=("a",), include_path=str(tmp_path / "none")))
    assert tasks_folder(Tasks(names=("a",))) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert tasks_folder(Tasks(names=("a",), include_path="own")) == tmp_path / "own"


def test_task_files_are_known_by_their_places_and_contents(tmp_path: Path):
    def written(name: str, place: str = "a/task.yaml", text: str = "task: a") -> str | None:
        folder = tmp_path / name
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text(text)
        return task_files_hash(folder)

    first = written("first")
    assert written("elsewhere") == first
    assert written("changed", text="task: b") != first and written("moved", place="b/task.yaml") != first
    (tmp_path / "first" / "a" / "__pycache__").mkdir()
    (tmp_path / "first" / "a" / "__pycache__" / "functions.cpython-311.pyc").write_bytes(b"x")
    assert task_files_hash(tmp_path / "first") == first
    (tmp_path / "first" / "a" / "functions.py").write_text("x = 1")
    assert task_files_hash(tmp_path / "first") != first
    assert task_files_hash(None) is None


def test_other_files_on_a_node_are_refused(tmp_path: Path):
    (tmp_path / "task.yaml").write_text("task: a")
    known = task_files_hash(tmp_path)
    require_same_files(tmp_path, known)
    require_same_files(None, None)
    (tmp_path / "task.yaml").write_text("task: b")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="not the same on every node"):
            require_same_files(folder, known)


def test_groups_and_tags_stand_for_their_tasks():
    # A task that a group defines in its own file has no entry.
    assert {name for name, _ in _with_members("school", INDEX)} == {"school", "maths", "languages", "english"}
    assert {name for name, _ in _with_members("hard", INDEX)} == {"hard", "maths", "code"}
    assert {name for name, _ in _with_members("code", INDEX)} == {"code"}


def test_an_unknown_name_is_told_with_those_that_are_close(tmp_path: Path):
    told = _unknown("mathz", INDEX, "0.4.13", tmp_path)
    assert "no such task in lm_eval 0.4.13" in told and str(tmp_path) in told and "Did you mean maths?" in told
    assert "Did you mean" not in _unknown("zzzzzz", INDEX, "0.4.13", None)
