"""The script of the CronJob's pod, with a kubectl that tells it a story."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray import errors
from tests.unit.cluster import fake_kubectl
from tests.unit.cluster.manifests import NIGHTLY, OBJECTS, described, mistakes, objects, parse, the

JOB, RUN = "dpo-ray-nightly-29402520", "dpo-ray-nightly-29402520-run"
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
UNREACHABLE = "Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout"
EXIT_CODES = sorted(
    {one.exit_code for _, one in inspect.getmembers(errors, inspect.isclass) if hasattr(one, "exit_code")}
)


def failed(code: int | str, tail: str = "the last words") -> dict[str, str]:
    """The status of a RayJob whose entrypoint ended with an exit code, with Ray's message."""
    message = (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n{tail}"
    )
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": message}


def template() -> dict[str, Any]:
    """The suspended RayJob, as the API server gives it."""
    found = the("RayJob", objects(OBJECTS[0].read_text()))
    found["metadata"] |= {
        "namespace": "dpo-ray",
        "uid": "11111111-2222",
        "resourceVersion": "7",
        "generation": 1,
        "creationTimestamp": "2026-11-01T00:00:00Z",
        "finalizers": ["ray.io/rayjob-finalizer"],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
    }
    found["spec"]["suspend"] = True
    found["status"] = {"jobDeploymentStatus": "Suspended"}
    return found


