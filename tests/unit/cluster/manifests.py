"""What the tests of cluster/manifests look at, and what they look with."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from typer.core import TyperGroup

from pipelines.cli import app

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "cluster" / "manifests"
KUBERNETES = MANIFESTS / "kubernetes"
NIGHTLY = KUBERNETES / "nightly"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("*/kustomization.yaml") if path.parent.name != "base")
OBJECTS = [KUBERNETES / "base" / name for name in ("rayjob.yaml", "service_account.yaml", "network.yaml")] + [
    NIGHTLY / name for name in ("cronjob.yaml", "access.yaml")
]
"""Files with whole objects, which can be looked at without kustomize."""
OLDEST_KUBERNETES = "1.31"
"""Where `podFailurePolicy` is stable, and a CronJob's `timeZone`."""


def objects(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(text) if one is not None]


@cache
def _build(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl here: apt-get install kubernetes-client")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return done.stdout


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl kustomize` makes of an overlay; skips the test where there is no kubectl."""
    return objects(_build(folder))


def the(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    [one] = [one for one in found if one["kind"] == kind]
    return one


@cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    """Strict JSON Schema of a kind of KubeRay's, from the CRDs in the folder DPO_RAY_CRDS; skips without it."""
    folder = os.environ.get("DPO_RAY_CRDS")
    if not folder:
        pytest.skip("KubeRay's CRDs are kept outside the repository: set DPO_RAY_CRDS to the folder of rayjobs.yaml.gz")
    [path] = Path(folder).glob(f"{kind.lower()}s.yaml*")
    read = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    crd = yaml.load(read, yaml.CSafeLoader)
    [version] = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    # What the API server itself looks after.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON Schema in which an unknown key is a mistake, as it is to `kubectl apply`."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "nullable"}
    if schema.get("x-kubernetes-int-or-string"):
        made |= {"type": ["integer", "string"]}
        made.pop("anyOf", None)
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


def mistakes(found: dict[str, Any]) -> list[str]:
    """What is wrong with an object, by the schema of its kind."""
    if found["apiVersion"].startswith("ray.io/"):
        errors = jsonschema.Draft202012Validator(kuberay_schema(found["kind"])).iter_errors(found)
        return [f"{found['kind']} {error.json_path}: {error.message[:300]}" for error in errors]
    try:
        kubernetes_validate.validate(found, OLDEST_KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [f"{found['kind']}: {error}"]
    return []


def parse(words: list[str]) -> None:
    """Raises a usage error where the command line of dpo-ray does not take these words, the program's name first."""
    assert words[0] == "dpo-ray", words
    command: Any = typer.main.get_command(app)
    name, rest, parent = "dpo-ray", words[1:], None
    while isinstance(command, TyperGroup):
        parent = command.make_context(name, list(rest), parent=parent)
        name, command, rest = command.resolve_command(parent, rest)
    command.make_context(name, rest, parent=parent)


def pod_specs(found: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in an object, however deep."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        for value in found.values():
            yield from pod_specs(value)
    elif isinstance(found, list):
        for value in found:
            yield from pod_specs(value)


def quantity(text: str | int) -> float:
    """A number of Kubernetes: cores, or bytes."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    for unit, factor in units.items():
        if str(text).endswith(unit):
            return float(str(text).removesuffix(unit)) * factor
    return float(text)


def described(found: dict[str, Any]) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def changed(found: dict[str, Any]) -> dict[str, Any]:
    """A copy to put a mistake into."""
    made: dict[str, Any] = json.loads(json.dumps(found))
    return made
