"""A run's folder: its name, and what its record says while it is at work."""

from __future__ import annotations

import json
from contextlib import nullcontext
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.storage.artifact import Contents, make
from pipelines import context, require_run_id
from pipelines.cli import app
from pipelines.context import STAGES_SO_FAR, RunContext
from tests.object_store import BUCKET, object_store

CONFIGS = Path(__file__).parents[3] / "pipelines" / "configs"


def config_of(folder: Path | str) -> Config:
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


@pytest.mark.parametrize("store", ["local", "s3"])
def test_runs_that_begin_in_the_same_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
):
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Clock:
            return cls(2026, 11, 26, 2, tzinfo=UTC)

    monkeypatch.setattr(context, "datetime", Clock)
    with object_store() if store == "s3" else nullcontext():
        config = config_of(f"s3://{BUCKET}/same_second" if store == "s3" else tmp_path)
        runs = [RunContext.start(config).run_id for _ in range(3)]
    assert len(set(runs)) == 3 and all(run.startswith("n-20261126T020000Z") for run in runs)


@pytest.mark.parametrize("command", ["run", "train", "ingest", "sweep", "iterate"])
def test_every_command_refuses_it_before_anything_else(command: str):
    asked = [command, str(CONFIGS / "align_cpu.yaml"), "--dry-run", "--run-id", "../elsewhere"]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, ConfigError) and "'../elsewhere'" in str(result.exception)


def test_while_it_is_at_work_a_run_says_what_its_stages_have_made(tmp_path: Path):
    begun = RunContext.start(config_of(tmp_path), "r")
    record = begun.folder / STAGES_SO_FAR
    seen = []

    def stage(name: str):
        def look(_):
            seen.append(json.loads(record.read_bytes()))
            return Contents()

        return begun.stage(name, lambda: make(begun.output, name, {}, {}, look))

    first, second = stage("one"), stage("two")
    assert seen == [{}, {"one": first.fingerprint}]
    summary = begun.write_summary(0, [])
    assert {name: entry["fingerprint"] for name, entry in summary["stages"].items()} == {
        "one": first.fingerprint,
        "two": second.fingerprint,
    }
    assert not record.exists()
