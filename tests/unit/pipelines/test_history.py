"""What an output folder's runs did: the newest ones, of which alone the records are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Train
from dpo_ray.errors import ConfigError
from dpo_ray.on_ray.usage import metered, used
from dpo_ray.storage.location import Location
from pipelines.cost import cost_of
from pipelines.history import lines, page
from tests.command_line import in_process
from tests.object_store import BUCKET, object_store

SUMMARY: dict[str, Any] = {
    "run_id": "",
    "exit_code": 0,
    "began": "2026-11-26T02:00:00Z",
    "cost": {"hours": 1.5, "worker_hours": 6.0, "gpu_hours": 5.0},
    "input": {
        "files": 3,
        "rows": 300,
        "new_files": 1,
        "new_rows": 100,
        "compared_with": "aaaa",
        "days": {"2026-11-24": {}, "2026-11-26": {}},
    },
    "stages": {
        "ingest": {"rows": {"in": 300, "kept": 290, "dropped": {"empty_response": 10}}},
        "duplicates": {"rows": {"in": 290, "kept": 286, "dropped": {"duplicate": 4}}},
        "tokenize": {"rows": {"in": 290, "kept": 285, "dropped": {"duplicate": 4, "prompt_too_long": 1}}},
        "tokenize (set x)": {"rows": {"in": 9, "kept": 8, "dropped": {"prompt_too_long": 1}}},
    },
    "eval": {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 40}},
    "published": None,
    "reasons": [],
}


def write(output: Path, run_id: str, **changes: Any) -> Path:
    folder = output / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"run_id": run_id} | changes))
    return folder


def ids(output: Path | Location, last: int | None) -> list[str]:
    place = output if isinstance(output, Location) else Location.of(output)
    return [run["run_id"] for run in page(place, last).runs]


def test_runs_stand_by_time_whatever_they_are_called(tmp_path: Path):
    write(tmp_path, "b-20261125T020000Z")
    write(tmp_path, "a-20261126T020000Z")
    named = write(tmp_path, "by hand")
    os.utime(named, (1795658400, 1795658400))  # 2026-11-26 02:00 UTC, less some hours
    write(tmp_path, "z-20200101T000000Z")
    found = ids(tmp_path, None)
    assert found[-1] == "z-20200101T000000Z" and set(found[:3]) == {
        "a-20261126T020000Z",
        "b-20261125T020000Z",
        "by hand",
    }
    assert found.index("a-20261126T020000Z") < found.index("b-20261125T020000Z")


def test_of_many_runs_only_the_shown_ones_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for n in range(300):
        write(tmp_path, f"n-20261101T{n // 60:02d}{n % 60:02d}00Z")
    read: list[str] = []
    real = Location.read_bytes
    monkeypatch.setattr(Location, "read_bytes", lambda place: read.append(place.uri) or real(place))
    found = page(Location.of(tmp_path), 7)
    assert len(read) == 7 and [run["run_id"] for run in found.runs] == [f"n-20261101T04{59 - n}00Z" for n in range(7)]
    assert "The newest 7 of 300 runs; --last N or --all shows more." in list(lines(found))
    assert len(page(Location.of(tmp_path), None).runs) == 300


def test_a_row_tells_data_measures_outcome_and_cost(tmp_path: Path):
    write(tmp_path, "n-20261126T020000Z", published="/out/models/n/0123456789abcdef")
    write(tmp_path, "n-20261125T020000Z", exit_code=4, reasons=["Nothing was published, for the gate does not hold"])
    write(tmp_path, "n-20261124T020000Z", nothing_new={"version": "fedcba9876543210"})
    write(tmp_path, "n-20261123T020000Z", exit_code=3, reasons=["x" * 500])
    (tmp_path / "runs/n-20261122T020000Z").mkdir()
    for folder in ("runs", "models"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "README.md").write_text("notes")
    found = page(Location.of(tmp_path), 20)
    assert [run["outcome"] for run in found.runs] == [
        "published", "not published", "nothing new", "failed", "unfinished"
    ]  # fmt: skip
    assert found.runs[0]["dropped"] == {"empty_response": 10, "duplicate": 4, "prompt_too_long": 1}
    said = "\n".join(lines(found))
    for text in (
        "300 in 3 files", "2026-11-24 to 2026-11-26",
        "new: 100 in 1", "10 empty_response", "0.700 [0.600, 0.800]", "1.5 h",
        "5 GPU-hours", "published: 0123456789abcdef", "exit code 4", "nothing new: fedcba9876543210", "unfinished",
    ):  # fmt: skip
        assert text in said, text
    assert "x" * 300 not in said.replace("\n", "")
    told = json.loads("".join(lines(found, as_json=True)))
    assert told["total"] == 5 and told["runs"][3]["reasons"] == ["x" * 500]


def test_a_summary_of_an_earlier_version_is_shown_for_what_it_has(tmp_path: Path):
    write(tmp_path, "n-20261126T020000Z")
    place = tmp_path / "runs/n-20261126T020000Z/summary.json"
    lacking = {k: v for k, v in SUMMARY.items() if k not in {"began", "cost", "input"}}
    place.write_text(json.dumps(lacking))
    [run] = page(Location.of(tmp_path), 20).runs
    assert run["cost"] is None and run["input"] is None and "\n".join(lines(page(Location.of(tmp_path), 20)))


@pytest.mark.parametrize("content", ["", '{"run_id": "n', "[]", "null", '{"run_id": "n", "exit_code": 0}', "\x00"])
def test_a_damaged_summary_hides_no_other_run(tmp_path: Path, content: str):
    write(tmp_path, "n-20261126T020000Z")
    write(tmp_path, "n-20261125T020000Z")
    (tmp_path / "runs/n-20261126T020000Z/summary.json").write_text(content)
    found = page(Location.of(tmp_path), 20)
    assert [run["outcome"] for run in found.runs] == ["damaged", "done"]
    assert "summary.json cannot be read" in found.runs[0]["reasons"][0]
    assert "damaged" in "\n".join(lines(found)) and json.loads("".join(lines(found, as_json=True)))["total"] == 2


def test_a_damaged_pointer_hides_neither_runs_nor_other_names(tmp_path: Path):
    write(tmp_path, "n-20261126T020000Z")
    for name, content in (("n", "garbage"), ("m", '{"version": "v", "path": "p", "published": "t"}')):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "latest.json").write_text(content)
    found = page(Location.of(tmp_path), 20)
    said = "\n".join(lines(found))
    assert found.latest == {"m": "v"} and "n-20261126T020000Z" in said
    assert "models/n/latest.json is damaged" in said and "`dpo-ray promote` writes it anew" in said


def test_in_an_object_store_names_without_a_time_are_asked_for_theirs():
    with object_store():
        output = Location.of(f"s3://{BUCKET}/history")
        for name in ("by hand", "n-20200101T000000Z"):
            for file in ("config.yaml", "summary.json"):
                (output / "runs" / name / file).write_bytes(json.dumps(SUMMARY).encode())
        assert ids(output, None) == ["by hand", "n-20200101T000000Z"] or ids(output, 1) == ["by hand"]


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run"):
        page(Location.of(tmp_path), 20)


def test_the_command_shows_a_page_all_of_them_or_one_run(tmp_path: Path):
    for n in range(3):
        folder = write(tmp_path, f"n-20261101T{n:06d}Z")
    assert len(in_process("show", str(tmp_path), "--last", "2").lines("n-20261101T")) == 2
    assert len(in_process("show", str(tmp_path), "--all").lines("n-20261101T")) == 3
    assert json.loads(in_process("show", str(tmp_path), "--json").log)["total"] == 3
    assert json.loads(in_process("show", str(folder)).log)["run_id"] == folder.name


def test_a_stage_costs_its_seconds_times_the_workers_it_asked_for():
    with metered() as usage:
        used(4, 0.5)
        used(2, 2)
    used(8, 8)  # of no stage
    assert (usage.workers, usage.gpus) == (4, 4)
    stages = {
        "train": {"seconds": 1800.0, "workers": 4, "gpus": 4.0},
        "ingest": {"seconds": 3600.0, "workers": 2, "gpus": 0},
        "publish": {"seconds": 7200.0, "workers": 0, "gpus": 0},
    }
    assert cost_of(stages, 3600.0, None) == {"hours": 1.0, "worker_hours": 4.0, "gpu_hours": 2.0}
    trials = Train(use_gpu=True, gpus_per_worker=0.5)
    assert cost_of({}, 3600.0, (1800.0, 4, trials)) == {"hours": 1.0, "worker_hours": 2.0, "gpu_hours": 1.0}
