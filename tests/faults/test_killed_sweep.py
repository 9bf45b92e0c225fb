"""SIGKILL of a sweep's processes, one after the other, and then of its driver: the same command makes the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, DPO_RAY, LONGEST, overrides, processes_below, processes_with, summary_of

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]

RATES = [1e-4, 3e-4, 1e-3]
MARK = "DPO_RAY_KILLED_SWEEP"


@pytest.fixture(scope="module")
def command(one_ray, tmp_path_factory, tiny_model, write_preferences) -> tuple[list[str], Path]:
    """Arguments of a sweep of three trials on pairs that are scored already, two side by side, and its output."""
    folder = tmp_path_factory.mktemp("killed_sweep")
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n} today."} for n in range(60)]
    write_preferences(folder / "data", rows)
    settings = overrides(
        run__output=str(folder / "out"),
        model__path=str(tiny_model),
        data__train=str(folder / "data"),
        data__held_out_fraction=0.4,
        reference__engine="torch",
        reference__calibration_pairs=4,
        train__num_workers=1,
        train__cpus_per_worker=1,
        train__global_batch_size=4,
        train__epochs=6,
        train__checkpoint_every_steps=5,
        train__eval_every_steps=5,
        train__tokens_per_microbatch=1024,
        publish__gate__accuracy_above=None,
        tune__beta=[0.1],
        tune__learning_rate=RATES,
        tune__max_concurrent_trials=2,
        tune__keep_models=3,
    )
    config = str(CONFIGS / "align_cpu.yaml")
    done = one_ray("reference", config, *settings)
    assert done.code == 0, done.log
    return ["sweep", config, *settings], folder / "out"


def records(output: Path) -> dict[int, dict]:
    found = {}
    for file in output.glob("sweeps/*/trials/*.json"):
        trial = json.loads(file.read_text())
        found[trial["number"]] = trial
    return found


class Running:
    """A sweep in a process of its own, which ends with the block."""

    def __init__(self, arguments: list[str], output: Path, log: Path) -> None:
        self.output, self.log = output, log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [DPO_RAY, *arguments], stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, MARK: str(output)}
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, seen) -> dict[int, dict]:
        """The records as soon as they are as wanted; fails where the process ends before."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            found = records(self.output)
            if seen(found):
                return found
            assert self.process.poll() is None, f"it ended before:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.05)
        raise AssertionError("never seen")

    def kill_one(self, name: str) -> None:
        pids = [pid for pid, args in processes_below(self.process.pid).items() if args.startswith(name)]
        assert pids, f"there is no {name} among {processes_below(self.process.pid)}"
        os.kill(max(pids), signal.SIGKILL)


def still_running(output: Path) -> dict[int, str]:
    """Processes of the sweep that do not end by themselves: Ray's workers need a moment after their driver."""
    deadline = time.monotonic() + 120
    while (left := processes_with(f"{MARK}={output}")) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def training_after(found: dict[int, dict], step: int) -> list[int]:
    return [n for n, trial in found.items() if trial["state"] == "training" and trial["step"] >= step]


def has_finished(found: dict[int, dict]) -> bool:
    return any(trial["state"] == "finished" for trial in found.values())


def test_no_finished_trial_is_repeated_and_the_others_go_on(command, tmp_path):
    arguments, output = command
    with Running(arguments, output, tmp_path / "first.log") as first:
        # Its controller is in the trial's own process, and dies with it.
        first.wait_for(lambda found: training_after(found, 5))
        first.kill_one("ray::TrialActor")
        first.wait_for(lambda found: has_finished(found) and training_after(found, 10))
        first.kill_one("ray::RayTrainWorker")
        before = first.wait_for(lambda found: training_after(found, 20))
    assert not still_running(output)
    assert "failed, and is tried again" in first.log.read_text()

    finished = {n: trial for n, trial in before.items() if trial["state"] == "finished"}
    made = {t["policy"]: (output / "artifacts/train" / t["policy"] / "manifest.json").stat() for t in finished.values()}
    interrupted = {n: trial for n, trial in before.items() if trial["state"] == "training" and trial["step"] >= 5}
    assert finished and interrupted

    with Running(arguments, output, tmp_path / "again.log") as again:
        assert again.process.wait(LONGEST) == 0, again.log.read_text()[-4000:]
    log = again.log.read_text()
    table = pq.read_table(Path(summary_of(output)["sweep"]["results"])).to_pylist()
    assert [row["state"] for row in table] == ["finished"] * len(RATES)
    assert [row["train.learning_rate"] for row in table] == RATES
    for policy, stat in made.items():
        now = (output / "artifacts/train" / policy / "manifest.json").stat()
        assert (now.st_mtime_ns, now.st_ino) == (stat.st_mtime_ns, stat.st_ino)
    for number in finished:
        assert f"[sweep] trial {number}:" not in log
    after = records(output)
    for number, trial in interrupted.items():
        assert f"[sweep] trial {number}: train.loss.beta 0.1, train.learning_rate {RATES[number]:.3g}, goes on" in log
        # What was measured before is what is measured on the way anew: it went on from a checkpoint of the same course.
        told = {e["step"]: e for e in after[number]["evaluations"]}
        assert [told[e["step"]] for e in trial["evaluations"]] == trial["evaluations"]
    assert "placement groups of trials that had died" not in first.log.read_text() + log
    assert not still_running(output)
