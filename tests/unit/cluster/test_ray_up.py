"""The files of Ray's cluster launcher, by Ray's own schema, and what they start."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dpo_ray.config import load_config
from dpo_ray.on_ray.room import Host, lacking
from pipelines import planned
from pipelines.needs import needs
from tests.unit.cluster.manifests import KUBERNETES, MANIFESTS, ROOT, changed

FILES = sorted((MANIFESTS / "ray_up").glob("*.yaml"))
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return changed(found)  # without what anchors share


def validate(config: dict[str, Any]) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None and ray.origin is not None
    jsonschema.validate(config, json.loads((Path(ray.origin).parent / "autoscaler/ray-schema.json").read_text()))


def test_there_is_one_for_a_cloud_and_one_for_hosts():
    assert {loaded(path)["provider"]["type"] for path in FILES} == {"aws", "local"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_it(path: Path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate(loaded(path))
    validate_config(prepare_config(loaded(path)))


def test_a_mistake_is_found():
    for key, value in (("idle_timeout_minute", 5), ("max_workers", "many")):
        with pytest.raises(jsonschema.ValidationError):
            validate(loaded(FILES[0]) | {key: value})


def started(path: Path) -> list[list[str]]:
    """The `ray` commands of a file, as words."""
    config = loaded(path)
    found = []
    for line in [line for key in STARTS for line in config[key]]:
        words = shlex.split(line.rpartition(";")[2])
        [at] = [at for at, word in enumerate(words) if word.endswith("/ray")]
        found.append(words[at:])
    return found


def parsed(words: list[str]) -> str:
    """The name of Ray's command. Raises click's error where it does not take these words."""
    from ray.scripts.scripts import cli

    with cli.make_context("ray", words[1:]) as context:
        name, command, rest = cli.resolve_command(context, words[1:])
        command.make_context(name, rest, parent=context)
    return str(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_the_commands_that_start_it(path: Path):
    assert [parsed(words) for words in started(path)] == ["stop", "start", "stop", "start"]
    with pytest.raises(Exception, match="No such option"):
        parsed(["ray", "start", "--heads"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_ask_for_the_token_and_strangers_do_not_see_the_dashboard(path: Path):
    config = loaded(path)
    starts = [line for key in STARTS for line in config[key] if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_pinned_packages_are_installed_from_files_that_are_there(path: Path):
    setup = "\n".join(loaded(path)["setup_commands"])
    files = re.findall(r"--requirement ~/dpo-ray/(\S+)", setup)
    assert files == ["requirements-gpu.txt"] and (ROOT / files[0]).is_file()
    extra = loaded(path).get("head_setup_commands", [])
    pins = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    assert [pin for line in extra for pin in re.findall(r"\S+==\S+", line) if pin not in pins] == []


def test_the_clouds_machines_have_room_for_every_stage():
    types = loaded(MANIFESTS / "ray_up" / "aws.yaml")["available_node_types"]
    machines = {"m7i.xlarge": (4, 0), "m7i.2xlarge": (8, 0), "g6e.4xlarge": (16, 1)}  # CPUs and GPUs, as EC2 has them
    nodes = []
    for name, one in types.items():
        cpus, gpus = machines[one["node_config"]["InstanceType"]]
        has = {"CPU": one["resources"].get("CPU", cpus), "GPU": gpus}
        nodes += [Host(has, one.get("labels", {}))] * one.get("max_workers", 1)
        assert name == "head" or one["min_workers"] == 0
    config = load_config(KUBERNETES / "site" / "run.yaml")
    found = needs(config, planned(config, "publish"))
    assert found and [(stage, missing) for stage, need in found if (missing := lacking(nodes, need))] == []


def test_the_heads_profile_is_not_the_workers():
    types = loaded(MANIFESTS / "ray_up" / "aws.yaml")["available_node_types"]
    profiles = {name: one["node_config"]["IamInstanceProfile"]["Name"] for name, one in types.items()}
    assert profiles["cpu"] == profiles["gpu"] != profiles["head"]  # who may start machines is not who runs the work