class Cluster:
    """The fake's folder, and the pod in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        kubectl = folder / "bin" / "kubectl"
        kubectl.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {fake_kubectl.__file__} "$@"\n')
        kubectl.chmod(0o755)
        self.put("objects", {"dpo-ray": template()})
        self.put("story", [SUCCEEDED])

    def put(self, name: str, value: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    @property
    def run(self) -> dict[str, Any] | None:
        found: dict[str, Any] = json.loads((self.folder / "objects.json").read_text())
        return found.get(RUN)

    def calls(self, verb: str) -> list[list[str]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [words for words in map(json.loads, lines) if words[0] == verb]

    def pod(self, script: Path = NIGHTLY / "launch.sh", **env: str) -> subprocess.Popen[str]:
        settings = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_KUBECTL": str(self.folder),
            "PYTHONPATH": str(Path(yaml.__file__).parents[1]),  # -S starts Python faster, and without its packages
            "TMPDIR": str(self.folder),
            "TEMPLATE": "dpo-ray",
            "JOB_NAME": JOB,
            "JOB_UID": "99999999-8888",
            "SECONDS_BETWEEN": "0.01",
            "LOOKS_IN_VAIN": "3",
        }
        command = ["sh", str(script)]
        return subprocess.Popen(
            command, env=settings | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder
        )

    def launch(self, **env: str) -> tuple[int, str]:
        with self.pod(**env) as pod:
            said, _ = pod.communicate(timeout=120)
        return pod.returncode, said


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("patched_by", ["the fake", "kubectl"])
def test_a_run_is_made_of_the_template_and_waited_for(cluster: Cluster, patched_by: str):
    real = shutil.which("kubectl")
    if patched_by == "kubectl" and real is None:
        pytest.skip("there is no kubectl here: apt-get install kubernetes-client")
    cluster.put("story", [{}, {"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, SUCCEEDED])
    code, said = cluster.launch(**({"REAL_KUBECTL": str(real)} if patched_by == "kubectl" else {}))
    assert code == 0, said
    run, wanted = cluster.run, template()
    assert run is not None
    assert run.pop("status") == SUCCEEDED
    assert run["metadata"] == {
        "name": RUN,
        "namespace": "dpo-ray",
        "labels": wanted["metadata"]["labels"],
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": JOB, "uid": "99999999-8888"}],
    }
    wanted["spec"] |= {"suspend": False, "entrypoint": f"dpo-ray run /etc/dpo-ray/run.yaml --run-id {RUN}"}
    assert run["spec"] == wanted["spec"]
    parse(shlex.split(run["spec"]["entrypoint"]))
    # What is told at each change, and where the log is.
    states = [line.split(" ", 1)[1] for line in said.splitlines() if f" {RUN}: " in line]
    seen = ("KubeRay's operator has not looked at it yet", "Initializing/", "Running/RUNNING", "Complete/SUCCEEDED")
    assert states == [f"{RUN}: {state}" for state in seen]
    assert f"kubectl logs --follow job/{RUN}" in said


def test_a_run_is_what_kuberay_takes(cluster: Cluster):
    assert cluster.launch()[0] == 0
    assert cluster.run is not None
    del cluster.run["status"]
    assert mistakes(cluster.run) == [], described(cluster.run)


def test_kuberays_own_job_has_another_name_than_the_cronjobs(cluster: Cluster):
    # KubeRay calls the submitter's Job like the RayJob: one that is there already it would take for its own.
    assert cluster.launch()[0] == 0
    assert cluster.run is not None and cluster.run["metadata"]["name"] != JOB


def test_an_entrypoint_may_have_quotes(cluster: Cluster):
    changed = template()
    changed["spec"]["entrypoint"] = 'dpo-ray run run.yaml -o \'train.loss={"type": "ipo"}\' -o run.name=a\\\\b'
    cluster.put("objects", {"dpo-ray": changed})
    code, said = cluster.launch()
    assert code == 0, said
    assert cluster.run is not None
    assert cluster.run["spec"]["entrypoint"] == f"{changed['spec']['entrypoint']} --run-id {RUN}"


def test_the_next_pod_of_a_job_waits_for_the_same_run(cluster: Cluster):
    cluster.put("objects", {"dpo-ray": template(), RUN: template()})
    cluster.put("story", [RUNNING, SUCCEEDED])
    code, said = cluster.launch()
    assert code == 0, said
    assert "is there already" in said
    assert cluster.calls("create") == []


def test_of_two_that_create_it_at_once_both_wait_for_it(cluster: Cluster):
    cluster.put("refusals", [f'Error from server (AlreadyExists): rayjobs.ray.io "{RUN}" already exists'])
    code, said = cluster.launch()
    assert code == 0, said
    assert "is there already" in said
    assert len(cluster.calls("create")) == 1


@pytest.mark.parametrize("code", [code for code in EXIT_CODES if code and code != errors.Terminated.exit_code])
def test_the_pod_ends_with_the_exit_code_of_dpo_ray(cluster: Cluster, code: int):
    cluster.put("story", [RUNNING, failed(code)])
    found, said = cluster.launch()
    assert found == code, said
    assert "the last words" in said


def test_a_gate_that_refuses_is_no_failure_in_what_is_said(cluster: Cluster):
    cluster.put("story", [failed(4)])
    code, said = cluster.launch()
    assert code == 4
    assert "the gate refused the model (exit code 4)" in said and "failed with exit code 4 (" not in said
    assert f"runs/{RUN} in run.output" in said
    cluster.put("story", [failed(1)])
    code, said = cluster.launch()
    assert code == 1
    assert "failed with exit code 1" in said and "the gate" not in said


def test_the_first_exit_code_counts_and_not_what_the_log_says_of_others(cluster: Cluster):
    cluster.put("story", [failed(3, tail="a helper: entrypoint command failed with exit code 4, or so")])
    assert cluster.launch()[0] == 3


def test_a_gate_is_told_from_a_failure_also_where_the_message_is_late(cluster: Cluster):
    cluster.put("story", [RUNNING, failed(4) | {"unread": 1}, failed(4)])
    code, said = cluster.launch()
    assert code == 4, said


@pytest.mark.parametrize("code", [-9, 137, 139, errors.Terminated.exit_code])
def test_a_run_that_was_killed_is_not_taken_for_a_pod_that_was(cluster: Cluster, code: int):
    # 137 and 143 of the pod itself are tried again.
    cluster.put("story", [failed(code)])
    found, said = cluster.launch()
    assert found == 1, said
    if code < 0:
        assert "killed by signal 9" in said


@pytest.mark.parametrize(
    "status",
    [
        {"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed", "message": "Job submission has failed."},
        {
            "jobDeploymentStatus": "ValidationFailed",
            "reason": "ValidationFailed",
            "message": "The RayJob spec is invalid",
        },
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "Job was intentionally stopped."},
        {
            "jobDeploymentStatus": "Failed",
            "jobStatus": "FAILED",
            "reason": "AppFailed",
            "message": "No more of the head",
        },
    ],
    ids=lambda status: status.get("reason", "stopped"),
)
def test_what_ends_without_an_exit_code_is_a_failure_with_kuberays_words(cluster: Cluster, status: dict[str, str]):
    cluster.put("story", [RUNNING, status])
    code, said = cluster.launch()
    assert code == 1, said
    assert status["message"] in said


def test_a_retry_of_kuberay_is_waited_for(cluster: Cluster):
    retrying = {**failed(1), "jobDeploymentStatus": "Retrying"}
    cluster.put("story", [RUNNING, retrying, {"jobDeploymentStatus": "Initializing"}, RUNNING, SUCCEEDED])
    assert cluster.launch()[0] == 0


@pytest.mark.parametrize("reason", ["DeadlineExceeded", "PreRunningDeadlineExceeded"])
def test_a_deadline_has_an_exit_code_of_its_own(cluster: Cluster, reason: str):
    late = {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": reason, "message": "passed its deadline"}
    cluster.put("story", [RUNNING, late])
    code, said = cluster.launch()
    assert code == 124, said
    assert "passed its deadline" in said and "did not end in time" in said


def test_an_api_server_that_does_not_answer_for_a_while_is_waited_for(cluster: Cluster):
    cluster.put("story", [RUNNING, UNREACHABLE, UNREACHABLE, RUNNING, UNREACHABLE, UNREACHABLE, SUCCEEDED])
    assert cluster.launch()[0] == 0


def test_one_that_stays_away_ends_the_pod_and_not_the_run(cluster: Cluster):
    cluster.put("story", [RUNNING, UNREACHABLE])
    code, said = cluster.launch()
    assert code == 69, said
    assert "did not answer 3 times in a row" in said and UNREACHABLE in said
    assert cluster.run is not None


def test_a_creation_that_is_not_answered_is_tried_again(cluster: Cluster):
    cluster.put("refusals", [UNREACHABLE, UNREACHABLE])
    assert cluster.launch()[0] == 0
    cluster.put("objects", {"dpo-ray": template()})
    cluster.put("refusals", [UNREACHABLE] * 3)
    assert cluster.launch()[0] == 69


def test_what_the_api_server_refuses_is_not_tried_again(cluster: Cluster):
    refusal = 'Error from server (Forbidden): rayjobs.ray.io is forbidden: User "dpo-ray-launch" cannot create'
    cluster.put("refusals", [refusal])
    code, said = cluster.launch()
    assert code == 2, said
    assert refusal in said


def test_without_a_template_the_way_out_is_told(cluster: Cluster):
    cluster.put("objects", {})
    code, said = cluster.launch()
    assert code == 2, said
    assert "There is no RayJob dpo-ray to copy" in said and "apply the overlay" in said


def test_a_run_that_somebody_deletes_is_a_failure(cluster: Cluster):
    cluster.put("story", [RUNNING, f'Error from server (NotFound): rayjobs.ray.io "{RUN}" not found'])
    code, said = cluster.launch()
    assert code == 1, said
    assert "was deleted before it ended" in said


def test_a_pod_that_is_taken_away_leaves_the_run_and_says_so(cluster: Cluster):
    cluster.put("story", [RUNNING])
    with cluster.pod() as pod:
        assert pod.stdout is not None
        for line in pod.stdout:
            if "Running/RUNNING" in line:
                break
        began = time.monotonic()
        pod.send_signal(signal.SIGTERM)
        rest = pod.stdout.read()
    assert pod.returncode == 143
    assert time.monotonic() - began < 30  # terminationGracePeriodSeconds
    assert f"{RUN} goes on" in rest and f"kubectl delete job {JOB}" in rest
    assert cluster.run is not None


def test_with_kueue_a_run_waits_in_its_queue(cluster: Cluster, tmp_path: Path):
    folder = tmp_path / "launch"
    folder.mkdir()
    shutil.copy(NIGHTLY / "launch.sh", folder)
    shutil.copy(NIGHTLY.parent / "nightly-kueue" / "as_run.yaml", folder)
    with cluster.pod(folder / "launch.sh") as pod:
        said, _ = pod.communicate(timeout=120)
    assert pod.returncode == 0, said
    assert cluster.run is not None
    assert cluster.run["spec"]["suspend"] is True
    assert cluster.run["metadata"]["labels"] == {
        **template()["metadata"]["labels"],
        "kueue.x-k8s.io/queue-name": "dpo-ray",
    }
    assert not {"uid", "resourceVersion", "finalizers"} & cluster.run["metadata"].keys()


def test_ray_tells_an_exit_code_in_the_words_that_are_looked_for():
    ray = importlib.util.find_spec("ray")
    assert ray is not None and ray.origin is not None
    source = (Path(ray.origin).parent / "dashboard/modules/job/job_supervisor.py").read_text()
    words = source.replace('"\n', "").replace('f"', "").replace('"', "")
    assert "Job entrypoint command" in words
    assert "failed with exit code {return_code}, " in source
    assert "entrypoint command failed with exit code" in (NIGHTLY / "launch.sh").read_text()
    # In K8sJobMode its own command line flattens them.
    cli = (Path(ray.origin).parent / "dashboard/modules/job/cli.py").read_text()
    assert "if job_status == JobStatus.FAILED:\n                sys.exit(1)" in cli
