"""A published model on its way to the hub, which a stand-in of its library takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import HASHES
from dpo_ray.storage.location import Location
from pipelines.context import RunContext
from pipelines.push import PUSHED, push, require_push


class Hub:
    """What HfApi is asked for. `fails`: it is not there."""

    def __init__(self) -> None:
        self.fails = False
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _call(self, name: str, **told: Any) -> None:
        if self.fails:
            raise ConnectionError("no route to the hub")
        self.calls.append((name, told))

    def create_repo(self, repo_id: str, **told: Any) -> None:
        self._call("create_repo", repo_id=repo_id, **told)

    def create_branch(self, repo_id: str, **told: Any) -> None:
        self._call("create_branch", repo_id=repo_id, **told)

    def upload_folder(self, **told: Any) -> Any:
        files = sorted(file.name for file in Path(told.pop("folder_path")).iterdir())
        self._call("upload_folder", files=files, **told)
        return SimpleNamespace(oid=f"commit-{len(self.calls)}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def config_of(output: Path, **options: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "n", "output": str(output)},
            "model": {"path": "m"},
            "data": {"train": "t"},
            "publish": {"push_to_hub": {"repo_id": "owner/name", **options}},
        }
    )


def published(output: Path, version: str) -> Location:
    folder = output / "models" / "n" / version
    folder.mkdir(parents=True)
    for name in ("README.md", "model.safetensors", HASHES):
        (folder / name).write_text(version)
    return Location.of(folder)


def context_of(output: Path, **options: Any) -> RunContext:
    return RunContext(config_of(output, **options), "night", Location.of(output))


def test_a_version_is_pushed_once_to_each_place(hub: Hub, tmp_path: Path):
    version = published(tmp_path, "v1")
    context = context_of(tmp_path)
    push(context, version)
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "owner/name", "private": True, "exist_ok": True}
    told = hub.calls[1][1]
    assert told["commit_message"] == "n/v1 of run night" and told["revision"] is None
    assert told["ignore_patterns"] == [HASHES] and {"*.safetensors", "adapter_config.json"} <= set(
        told["delete_patterns"]
    )
    assert context.results["pushed"] == {"to": "owner/name@main", "version": "v1", "commit": "commit-2"}
    again = context_of(tmp_path)
    push(again, version)
    assert len(hub.calls) == 2 and again.results == context.results
    push(context_of(tmp_path, revision="nightly", private=False), version)
    assert [name for name, _ in hub.calls[2:]] == ["create_repo", "create_branch", "upload_folder"]
    push(context_of(tmp_path), published(tmp_path, "v2"))
    kept = json.loads((tmp_path / "models" / "n" / "pushed.json").read_text())
    assert {place: one["version"] for place, one in kept.items()} == {
        "owner/name@main": "v2",
        "owner/name@nightly": "v1",
    }


def test_what_fails_is_told_with_the_command_that_does_it_again(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    version, context = published(tmp_path, "v1"), context_of(tmp_path)
    hub.fails = True
    push(context, version)
    said = " ".join(capsys.readouterr().err.split())
    assert "is published, but could not be pushed to owner/name@main (ConnectionError: no route to the hub)" in said
    assert f"computes nothing: dpo-ray run {tmp_path}/runs/night/config.yaml" in said
    assert context.results["pushed"]["commit"] is None and (version / "README.md").exists()
    hub.fails = False
    push(context, version)
    assert context.results["pushed"]["commit"] == "commit-2"


def test_without_push_to_hub_nobody_is_asked(hub: Hub, tmp_path: Path):
    config = config_of(tmp_path)
    alone = config.model_copy(update={"publish": config.publish.model_copy(update={"push_to_hub": None})})
    push(RunContext(alone, "night", Location.of(tmp_path)), published(tmp_path, "v1"))
    require_push(alone)
    assert not hub.calls


def test_without_a_token_the_run_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token of the hub here: set HF_TOKEN"):
        require_push(config_of(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    require_push(config_of(tmp_path))


@pytest.mark.parametrize("repo_id", ["name", "owner/name/more", "-/name"])
def test_a_repository_has_an_owner_and_a_name(tmp_path: Path, repo_id: str):
    with pytest.raises(ConfigError, match=r"publish\.push_to_hub\.repo_id"):
        config_of(tmp_path, repo_id=repo_id)


@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "unwritable"])
def test_a_record_that_cannot_be_read_or_written_fails_no_published_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bool
):
    version, context = published(tmp_path, "v1"), context_of(tmp_path)
    if damaged:
        (version.parent / PUSHED).write_bytes(b"{")
    else:
        (Path(version.parent.uri) / PUSHED).mkdir()
    push(context, version)
    assert context.results["pushed"]["commit"] is None
    assert "is published, but could not be pushed" in capsys.readouterr().err
