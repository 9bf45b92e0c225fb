"""dpo-ray watch: how a run stands, told from what it stores, in every state that it may be in."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dpo_ray import progress
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, Interrupted
from dpo_ray.progress import Progress, say, waiting
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import started, this_machine
from dpo_ray.training.live import MOST_POINTS, TrainingSoFar
from pipelines.cli import app
from pipelines.context import RunContext
from pipelines.live import PROGRESS, TRAINING, Live, at_work, told_live
from pipelines.watch.reading import SILENT_S, Watched, run_folder
from pipelines.watch.render import render
from pipelines.watch.sparkline import sparkline
from tests.object_store import BUCKET, object_store
from tests.reports import metrics_lines
from tests.whole_run import Job, no_cluster, number_rows, word_model

PLAN = ["ingest", "tokenize", "reference", "train", "evaluate", "publish"]


def stage(seconds: float, rows: int, *, reused: bool = False) -> dict[str, Any]:
    return {"reused": reused, "seconds": seconds, "rows": rows}


def progress_of(**changes: Any) -> dict[str, Any]:
    """progress.json of a run that tokenizes, in this process."""
    process = {"by": "ann@host", "pid": os.getpid(), "process": started(os.getpid()), "machine": this_machine()}
    return {
        "run_id": "aligned-1",
        "command": ["run"],
        "plan": PLAN,
        "seconds": 75.0,
        "at": {"stage": "tokenize", "seconds": 15.0},
        "stages": {"ingest": stage(60.0, 40_000), "duplicates": stage(0.2, 39_000, reused=True)},
        "counts": [
            {
                "stage": "tokenized", "done": 12_000, "total": 40_000, "unit": "rows", "rate": 800.0,
                "parts_done": 1200, "parts": 4000, "seconds_left": 35.0,
            }
        ],
        "waits_for": None,
        "said": [{"time": "2026-11-01T02:00:05+00:00", "stage": "tokenized", "text": "computing 4000 shards"}],
        "trials": [],
        "process": process,
        "beat": 7,
        "every": 10.0,
    } | changes  # fmt: skip


def history() -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a training in which no step was left out."""
    return [{k: v for k, v in json.loads(line).items() if k != "skipped_pairs"} for line in metrics_lines(100)]


def training_of(step: int = 30, **changes: Any) -> dict[str, Any]:
    """training.json after a step of 100."""
    so_far = TrainingSoFar(100, 2)
    for metrics in history()[:step]:
        so_far(metrics)
    return json.loads(so_far.content()) | {"seconds_left": 600.0} | changes


def summary_of(**changes: Any) -> dict[str, Any]:
    def entry(seconds: float, rows: int | None) -> dict[str, Any]:
        return {"fingerprint": "f", "reused": False, "seconds": seconds, "rows": {"kept": rows}}

    return {
        "run_id": "aligned-1",
        "exit_code": 0,
        "seconds": 4000.0,
        "stages": {"ingest": entry(60.0, 40_000), "train": entry(3600.0, 39_000)},
        "eval": {"accuracy": {"value": 0.7, "low": 0.65, "high": 0.75, "n": 300}},
        "published": "/out/models/aligned/abc",
        "reasons": [],
    } | changes


def stored(folder: Path, **files: dict[str, Any]) -> Location:
    """A run's folder with these files. progress=… writes progress.json."""
    place = Location.of(folder / "runs" / "aligned-1")
    (place / "config.yaml").write_bytes(b"{}")
    for name, content in files.items():
        (place / f"{name}.json").write_bytes(json.dumps(content).encode())
    return place


