"""The end-to-end benchmark: what both sides are given, who else computes, and its tables."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import CONFIG, OURS, OVERRIDES, TRL, Watch, cpu_seconds, fastest_batch, report, timed
from benchmarks.record import write_json
from dpo_ray.config.load import load_config


@pytest.mark.parametrize("row", OVERRIDES)
def test_each_row_of_ours_is_a_configuration(row: str, tmp_path: Path):
    config = load_config(CONFIG, [f"run.output={tmp_path}", *OVERRIDES[row]])
    assert config == load_config(CONFIG, [f"run.output={tmp_path}"]) or row != OURS


def test_both_sides_read_the_same_pairs_and_share_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
):
    import pyarrow.parquet as pq

    def pairs(_: Path) -> Any:
        for n in range(12):
            prompt = [{"role": "user", "content": f"Question {n // 2}?"}]
            yield prompt, f"Gladly: {n}.", "No." if n else "No. " * 400  # one over the limits

    monkeypatch.setenv("DPO_RAY_DATA", str(tmp_path))
    monkeypatch.setattr(end_to_end, "preference_pairs", pairs)
    write_json(tmp_path / "setting.json", {"model": str(tiny_model), "options": {}})
    end_to_end.write_pairs(tmp_path, "made", 5, 3)
    train, held_out = (
        pq.read_table(tmp_path / "made" / f"{name}.parquet").to_pylist() for name in ("train", "held_out")
    )
    assert len(train) == 5 and len(held_out) in (3, 4)
    prompts = [{str(row["prompt"]) for row in rows} for rows in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert "Gladly: 0." not in {row["chosen"][0]["content"] for row in train + held_out}
    with pytest.raises(SystemExit, match="lower --pairs"):
        end_to_end.write_pairs(tmp_path, "made", 12, 3)


def test_what_a_row_computes_is_told_from_what_others_do():
    before = {
        1: (0, 5.0),
        10: (1, 1.0),
        11: (10, 2.0),
        20: (1, 3.0),
        21: (20, 1.0),
        30: (1, 9.0),
        os.getpid(): (1, 2.0),
    }
    now = {1: (0, 5.5), 10: (1, 2.0), 11: (10, 4.0), 12: (11, 8.0), 20: (1, 4.0), 21: (20, 1.25), 40: (1, 7.0)}
    watch = Watch(10, before)
    watch.look({**now, os.getpid(): (1, 6.0)})
    assert watch.cpu == 1.0 + 2.0 + 8.0  # with 12, which has begun since
    # 40 has come since, and how much of its time lies between the looks is not known; 30 has gone.
    assert watch.others == 0.5 + 1.0 + 0.25
    watch.look({**now, 12: (11, 9.0), os.getpid(): (1, 6.0)})
    assert watch.cpu == 12.0 and watch.others == 1.75


def test_the_machine_tells_what_its_processes_have_computed():
    before = cpu_seconds()
    parent, spent = before[os.getpid()]
    assert parent == os.getppid()
    ends = time.process_time() + 0.2
    while time.process_time() < ends:
        pass
    assert cpu_seconds()[os.getpid()][1] > spent


def test_a_row_that_fails_names_its_log(tmp_path: Path):
    log = tmp_path / "row.log"
    done = timed([sys.executable, "-c", "print('made')"], log)
    assert done["wall"] > 0 and done["cpu"] >= 0 and done["others"] >= 0 and log.read_text() == "made\n"
    with pytest.raises(SystemExit, match=f"ended with 3; {log}"):
        timed([sys.executable, "-c", "raise SystemExit(3)"], log)


def test_trl_takes_the_batch_size_that_its_trial_found_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def run(command: list[str], log: Path) -> dict[str, Any]:
        size = int(command[command.index("--batch-size") + 1])
        output = Path(command[command.index("--output") + 1])
        asked.append(size)
        write_json(
            output / "told.json", {"stages": {"reference": 1.0, "train": {2: 9.0, 4: 6.0, 8: 7.0}.get(size, 8.0)}}
        )
        return {}

    monkeypatch.setattr(end_to_end, "timed", run)
    assert fastest_batch(tmp_path, "python", [16]) == 16 and asked == []
    for _ in range(2):
        assert fastest_batch(tmp_path, "python", [2, 4, 8]) == 4
    assert asked == [2, 4, 8]


def test_the_report_has_each_row_that_is_finished(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, rows in (("train", 7), ("held_out", 3)):
        (tmp_path / "made").mkdir(exist_ok=True)
        pq.write_table(pa.table({"prompt": ["x"] * rows}), tmp_path / "made" / f"{name}.parquet")
    run: dict[str, Any] = {
        "load": {"average": 1.0, "busy_cores": 0.25},
        "others": 0.5,
        "accuracy": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 3, "mean_margin": 1.5},
        "stages": {"train": 60.0},
    }
    write_json(tmp_path / "made" / "ours.json", {**run, "wall": 100.0, "cpu": 150.0, "overrides": []})
    write_json(tmp_path / "made" / "trl.json", {**run, "wall": 250.0, "cpu": 450.0, "batch_size": 4})
    told = report(tmp_path, ["made", "missing"], [OURS, TRL])
    assert "### made: 7 pairs, 3 held out" in told and "missing" not in told
    assert "| ours |  | 100 | 150 | 2.50 | 3.00 | 0.800 [0.700, 0.900] | 1.50 | 0.25, 0.50 |" in told
    assert "| trl | batches of 4 | 250 | 450 |  |  | 0.800 [0.700, 0.900] | 1.50 | 0.25, 0.50 |" in told
    assert "- ours: train 60.0" in told
