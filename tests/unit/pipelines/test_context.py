"""A run's folder: its name, and what its record says while it is at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.storage.artifact import Contents, make
from pipelines import require_run_id
from pipelines.cli import app
from pipelines.context import STAGES_SO_FAR, RunContext

CONFIGS = Path(__file__).parents[3] / "pipelines" / "configs"


def config_of(folder: Path) -> Config:
    values = {"run": {"name": "n", "output": str(folder)}, "model": {"path": "m"}, "data": {"train": "x"}}
    return Config.model_validate(values)


@pytest.mark.parametrize("run_id", ["nightly", "2026-11-26T02:00:00+00:00", "a_b.c", "Läufe 3", "n=1"])
def test_a_plain_name_is_a_run_id(run_id: str):
    require_run_id(run_id)


@pytest.mark.parametrize("run_id", ["", ".", "..", "../x", "a/b", "/x", "a\\b", ".hidden", "-o", "a\nb", "a\0b", " "])
def test_what_leads_elsewhere_is_none(tmp_path: Path, run_id: str):
    with pytest.raises(ConfigError, match="is no name of a run"):
        require_run_id(run_id)
    with pytest.raises(ConfigError, match="is no name of a run"):
        RunContext.start(config_of(tmp_path), run_id)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "train", "ingest", "sweep", "iterate"])
def test_every_command_refuses_it_before_anything_else(command: str):
    asked = [command, str(CONFIGS / "align_cpu.yaml"), "--dry-run", "--run-id", "../elsewhere"]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, ConfigError) and "'../elsewhere'" in str(result.exception)


def test_while_it_is_at_work_a_run_says_what_its_stages_have_made(tmp_path: Path):
    context = RunContext.start(config_of(tmp_path), "r")
    record = context.folder / STAGES_SO_FAR
    seen = []

    def stage(name: str):
        def look(_):
            seen.append(json.loads(record.read_bytes()))
            return Contents()

        return context.stage(name, lambda: make(context.output, name, {}, {}, look))

    first, second = stage("one"), stage("two")
    assert seen == [{}, {"one": first.fingerprint}]
    summary = context.write_summary(0, [])
    assert {name: entry["fingerprint"] for name, entry in summary["stages"].items()} == {
        "one": first.fingerprint,
        "two": second.fingerprint,
    }
    assert not record.exists()