def shown(watched: Watched, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(watched.look(), width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return text


def ended_process() -> dict[str, Any]:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = {"by": "ann@host", "pid": process.pid, "process": started(process.pid), "machine": this_machine()}
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    return found


@pytest.mark.parametrize("width", [60, 120])
def test_stages_shards_and_the_last_words_of_a_run_at_work(tmp_path: Path, width: int):
    text = shown(Watched(stored(tmp_path, progress=progress_of())), width)
    assert text.startswith("aligned-1 · run · 0:01:15\nit runs\n")
    rows = {row[1]: row for line in text.splitlines() if len(row := line.split()) > 1 and row[0] in "✓▶○✗"}
    assert list(rows) == ["ingest", "duplicates", *PLAN[1:]]
    assert rows["ingest"] == ["✓", "ingest", "done", "0:01:00", "40000"]
    assert rows["duplicates"][2] == "reused"
    assert rows["tokenize"][:5] == ["▶", "tokenize", "at", "work", "0:00:15"]
    assert rows["train"] == ["○", "train", "to", "do"]
    words = " ".join(text.split())
    assert "tokenized: 12000/40000 rows · 1200/4000 shards · 800 rows/s · 0:00:35 left" in words
    assert "02:00:05 [tokenized] computing 4000 shards" in words


@pytest.mark.parametrize("width", [60, 120])
def test_a_training_with_its_curves(tmp_path: Path, width: int):
    at = {"stage": "train (round 2)", "seconds": 300.0}
    training = training_of(gpu_memory=[12 << 30, 80 << 30], skipped=1)
    text = shown(Watched(stored(tmp_path, progress=progress_of(at=at, counts=[]), training=training)), width)
    words = " ".join(text.split())
    assert "step 30 of 100 · 1 left out ·" in words and "0:10:00 left · GPU memory 12.0 of 80.0 GiB" in words
    [loss] = [line for line in text.splitlines() if line.startswith("loss")]
    _, trained, bars, held_out, more = loss.split()
    assert float(trained) == pytest.approx(training["trained"]["loss"]["last"], abs=1e-4)
    assert float(held_out) == pytest.approx(training["held_out"]["loss"]["last"], abs=1e-4)
    assert len(bars) > len(more) == 3 and bars[0] > bars[-1]  # three evaluations; the loss falls
    assert "margin" in text and "accuracy" in text


def test_curves_of_an_earlier_training_are_not_shown_while_another_stage_works(tmp_path: Path):
    assert "step 30" not in shown(Watched(stored(tmp_path, progress=progress_of(), training=training_of())))


def test_a_run_that_waits_says_for_what(tmp_path: Path):
    waits = "The training x is the work of run y by bob@gpu7"
    watched = Watched(stored(tmp_path, progress=progress_of(waits_for=waits)))
    assert watched.look().state == "waiting" and f"waits: {waits}" in shown(watched)


def test_a_run_whose_process_has_ended_here_is_dead_at_once(tmp_path: Path):
    watched = Watched(stored(tmp_path, progress=progress_of(process=ended_process())))
    assert watched.look().state == "dead"
    text = shown(watched)
    assert "ended without a word: killed" in text and re.search(r"✗ +tokenize +stopped", text)


def elsewhere(beat: int) -> dict[str, Any]:
    process = {"by": "bob@gpu7", "pid": 4711, "process": "1", "machine": "another boot"}
    return progress_of(process=process, beat=beat)


def test_of_another_machine_the_same_sign_for_a_minute_is_silence(tmp_path: Path):
    place = stored(tmp_path, progress=elsewhere(7))
    clock = [1000.0]
    # A clock that is an hour behind the store's says nothing; what counts is how long the same sign is seen.
    watched = Watched(place, now=lambda: clock[0], wall=lambda: time.time() - 3600)
    states = []
    for seconds, beat in [(0, 7), (SILENT_S - 1, 7), (2, 7), (1, 8), (SILENT_S - 1, 8), (2, 8)]:
        clock[0] += seconds
        stored(tmp_path, progress=elsewhere(beat))
        states.append(watched.look().state)
    assert states == ["running", "running", "silent", "running", "running", "silent"]
    assert "no sign for 61 s from process 4711 of bob@gpu7" in shown(watched)


def test_at_the_first_look_the_age_of_the_sign_counts(tmp_path: Path):
    place = stored(tmp_path, progress=elsewhere(7))
    assert Watched(place, wall=lambda: time.time() + 500).look().state == "silent"
    assert Watched(place).look().state == "running"


def test_without_any_sign_it_says_so(tmp_path: Path):
    watched = Watched(stored(tmp_path))
    assert watched.look().state == "unknown" and "no sign of it is stored" in shown(watched)


@pytest.mark.parametrize("width", [60, 120])
def test_a_run_that_has_ended_shows_how(tmp_path: Path, width: int):
    place = stored(tmp_path, progress=progress_of(), training=training_of(step=90), summary=summary_of())
    (place / "metrics.jsonl").write_bytes("\n".join(map(json.dumps, history())).encode())
    watched = Watched(place)
    text = shown(watched, width)
    words = " ".join(text.split())
    assert text.startswith("aligned-1 · run · 1:06:40\npublished\n")
    assert "step 100 of 100" in text and "left" not in words and "○" not in text and "shards" not in text
    assert "Held-out accuracy: 0.700, 95% interval 0.650 to 0.750 (n=300)" in words
    assert "Model: /out/models/aligned/abc" in words


def test_a_run_that_failed_shows_where_and_why(tmp_path: Path):
    summary = summary_of(exit_code=3, reasons=["The reference does not agree."], published=None)
    summary["stages"].pop("train")
    at = {"stage": "reference", "seconds": 5.0}
    text = shown(Watched(stored(tmp_path, progress=progress_of(at=at), summary=summary)))
    assert "\nfailed\n" in text and re.search(r"✗ +reference +stopped", text)
    assert "Exit code 3: The reference does not agree." in text


def test_a_training_that_died_stands_at_the_step_that_it_came_to(tmp_path: Path):
    summary = summary_of(exit_code=3, reasons=["The loss is nan."], published=None)
    at = {"stage": "train", "seconds": 5.0}
    place = stored(tmp_path, progress=progress_of(at=at), training=training_of(step=40), summary=summary)
    (place / "metrics.jsonl").write_bytes("\n".join(map(json.dumps, history()[:42])).encode())
    assert "step 42 of 100" in shown(Watched(place))


def test_a_sweep_has_a_line_for_each_trial(tmp_path: Path):
    head = ["trial", "state", "step", "accuracy", "time", "values"]
    rows = [[str(n), "finished", "8/8", f"0.{500 + n}", "30 s", f"beta 0.{n}"] for n in range(30)]
    text = shown(Watched(stored(tmp_path, progress=progress_of(trials=[head, *rows], at=None))), 60)
    assert sum("finished" in line for line in text.splitlines()) == 30


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_look_is_three_small_files_however_many_shards_there_are(tmp_path: Path, monkeypatch, store: str):
    with object_store() if store == "s3" else nullcontext():
        output = Location.of(f"s3://{BUCKET}/watched" if store == "s3" else tmp_path)
        place = output / "runs" / "aligned-1"
        (place / "config.yaml").write_bytes(b"{}")
        at = {"stage": "train", "seconds": 1.0}
        for name, content in ((PROGRESS, progress_of(at=at)), (TRAINING, training_of())):
            (place / name).write_bytes(json.dumps(content).encode())
        for number in range(20):
            (output / f"artifacts/pairs/shards/{number}.parquet").write_bytes(b"x")
        watched = Watched(run_folder(output))
        assert watched.look().state == "running"
        read: list[str] = []
        before = Location.read_bytes
        monkeypatch.setattr(Location, "read_bytes", lambda place: read.append(place.name) or before(place))
        monkeypatch.setattr(Location, "_infos", lambda *_, **__: pytest.fail("a folder is listed"))
        for _ in range(3):
            watched.look()
        assert read == ["summary.json", PROGRESS, TRAINING] * 3
        (place / "summary.json").write_bytes(json.dumps(summary_of()).encode())
        for _ in range(3):
            assert watched.look().state == "ended"
        assert read[9:] == ["summary.json", PROGRESS, TRAINING, "metrics.jsonl", PROGRESS, PROGRESS]


def test_an_output_folder_means_its_newest_run(tmp_path: Path):
    for name in ("n-20261101T000000Z", "n-20261103T000000Z", "n-20261102T000000Z"):
        (Location.of(tmp_path) / "runs" / name / "config.yaml").write_bytes(b"{}")
    newest = Location.of(tmp_path) / "runs" / "n-20261103T000000Z"
    assert run_folder(Location.of(tmp_path)) == newest == run_folder(newest)
    with pytest.raises(ConfigError, match="holds no run"):
        run_folder(Location.of(tmp_path / "nowhere"))


def test_a_damaged_file_is_named(tmp_path: Path):
    place = stored(tmp_path)
    (place / PROGRESS).write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"progress\.json is damaged"):
        Watched(place).look()


def context_of(folder: Path) -> RunContext:
    values = {"run": {"name": "n", "output": str(folder)}, "model": {"path": "m"}, "data": {"train": "x"}}
    return RunContext.start(Config.model_validate(values), "aligned-1")


def kept(context: RunContext) -> AbstractContextManager[None]:
    return told_live(context.live, context.folder, context.command, PLAN, context.stages)


def test_the_driver_tells_what_it_is_at(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(progress, "_said", type(progress._said)(maxlen=8))
    context = context_of(tmp_path)
    context.command = ("sweep",)
    monkeypatch.setattr("dpo_ray.storage.told.EVERY_S", 0.05)
    place = context.folder / PROGRESS

    def told() -> dict[str, Any]:
        beat = json.loads(place.read_bytes())["beat"]
        deadline = time.monotonic() + 60
        while (found := json.loads(place.read_bytes()))["beat"] < beat + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    with kept(context):
        assert told()["at"] is None
        context.live.begins("tokenize")
        counted = Progress("tokenized", 100, "rows", parts=10)
        counted.advance(20, shard="a")
        say("tokenized", "computing")
        with waiting("for room"):
            found = told()
        assert (found["at"]["stage"], found["waits_for"], found["command"]) == ("tokenize", "for room", ["sweep"])
        [one] = found["counts"]
        assert (one["done"], one["total"], one["parts_done"], one["parts"]) == (20, 100, 1, 10)
        assert [line["text"] for line in found["said"]] == ["computing"]
        assert found["process"]["by"].endswith(socket.gethostname())
        context.live.begins("train")
        assert told()["waits_for"] is None and told()["counts"] == []
        assert Watched(context.folder).look().state == "running"
    assert json.loads(place.read_bytes())["at"]["stage"] == "train"


def test_a_store_that_takes_nothing_ends_no_run(tmp_path: Path, monkeypatch, capfd):
    context = context_of(tmp_path)

    def refuse(place: Location, data: bytes) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Location, "write_bytes", refuse)
    with kept(context):
        pass
    assert capfd.readouterr().err.count("progress.json, which `dpo-ray watch` reads, could not be written") == 1


def test_what_ends_the_work_passes(tmp_path: Path):
    with pytest.raises(Interrupted), kept(context_of(tmp_path)):
        raise Interrupted("x")


def test_a_whole_run_is_seen_and_shown_once_in_a_pipe(tmp_path: Path, small_model: Path):
    job = Job(tmp_path, word_model(tmp_path / "model", small_model))
    job.write("one.jsonl", number_rows(0, 40))
    with no_cluster():
        assert job.run("--run-id", "first").code == 0
    found = json.loads((job.output / "runs/first" / PROGRESS).read_text())
    assert found["at"]["stage"] == "publish" and found["plan"] == PLAN
    assert found["stages"]["ingest"]["rows"] == 40
    for arguments in ([str(job.output)], ["--once", str(job.output / "runs/first")]):
        result = CliRunner().invoke(app, ["watch", *arguments])
        assert result.exit_code == 0, result.output
        assert "first · run" in result.output and "published" in result.output and "\x1b" not in result.output


def test_a_training_is_told_in_as_few_points_however_long_it_was():
    clock = [0.0]
    before = [{"step": n, "loss": 1.0, "tokens_per_second": 1.0} for n in range(1, 1001)]
    so_far = TrainingSoFar(10_000, 4, before, clock=lambda: clock[0])
    assert json.loads(so_far.content())["seconds_left"] is None
    for step in range(1001, 9001):
        clock[0] += 0.5
        so_far({"step": step, "loss": 1 - step / 10_000, "tokens_per_second": 50.0, "rewards/margins": float("nan")})
    found = json.loads(so_far.content())
    assert (found["step"], found["workers"], found["gpu_memory"]) == (9000, 4, None)
    assert found["seconds_left"] == pytest.approx(500.0)
    points = found["trained"]["loss"]["points"]
    assert MOST_POINTS / 2 <= len(points) < MOST_POINTS and points[0] == 1.0 and points[-1] < 0.12
    assert found["trained"]["loss"]["last"] == pytest.approx(0.1)
    assert "margin" not in found["trained"] and found["held_out"] == {}


def test_a_sparkline_runs_from_the_lowest_to_the_highest_value():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3, 3, 3], 10) == "▅▅▅"
    assert sparkline([1, float("nan"), 2], 10) == "▁█"
    assert sparkline([], 10) == "" == sparkline([1.0], 0)


