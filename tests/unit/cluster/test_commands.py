"""The operator's page, and the docs where they call other programs than ours: their commands name what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import load_config
from tests.unit.cluster.manifests import KUBERNETES, MANIFESTS, NIGHTLY, OBJECTS, ROOT, objects, parse, pod_specs, the
from tests.unit.cluster.test_launch import EXIT_CODES, JOB, RUN

PAGES = (ROOT / "README.md", ROOT / "docs" / "cluster.md", ROOT / "docs" / "schedule.md", MANIFESTS / "README.md")
PROGRAMS = (
    "docker",
    "export",
    "kubectl",
    "ray get-auth-token",
    "ray up",
    "ray down",
    "ray dashboard",
    "sbatch",
    "prometheus",
)
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in (line.split("    #")[0].strip() for line in block.splitlines())
    if line.startswith(PROGRAMS) or (page.parent == MANIFESTS and line)
]


def option(words: list[str], *names: str) -> str:
    return next(words[at + 1] for at, word in enumerate(words) if word in names)


def test_the_pages_have_commands():
    assert len(COMMANDS) > 15
    assert {page for page, _ in COMMANDS} == set(PAGES)
    # Nothing on the operator's page goes untried below.
    assert [line for _, line in COMMANDS if not line.startswith((*PROGRAMS, "dpo-ray "))] == []


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS}))
def test_a_command_names_what_is_there(line: str):
    words = shlex.split(line)
    match words[0]:
        case "docker":
            dockerfile = (ROOT / option(words, "-f")).read_text()
            assert re.search(rf"^FROM \S+ AS {option(words, '--target')}$", dockerfile, re.M)
            assert words[1] == "build" and words[-1] == "."
        case "kubectl":
            of_kubectl(words)
        case "export":  # the token's, of a cluster that KubeRay has made or of ours
            [asked] = re.findall(r"\$\(kubectl (get secret .*?) -o", line) or ["get secret -n dpo-ray dpo-ray"]
            assert shlex.split(asked)[-1] == the("RayJob", objects(OBJECTS[0].read_text()))["metadata"]["name"]
            assert "RAY_AUTH_MODE=token" in words
        case "ray":
            of_ray(words[1:])
        case "prometheus":  # it is started with it in tests/on_ray/test_observability.py
            assert (ROOT / words[1].removeprefix("--config.file=")).is_file()
        case "sbatch":
            assert (ROOT / words[1]).read_text().startswith("#!/usr/bin/env bash\n")
        case _:
            parse(words)
            load_config(ROOT / words[2])


def of_kubectl(words: list[str]) -> None:
    verb = words[1]
    if verb == "apply":
        if "-k" in words:
            assert (ROOT / option(words, "-k") / "kustomization.yaml").is_file()
        else:
            assert objects((ROOT / option(words, "-f")).read_text())
        return
    assert verb in {"create", "get", "logs", "label", "delete", "patch", "port-forward"}
    if words[2] != "namespace":
        assert (
            option(words, "-n") == "dpo-ray"
            and "namespace: dpo-ray" in (KUBERNETES / "site/kustomization.yaml").read_text()
        )
    cronjob = the("CronJob", objects((NIGHTLY / "cronjob.yaml").read_text()))["metadata"]["name"]
    for word in words:
        if word.startswith("--from=cronjob/") or (word.startswith("dpo-ray-nightly") and "cronjob" in words):
            assert word.removeprefix("--from=cronjob/") == cronjob
        elif "dpo-ray-nightly" in word:
            assert word.removeprefix("job/") in {JOB, RUN}
    if "configmap" in words:
        name, file = words[-2], ROOT / words[-1].removeprefix("--from-file=")
        assert load_config(file)
        assert name == argo()["spec"]["workflowSpec"]["volumes"][0]["configMap"]["name"]
    if "secret" in words:
        spec = next(pod_specs(the("RayJob", objects(OBJECTS[0].read_text()))["spec"]["rayClusterSpec"]))
        sources = [source["secretRef"]["name"] for source in spec["containers"][0]["envFrom"] if "secretRef" in source]
        assert sources == [words[words.index("generic") + 1]]


def argo() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster/orchestrators/argo.yaml").read_text())
    return found


def of_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    with cli.make_context("ray", list(words)) as context:
        name, command, rest = cli.resolve_command(context, list(words))
        command.make_context(name, rest, parent=context)
    assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))


def test_a_command_with_a_mistake_is_found():
    for wrong in (
        "kubectl apply -k cluster/manifests/kubernetes/nightley",
        "kubectl delete job -n dpo-ray dpo-ray-nightly-1",
        "kubectl apply -n dpo-ray -f cluster/orchestrators/argo.yml",
        "kubectl create configmap -n dpo-ray dpo-ray-runs --from-file=cluster/manifests/kubernetes/site/run.yaml",
        "docker build -f cluster/manifests/image/Dockerfile --target gpus -t x .",
        "ray up cluster/manifests/ray_up/gcp.yaml",
        "ray get-auth-token --make",
        "sbatch cluster/manifests/slurm/nightly.sbatch",
        "prometheus --config.file=cluster/manifests/observability/prometheus.yml",
        "dpo-ray submit cluster/manifests/kubernetes/site/run.yaml --adress http://127.0.0.1:8265",
        "export RAY_AUTH_MODE=none",
    ):
        with pytest.raises(Exception, match=r"."):
            test_a_command_names_what_is_there(wrong)


def test_the_table_of_exit_codes_has_all_that_a_job_can_have():
    table = (MANIFESTS / "README.md").read_text().partition("### Exit codes")[2].partition("```")[0]
    told = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in row.split(",")}
    interactive = {130}
    assert told >= set(EXIT_CODES) - interactive
    script = (NIGHTLY / "launch.sh").read_text()
    assert told >= {int(code) for code in re.findall(r"\bexit (\d+)", script)} - {0}


def test_the_overlays_table_has_them_all():
    table = (MANIFESTS / "README.md").read_text().partition("| overlay | |")[2].partition("\n\n")[0]
    overlays = {path.parent.name for path in KUBERNETES.glob("*/kustomization.yaml")} - {"base", "site"}
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == overlays


def test_the_names_of_a_night_are_those_of_the_script():
    script = (NIGHTLY / "launch.sh").read_text()
    [suffix] = re.findall(r'^run="\$JOB_NAME(.*)"$', script, re.M)
    assert JOB + suffix == RUN


def test_files_that_the_page_links_to_are_there():
    links = re.findall(r"\]\(([^)#:]+)\)", (MANIFESTS / "README.md").read_text())
    assert links and all((MANIFESTS / link).exists() for link in links), [Path(link) for link in links]
