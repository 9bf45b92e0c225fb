"""SIGKILL of the driver in the second of three rounds: the same command makes the rest and alters no finished unit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, DPO_RAY, LONGEST, dpo_ray, overrides, summary_of

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.vllm, pytest.mark.long]

ROUNDS = 2
RULE = [{"function": "dpo_ray.rewards:length_window", "arguments": {"at_most": 4, "unit": "words"}}]
SAMPLING = {"samples": 4, "max_tokens": 12, "dtype": "float32"}


@pytest.fixture(scope="module")
def command(tmp_path_factory, servable_model) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("killed_rounds")
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(24))
    settings = overrides(
        run__output=str(folder / "out"),
        model__path=str(servable_model),
        data__held_out_fraction=0.4,
        generate={
            "prompts": str(folder / "prompts.jsonl"),
            "prompts_per_shard": 4,
            "sampling": SAMPLING,
            "reward": RULE,
        },
        iterate={"rounds": ROUNDS, "prompts": "repeated", "replay": 0.25, "stop_early": False},
        vllm={"cpus_per_actor": 1, "kv_cache_gib": 1, "max_num_seqs": 16},
        reference__engine="torch",
        reference__calibration_pairs=4,
        train__num_workers=1,
        train__global_batch_size=4,
        train__learning_rate=1e-3,
        train__tokens_per_microbatch=1024,
        evaluate={"win_rate": {"sampling": SAMPLING, "reward": RULE}},
        publish__gate={"accuracy_above": None},
    )
    return ["iterate", str(CONFIGS / "demo_cpu.yaml"), *settings], folder / "out"


def finished_files(output: Path) -> dict[str, str]:
    """Shards and manifests → their hashes."""
    files = [file for pattern in ("*.parquet", "manifest.json") for file in output.glob(f"artifacts/*/*/{pattern}")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def sampled(output: Path) -> int:
    """Artifacts of candidates that are finished or have a finished shard."""
    manifests = [json.loads(file.read_text()) for file in output.glob("artifacts/candidates/*/manifest.json")]
    named = {Path(entry["name"]).name for manifest in manifests for entry in manifest["files"]}
    shards = {file.name for file in output.glob("artifacts/candidates/shards/*.parquet")}
    return len(manifests) + bool(shards - named)


def test_a_kill_in_the_second_round_changes_no_finished_unit_and_costs_no_round(command, tmp_path):
    arguments, output = command
    with (tmp_path / "first.log").open("w") as log:
        process = subprocess.Popen([DPO_RAY, *arguments], stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LONGEST
        # In a round the current policy, the first model and the new policy are sampled; the first model once.
        while sampled(output) < 4:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()[-4000:]
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = finished_files(output)

    done = dpo_ray(*arguments)
    assert done.code == 0, done.log
    after = finished_files(output)
    assert {name: after.get(name) for name in before} == before
    summary = summary_of(output)
    assert [one["round"] for one in summary["rounds"]] == list(range(1, ROUNDS + 1))
    for one in summary["rounds"]:
        rate = one["win_rate"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    of_first = {name: stage for name, stage in summary["stages"].items() if name.endswith("(round 1)")}
    assert of_first and all(stage["reused"] for stage in of_first.values())
    best = max(summary["rounds"], key=lambda one: one["win_rate"]["value"])
    assert Path(summary["published"]).name == best["policy"]
