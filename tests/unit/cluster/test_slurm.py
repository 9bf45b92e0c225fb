"""The Slurm script, with a Slurm and a Ray that do nothing but call what they are told to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cluster.manifests import MANIFESTS, parse

SCRIPT = MANIFESTS / "slurm" / "run.sbatch"
FAKES = {
    "scontrol": 'printf "node-7\\nnode-8\\n"',
    "hostname": 'echo "10.0.0.7 fe80::7"',
    # Its own options come first.
    "srun": 'while case $1 in --*) true ;; *) false ;; esac; do shift; done; exec "$@"',
    "ray": 'echo "$@" >> ray.txt; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "dpo-ray": f"""{sys.executable} -c '
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("run.json", "w"))
' "$@"; exit $CODE""",
}


def submitted(folder: Path, *arguments: str, code: int = 0) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The job, and the arguments and the environment of dpo-ray in it."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    for name, body in FAKES.items():
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    (bin / "python").unlink(missing_ok=True)
    (bin / "python").symlink_to(sys.executable)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NAME": "dpo-ray",
        "SLURM_JOB_ID": "42",
    }
    env = {"PATH": os.environ["PATH"], "DPO_RAY_BIN": str(bin), "CODE": str(code), **slurm}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )
    seen = folder / "run.json"
    return done, json.loads(seen.read_text()) if seen.exists() else None


def test_dpo_ray_runs_on_the_first_node_of_a_ray_on_all_of_them(tmp_path: Path):
    done, (arguments, environment) = submitted(tmp_path, "/shared/run.yaml")
    assert done.returncode == 0, done.stderr
    parse(["dpo-ray", *arguments])
    assert arguments[:2] == ["run", "/shared/run.yaml"]
    assert "dpo-ray-42" in arguments  # a job that is queued again has the same number
    assert environment["RAY_ADDRESS"] == "10.0.0.7:6379"
    assert (tmp_path / "ray.txt").read_text().startswith("symmetric-run --address 10.0.0.7:6379 --min-nodes 2 -- env ")


def test_each_job_has_a_token_of_its_own(tmp_path: Path):
    tokens = [submitted(tmp_path, "run.yaml")[1][1]["RAY_AUTH_TOKEN"] for _ in range(2)]
    assert all(re.fullmatch(r"[0-9a-f]{64}", token) for token in tokens) and tokens[0] != tokens[1]
    assert submitted(tmp_path, "run.yaml")[1][1]["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("code", [1, 3, 4])
def test_the_exit_code_is_dpo_rays(tmp_path: Path, code: int):
    assert submitted(tmp_path, "run.yaml", code=code)[0].returncode == code


def test_without_a_configuration_it_says_what_is_missing(tmp_path: Path):
    done, ran = submitted(tmp_path)
    assert done.returncode != 0 and ran is None
    assert "name the configuration" in done.stderr


def test_ray_takes_the_command_that_starts_it():
    from ray.scripts.symmetric_run import symmetric_run

    [line] = re.findall(r"symmetric-run (.*) --", SCRIPT.read_text())
    taken = {name for parameter in symmetric_run.params for name in parameter.opts}
    assert set(re.findall(r"--[\w-]+", line)) <= taken
