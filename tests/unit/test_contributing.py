"""The worked examples of CONTRIBUTING.md, each applied to a copy of the project and run there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COPIED = ("dpo_ray", "pipelines", "tuning", "cluster", "tests", "pyproject.toml")
EXAMPLES = re.findall(r"^## (Add an? \w+)$", TEXT, re.M)


def section(heading: str) -> str:
    return TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def run(command: list[str], folder: Path, given: str | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("DPO_RAY_COVERAGE", None)
    done = subprocess.run(
        command, cwd=folder, input=given, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_there_are_four():
    assert EXAMPLES == ["Add a loss", "Add a reward", "Add a format", "Add a stage"]


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_does_what_it_says_and_keeps_the_rooms(heading: str, copy: Path):
    text = section(heading)
    for patch in blocks(text, "diff"):
        run(["git", "apply", "-"], copy, given=patch)
    new_files = re.findall(r"^`([\w/.]+)`:\n\n```python\n(.*?)```", text, re.M | re.S)
    assert new_files
    for name, content in new_files:
        assert not (copy / name).exists()
        (copy / name).write_text(content, encoding="utf-8")
    [command] = blocks(text, "bash")
    python, *arguments = shlex.split(command)
    assert python == "python"
    assert re.search(r"\d passed", run([sys.executable, *arguments], copy))
    rooms = ["tests/unit/test_import_arrows.py", "-k", "a_room_imports or import_each_other"]
    assert re.search(r"\d\d passed", run([sys.executable, "-m", "pytest", *rooms], copy))
    run([str(Path(sys.executable).parent / "ruff"), "check", *(name for name, _ in new_files)], copy)
