"""The manifests of Kubernetes: by the schemas of their kinds, by each other, and by the program that they start."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import errors
from dpo_ray.config import load_config
from dpo_ray.on_ray.room import Host, fitting, lacking
from pipelines import planned
from pipelines.needs import needs
from tests.unit.cluster.manifests import (
    KUBERNETES,
    NIGHTLY,
    OBJECTS,
    OVERLAYS,
    build,
    changed,
    described,
    mistakes,
    objects,
    parse,
    pod_specs,
    quantity,
    the,
)
from tests.unit.test_dependencies import PROJECT, pins

RAYJOB = the("RayJob", objects(OBJECTS[0].read_text()))
CRONJOB = the("CronJob", objects((NIGHTLY / "cronjob.yaml").read_text()))
KIND_OF = {
    "cluster": "RayCluster",
    "job": "RayJob",
    "nightly": "RayJob",
    "nightly-kueue": "RayJob",
    "nightly-raycronjob": "RayCronJob",
    "site": "RayJob",
}
"""Overlay → what it makes of the RayJob."""
LONGEST_NAME = {"RayJob": 47, "RayCronJob": 36, "RayCluster": 63}
OF_A_PERIOD = "-29402520-run"
"""What the CronJob and launch.sh append to its name."""


def test_there_are_overlays():
    assert set(OVERLAYS) == set(KIND_OF)


# Schemas


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_every_object_is_what_its_kind_takes(path: Path):
    found = objects(path.read_text())
    assert found
    for one in found:
        assert mistakes(one) == [], described(one)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_built_of_what_the_kinds_take(overlay: str):
    found = build(KUBERNETES / overlay)
    assert the(KIND_OF[overlay], found)
    assert ("CronJob" in {one["kind"] for one in found}) == (overlay in {"nightly", "nightly-kueue"})
    for one in found:
        assert mistakes(one) == [], described(one)
        assert one["metadata"]["namespace"] == "dpo-ray"


def misspelt_deep(found: dict[str, Any]) -> None:
    container = found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")


def of_a_wrong_type(found: dict[str, Any]) -> None:
    found["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = "true"


def of_another_kind(found: dict[str, Any]) -> None:
    found["spec"]["concurrencyPolicy"] = "Forbid"


@pytest.mark.parametrize("spoil", [misspelt_deep, of_a_wrong_type, of_another_kind])
def test_a_mistake_in_a_rayjob_is_found(spoil: Callable[[dict[str, Any]], None]):
    spoilt = changed(RAYJOB)
    spoil(spoilt)
    assert mistakes(spoilt)


def at_a_wrong_place(found: dict[str, Any]) -> None:
    found["spec"]["backoffLimit"] = found["spec"]["jobTemplate"]["spec"].pop("backoffLimit")


def text_for_a_number(found: dict[str, Any]) -> None:
    found["spec"]["startingDeadlineSeconds"] = "1h"


def misspelt_key(found: dict[str, Any]) -> None:
    found["spec"]["startingDeadLineSeconds"] = found["spec"].pop("startingDeadlineSeconds")


@pytest.mark.parametrize("spoil", [misspelt_key, at_a_wrong_place, text_for_a_number])
def test_a_mistake_in_the_cronjob_is_found(spoil: Callable[[dict[str, Any]], None]):
    spoilt = changed(CRONJOB)
    spoil(spoilt)
    assert mistakes(spoilt)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kubernetes_checks_beside_the_schemas_holds(overlay: str):
    for one in build(KUBERNETES / overlay):
        name = one["metadata"]["name"]
        assert len(name) <= LONGEST_NAME.get(one["kind"], 63)
        spec = one["spec"]["jobTemplate"] if one["kind"] == "RayCronJob" else one.get("spec", {})
        if one["kind"] not in {"RayJob", "RayCronJob"}:
            continue
        # KubeRay: a job that is suspended, or has a time to live, shuts its cluster down; and has no other strategy.
        assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
        assert "deletionStrategy" not in spec and "clusterSelector" not in spec
        cluster = spec["rayClusterSpec"]
        # KubeRay: the token needs the version of Ray; autoscaler v2, that pods are not restarted.
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["rayVersion"] == pins("requirements-cpu.txt")["ray"] == pins("requirements-gpu.txt")["ray"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert {group["template"]["spec"].get("restartPolicy", "Never") for group in groups} == {"Never"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_an_object_refers_to_is_there(overlay: str):
    found = build(KUBERNETES / overlay)
    names = {
        kind: {one["metadata"]["name"] for one in found if one["kind"] == kind}
        for kind in ("ConfigMap", "ServiceAccount")
    }
    specs = [spec for one in found for spec in pod_specs(one)]
    assert specs
    for spec in specs:
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        asked = {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            sources = container.get("envFrom", [])
            asked |= {source["configMapRef"]["name"] for source in sources if "configMapRef" in source}
        assert asked <= names["ConfigMap"]
        assert spec["serviceAccountName"] in names["ServiceAccount"]
    # Each one's name holds the hash of its content: an edit does not reach a run that has begun.
    assert all(re.search(r"-[a-z0-9]{10}$", name) for name in names["ConfigMap"])


# What runs, and on what


def test_the_entrypoint_is_a_command_of_ours():
    parse(shlex.split(RAYJOB["spec"]["entrypoint"]))
    # It is a line of the submitter's shell, which would expand variables of its own.
    assert "$" not in RAYJOB["spec"]["entrypoint"]


def test_a_command_that_does_not_exist_is_found():
    for wrong in ("dpo-ray align /etc/dpo-ray/run.yaml", "dpo-ray run /etc/dpo-ray/run.yaml --resume", "dpo-ray run"):
        with pytest.raises(Exception, match=r"No such (command|option)|Missing parameter"):
            parse(shlex.split(wrong))


def test_the_configuration_that_it_names_is_there_and_loads():
    [mount] = [
        mount
        for mount in RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
            "volumeMounts"
        ]
        if mount["name"] == "config"
    ]
    path = Path(shlex.split(RAYJOB["spec"]["entrypoint"])[2])
    assert str(path.parent) == mount["mountPath"]
    config = load_config(KUBERNETES / "site" / path.name)
    config.run.require_absolute_output()
    # No file system is shared.
    places = [config.run.output, config.model.path, config.data.train]
    assert all(str(place).startswith("s3://") for place in places)


@pytest.mark.parametrize("overlay", ["site", "nightly-kueue"])
def test_its_stages_have_room_on_the_machines(overlay: str):
    cluster = the("RayJob", build(KUBERNETES / overlay))["spec"]["rayClusterSpec"]
    nodes = []
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits.get("nvidia.com/gpu", 0))}
        nodes += [Host(has, group["labels"])] * group["maxReplicas"]
    config = load_config(KUBERNETES / "site" / "run.yaml")
    found = needs(config, planned(config, "publish"))
    assert found
    assert [(stage, missing) for stage, need in found if (missing := lacking(nodes, need))] == []
    # Models are on the nodes with GPUs, and rows on those without.
    on_gpus = {stage for stage, need in found if need.gpus}
    assert on_gpus == {"reference", "train", "evaluate"}
    assert all({bool(node.resources["GPU"]) for node in fitting(nodes, n.place)} == {n.gpus > 0} for _, n in found)
    for _, need in found:
        assert lacking([Host(node.resources, {"pool": "none"}) for node in nodes], need) is not None


def test_workers_come_from_nothing_and_go_again():
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["groupName"]: group["minReplicas"] for group in cluster["workerGroupSpecs"]} == {"cpu": 0, "gpu": 0}


def test_shared_memory_holds_rays_object_store():
    # Ray takes 30% of the memory for it, and where /dev/shm has less, /tmp.
    specs = list(pod_specs(RAYJOB["spec"]["rayClusterSpec"]))
    assert len(specs) == 3
    for spec in specs:
        [shm] = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert quantity(shm["sizeLimit"]) >= 0.3 * quantity(spec["containers"][0]["resources"]["limits"]["memory"])


def test_a_run_of_its_own_leaves_the_template_alone():
    assert the("RayJob", build(KUBERNETES / "job"))["metadata"]["name"] != RAYJOB["metadata"]["name"]


def test_with_kueue_a_cluster_is_let_in_as_a_whole():
    cluster = the("RayJob", build(KUBERNETES / "nightly-kueue"))["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0


# Secure


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_locked_in(overlay: str):
    for one in build(KUBERNETES / overlay):
        for spec in pod_specs(one):
            context = spec["securityContext"]
            assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
            assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
            written = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
            assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
            for container in spec["containers"]:
                assert locked(container["securityContext"])
                # What Ray, vLLM and kubectl write lies in volumes that go with the pod.
                mounts = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in written}
                assert "/tmp" in mounts
                if container["name"].startswith("ray-"):
                    assert {"/home/dpo-ray", "/dev/shm"} <= mounts
                for kind in ("requests", "limits"):
                    assert {"cpu", "memory"} <= container["resources"][kind].keys()
                assert ":" in container["image"] and not container["image"].endswith(":latest")


def locked(context: dict[str, Any]) -> bool:
    return (
        context["allowPrivilegeEscalation"] is False
        and context["readOnlyRootFilesystem"] is True
        and context["capabilities"] == {"drop": ["ALL"]}
    )


def test_the_autoscaler_beside_the_head_is_locked_in_as_well():
    options = RAYJOB["spec"]["rayClusterSpec"]["autoscalerOptions"]
    assert locked(options["securityContext"])
    assert {"cpu", "memory"} <= options["resources"]["limits"].keys()
    assert {mount["mountPath"] for mount in options["volumeMounts"]} == {"/tmp"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_and_not_written(overlay: str):
    found = build(KUBERNETES / overlay)
    assert "Secret" not in {one["kind"] for one in found}
    secret = re.compile(r"SECRET|TOKEN|PASSWORD|KEY", re.I)
    for one in found:
        names = [*one.get("data", {})] + [
            variable["name"]
            for spec in pod_specs(one)
            for container in spec["containers"]
            for variable in container.get("env", [])
            if "value" in variable
        ]
        assert [name for name in names if secret.search(name)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_has_a_network_policy(overlay: str):
    found = build(KUBERNETES / overlay)
    policies = [one["spec"] for one in found if one["kind"] == "NetworkPolicy"]
    assert all(set(policy["policyTypes"]) == {"Ingress", "Egress"} for policy in policies)
    selectors = [policy["podSelector"]["matchLabels"] for policy in policies]
    templates = [template for one in found for template in pod_templates(one)]
    assert templates
    for template in templates:
        labels = template["metadata"]["labels"]
        assert len([one for one in selectors if one.items() <= labels.items()]) == 1


def pod_templates(found: Any) -> list[dict[str, Any]]:
    if isinstance(found, dict):
        own = [found] if "containers" in found.get("spec", {}) and "metadata" in found else []
        return own + [one for value in found.values() for one in pod_templates(value)]
    return [one for value in found for one in pod_templates(value)] if isinstance(found, list) else []


def test_probes_ask_what_ray_answers_without_a_token():
    ray = importlib.util.find_spec("ray")
    assert ray is not None and ray.origin is not None
    source = (Path(ray.origin).parent / "dashboard/http_server_agent.py").read_text()
    public = re.findall(r'"(/[^"]+)"', source.partition("PUBLIC_EXACT_PATHS = [")[2].partition("]")[0])
    constants = (Path(ray.origin).parent / "_private/ray_constants.py").read_text()
    [port] = re.findall(r"DEFAULT_DASHBOARD_AGENT_LISTEN_PORT = (\d+)", constants)
    containers = [c for spec in pod_specs(RAYJOB["spec"]["rayClusterSpec"]) for c in spec["containers"]]
    assert len(containers) == 3
    for container in containers:
        for probe in ("readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in public and asked["port"] == int(port)


# The nightly CronJob


def launcher() -> dict[str, Any]:
    [spec] = pod_specs(CRONJOB)
    return spec


def test_a_night_that_is_not_over_keeps_the_next_one_from_starting():
    assert CRONJOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert launcher()["restartPolicy"] == "Never"  # what podFailurePolicy needs
    job, run = CRONJOB["spec"]["jobTemplate"]["spec"], RAYJOB["spec"]
    # The pod outlives every attempt of the RayJob: its deadline counts anew for each of them.
    longest = (run["backoffLimit"] + 1) * run["activeDeadlineSeconds"]
    assert longest + 3600 <= job["activeDeadlineSeconds"] < 24 * 3600
    assert run["preRunningDeadlineSeconds"] < run["activeDeadlineSeconds"]
    # The RayJob of a pod that lost its node is still there when the next pod looks.
    assert "ttlSecondsAfterFinished" not in job


def test_the_template_never_runs_by_itself():
    for overlay in ("nightly", "nightly-kueue"):
        template = the("RayJob", build(KUBERNETES / overlay))
        assert template["spec"]["suspend"] is True
        assert "kueue.x-k8s.io/queue-name" not in template["metadata"]["labels"]  # which would start it
        cronjob = the("CronJob", build(KUBERNETES / overlay))
        [spec] = pod_specs(cronjob)
        named = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
        assert named["TEMPLATE"] == template["metadata"]["name"]
        assert len(cronjob["metadata"]["name"] + OF_A_PERIOD) <= LONGEST_NAME["RayJob"]


def test_what_came_of_a_run_is_final_and_what_became_of_the_pod_is_not():
    rules = CRONJOB["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    [rule] = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert rule["operator"] == "NotIn"
    assert rule["containerName"] == launcher()["containers"][0]["name"]
    exit_codes = {one.exit_code for _, one in inspect.getmembers(errors, inspect.isclass) if hasattr(one, "exit_code")}
    assert {2, 3, 4, 75} <= exit_codes
    # Of a run that was ended by SIGTERM the script tells 1: the pod's own 143 is another thing.
    assert not set(rule["values"]) & ((exit_codes - {errors.Terminated.exit_code}) | {124})
    script = (NIGHTLY / "launch.sh").read_text()
    # 137 is the kernel's or the kubelet's.
    assert set(rule["values"]) == {int(code) for code in re.findall(r"(?:exit |in a row\" )(69|143)", script)} | {137}


def test_its_pod_may_do_what_its_script_does_and_no_more():
    found = objects((NIGHTLY / "access.yaml").read_text())
    role, binding, account = (the(kind, found) for kind in ("Role", "RoleBinding", "ServiceAccount"))
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]
    script = (NIGHTLY / "launch.sh").read_text()
    lines = [line for line in script.splitlines() if not line.startswith("#") and not re.search(r"\bsay\b|trap", line)]
    used = set(re.findall(r"kubectl (\w+)", "\n".join(lines)))
    assert used - {"patch"} == set(role["rules"][0]["verbs"])  # patch is --local
    assert len(re.findall(r"kubectl patch", script)) == len(re.findall(r"kubectl patch --local", script))
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    assert launcher()["serviceAccountName"] == account["metadata"]["name"]


def test_its_pod_has_all_that_the_script_reads():
    script = (NIGHTLY / "launch.sh").read_text()
    assigned = set(re.findall(r"^\s*([A-Z_]+)=", script, re.M))
    read = set(re.findall(r"\$\{?([A-Z_]+)(?!\w|:-)", script)) - assigned
    given = {variable["name"] for variable in launcher()["containers"][0]["env"]}
    assert read == given - {"HOME"}
    command = launcher()["containers"][0]["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in launcher()["containers"][0]["volumeMounts"]}
    assert command == ["sh", f"{mounts['launch']}/launch.sh"]


def test_raycronjob_keeps_the_hours_of_the_cronjob_and_the_job_of_the_base():
    found = the("RayCronJob", build(KUBERNETES / "nightly-raycronjob"))
    job = the("RayJob", build(KUBERNETES / "site"))
    for key in ("schedule", "timeZone"):
        assert found["spec"][key] == CRONJOB["spec"][key]
    assert found["spec"]["jobTemplate"] == job["spec"]


def test_the_standing_cluster_is_the_jobs():
    found = the("RayCluster", build(KUBERNETES / "cluster"))
    job = the("RayJob", build(KUBERNETES / "site"))
    assert found["spec"] == job["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_those_of_this_version(overlay: str):
    images = {c["image"] for one in build(KUBERNETES / overlay) for spec in pod_specs(one) for c in spec["containers"]}
    for image in images:
        assert re.fullmatch(rf"registry\.example\.com/dpo-ray-(cpu|gpu|launch):{re.escape(PROJECT['version'])}", image)