def test_a_run_that_is_begun_again_under_its_name_is_at_work(tmp_path: Path):
    place = stored(tmp_path, progress=progress_of(), summary=summary_of())
    summary, progress = (Path(place.uri) / f"{name}.json" for name in ("summary", "progress"))
    for ended, told, state in (
        (101, 100, "ended"),
        (100, 101, "running"),
        (101, 101, "ended"),
    ):  # stores of whole seconds
        os.utime(summary, (ended, ended))
        os.utime(progress, (told, told))
        found = Watched(place, wall=lambda: 102.0).look()
        assert found.state == state


def test_a_second_run_of_a_process_does_not_tell_of_the_first(tmp_path: Path):
    with told_live(Live(), Location.of(tmp_path / "first"), [], PLAN, {}):
        say("train", "the first one's words")
    with told_live(Live(), Location.of(tmp_path / "second"), [], PLAN, {}):
        found = json.loads((tmp_path / "second" / PROGRESS).read_text())
    assert found["said"] == [] and found["counts"] == []


def test_where_no_machine_is_told_a_run_counts_as_at_work_by_its_last_sign(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pipelines.live.this_machine", lambda: None)
    run = Location.of(tmp_path / "run")
    with told_live(Live(), run, [], PLAN, {}):
        pass
    written = (run / PROGRESS).written()
    assert written is not None
    assert at_work(run, written + 1) and not at_work(run, written + 60)
    (run / PROGRESS).write_bytes(b"{")
    assert not at_work(run, written + 1)
