"""The README's commands are the program's commands, and its file map is the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_ray.storage.location import Location
from pipelines.cli import app
from tests.shard_stages import age, stage

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("    #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_the_readme_has_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray") and ".yaml" in c])
def test_dpo_ray_commands_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[0] == "submit":  # what it ships and runs is tried on a real head in tests/on_ray/test_submit.py
        words = ["submit", "--help"]
    elif words[0] in {"doctor", "plan"}:  # what they find is tried in tests/unit/pipelines
        words.append("--help")
    elif "--dry-run" not in words:
        words.append("--dry-run")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray gc ")])
def test_garbage_is_collected_as_it_says(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    artifact, _ = stage(Location.of(words[1]), [1, 2])
    age(tmp_path, 40)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert artifact.shards()[0].exists() != ("--delete" in words)


def test_no_command_goes_untried():
    tried = ("make ", "dpo-ray ", "ray job submit ")  # the last in tests/on_ray/test_submit.py
    assert [c for c in COMMANDS if not c.startswith(tried)] == []


def test_the_file_map_names_what_exists():
    file_map = README.partition("## File map")[2].partition("\n## ")[0]
    paths = re.findall(r"^\| (`[^|]+`) \|", file_map, re.M)
    assert len(paths) > 10
    for cell in paths:
        names = re.findall(r"`([^`]+)`", cell)
        folder = Path(names[0]).parent
        for name in names:
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
