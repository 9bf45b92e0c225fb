"""Examples for orchestrators, as far as they can be looked at without them: what they start, and as what."""

from __future__ import annotations

import ast
import re
import shlex
from itertools import pairwise
from typing import Any

import pytest
import yaml

from dpo_ray.config import load_config
from dpo_ray.errors import ConfigError, DataError, GateFailed
from tests.unit.cluster.manifests import KUBERNETES, OBJECTS, ROOT, changed, mistakes, objects, parse, the

EXAMPLES = ROOT / "cluster" / "orchestrators"
ARGO = yaml.safe_load((EXAMPLES / "argo.yaml").read_text())
SUBMITTER = the("RayJob", objects(OBJECTS[0].read_text()))["spec"]["submitterPodTemplate"]
SITE = KUBERNETES / "site"


def constants(name: str) -> dict[str, Any]:
    """Name → value, of the literals at the top of an example."""
    found = {}
    for node in ast.parse((EXAMPLES / name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # made of others
                continue
    return found


def words(line: str) -> list[str]:
    """A line of the shell with what stands for variables and templates filled in."""
    filled = re.sub(r"\$\{DPO_RAY:-(.*?)\}", r"\1", re.sub(r"\{\{.*?\}\}", "2026-11-01", line))
    return shlex.split(re.sub(r"\$\w+", "x", filled))


def argo_pod(cron_workflow: dict[str, Any]) -> dict[str, Any]:
    """The pod that Argo makes of the one template, without what Argo adds."""
    spec = cron_workflow["spec"]["workflowSpec"]
    [template] = spec["templates"]
    assert spec["entrypoint"] == template["name"]
    container = {"name": "main", **template["container"]}
    pod = {key: spec[key] for key in ("serviceAccountName", "securityContext", "volumes")} | {"containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", **spec["podMetadata"]}, "spec": pod}


POD = argo_pod(ARGO)
[CONTAINER] = POD["spec"]["containers"]


@pytest.mark.parametrize("more", ["", "DAYS"])
def test_the_command_of_airflow_is_one_of_ours(more: str):
    found = constants("airflow_bash.py")
    line = words(found["COMMAND"] + found.get(more, ""))
    parse(line)
    assert ("--since" in line) == bool(more) and "--run-id" in line


def test_the_command_of_argo_is_one_of_ours_and_its_overrides_are_options():
    given = {one["name"]: one["value"] for one in ARGO["spec"]["workflowSpec"]["arguments"]["parameters"]}
    for partitions, start in ((given["partitions"], given["start"]), ('["date=2026-11-01"]', "published")):
        values = {"workflow.name": "n-1", "workflow.parameters.partitions": partitions}
        values["workflow.parameters.start"] = start
        line = [
            re.sub(r"\{\{(.*?)\}\}", lambda found: values[found[1]], word)  # noqa: B023
            for word in [*CONTAINER["command"], *CONTAINER["args"]]
        ]
        parse(line)
        config = load_config(SITE / "run.yaml", [value for option, value in pairwise(line) if option == "-o"])
        assert config.train.start == start and list(config.data.partitions) == yaml.safe_load(partitions)


def test_the_pod_of_argo_is_what_kubernetes_takes():
    assert mistakes(POD) == []
    spoilt = changed(POD)
    spoilt["spec"]["containers"][0]["resource"] = spoilt["spec"]["containers"][0].pop("resources")
    assert mistakes(spoilt)
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {one["name"] for one in POD["spec"]["volumes"]}


def test_it_is_as_restricted_as_the_submitter_of_the_manifests_and_the_network_lets_it_in():
    spec = SUBMITTER["spec"]
    assert POD["spec"]["securityContext"] == spec["securityContext"]
    assert CONTAINER["securityContext"] == spec["containers"][0]["securityContext"]
    assert POD["metadata"]["labels"] == SUBMITTER["metadata"]["labels"]


def test_the_images_and_the_head_are_those_of_the_manifests():
    [image] = [
        one for one in yaml.safe_load((SITE / "kustomization.yaml").read_text())["images"] if "cpu" in one["name"]
    ]
    cluster = the("RayJob", objects(OBJECTS[0].read_text()))["metadata"]["name"]
    address = f"http://{cluster}-head-svc:8265"  # as KubeRay calls it
    airflow = constants("airflow_kubernetes.py")
    assert airflow["IMAGE"] == CONTAINER["image"] == f"{image['newName']}:{image['newTag']}"
    assert airflow["ADDRESS"] == address and address in CONTAINER["args"]
    assert airflow["NAMESPACE"] == ARGO["metadata"]["namespace"] == "dpo-ray"


def test_exit_codes_are_the_programs():
    [template] = ARGO["spec"]["workflowSpec"]["templates"]
    assert template["retryStrategy"]["expression"].endswith("not in [2, 3, 4]")
    dagster = constants("dagster_assets.py")
    assert dagster["HOPELESS"] == (ConfigError.exit_code, DataError.exit_code)
    for name in ("dagster_assets.py", "airflow_bash.py", "airflow_kubernetes.py"):
        assert constants(name)["GATE_FAILED"] == GateFailed.exit_code
