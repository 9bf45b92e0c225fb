"""What a person is shown, and what goes to the log file alone."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from pathlib import Path

import pytest

from dpo_ray.progress import WATCHED, Progress, say
from pipelines.display import Display, LiveDisplay, display_on
from pipelines.terminal import LOG, Told, captured, told_apart

NOISE = [
    "2026-11-25 17:47:05,440\tWARNING authentication_token_setup.py:85 -- Token authentication is enabled for this Ray",
    "2026-11-25 17:48:01,917\tWARNING __init__.py:28 -- Progress bars disabled. To enable, set `ray.data.DataContext",
    "[2026-11-25 17:48:36,210 E 7608 7608] core_worker.cc:2465: Actor with class name: 'MapWorker' has constructor "
    "arguments in the object store and max_restarts > 0.",
    "(MapWorker(MapBatches(ShardWorker)) pid=81) INFO 11-25 17:00:00 Triton is installed, but `triton.backends` could",
    "(MapWorker(MapBatches(ShardWorker)) pid=81) Loading safetensors checkpoint shards: 100% 1/1",
    "(RayTrainWorker pid=7) NUMA binding is not supported on this platform",
    "Execution plan of Dataset dataset_3_0: InputDataBuffer[Input] -> TaskPoolMapOperator[MapBatches(write_shards)]",
    "[transformers] `torch_dtype` is deprecated! Use `dtype` instead!",
    "[rank0]:[W1125 17:00:00.000000000 ProcessGroupGloo.cpp:1] hostname cannot be resolved",
    "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1",
    "(raylet) WARNING: 8 PYTHON worker processes have been started on node: a23 with address: 10.0.0.2, which",
    "[pairs] looks like ours, but nobody marked it",
    "",
]


@pytest.mark.parametrize("line", NOISE)
def test_what_libraries_print_is_not_shown(line: str):
    assert told_apart(line) is None


@pytest.mark.parametrize("before", ["", "(RayTrainWorker pid=7) ", "\x1b[36m(ShardWorker pid=81, ip=10.0.0.2)\x1b[0m "])
def test_our_own_lines_are_shown_as_they_are_wherever_they_come_from(before: str):
    assert told_apart(f"{before}\x1e[train] checkpoint at step 8/16") == Told("line", "[train] checkpoint at step 8/16")
    assert told_apart(f"{before}\x1f[train] 8/16 steps") == Told("progress", "[train] 8/16 steps")
    fields = {"stage": "train", "node": "a23"}
    assert told_apart(f'{before}\x1e{{"stage": "train", "node": "a23"}}\x1d[train] 8') == Told(
        "line", "[train] 8", fields=fields
    )


@pytest.mark.parametrize(
    "line",
    [
        "(raylet) Warning: The following resource request cannot be scheduled right now: {'GPU': 1.0}.",
        "(raylet, ip=10.0.0.2) 1 Workers (tasks / actors) killed due to memory pressure (OOM)",
        "(autoscaler +12s) Error: No available node types can fulfill resource request {'GPU': 4.0}.",
    ],
)
def test_what_rays_nodes_say_is_shown_as_a_warning(line: str):
    fields = {"node": "10.0.0.2"} if "ip=" in line else {}
    assert told_apart(line) == Told("line", line, "warning", fields)
    assert told_apart(f"\x1b[33m{line}") == Told("line", f"\x1b[33m{line}", "warning", fields)


def log_record(handler: logging.Handler, text: str) -> None:
    handler.emit(logging.LogRecord("some.library", logging.ERROR, "", 0, text, None, None))


def test_within_it_a_person_sees_our_lines_and_the_log_has_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with captured() as terminal:
        say("start", "first")
        print("from a library")
        os.write(1, b"from C, on standard output\n")
        os.write(2, b"from C, on standard error\n")
        log_record(logging.StreamHandler(), "an error that was dealt with")
        terminal.keep_log(tmp_path)
        Progress("train", 2, "steps").advance(2, "loss 0.5")
        print("(RayTrainWorker pid=7) \x1e[train] from a worker", file=sys.stderr)
        print("later", file=sys.stderr)
    print("after it")
    shown = capfd.readouterr()
    assert shown.out == "after it\n"
    assert [line.partition(" steps/s")[0][:18] for line in shown.err.splitlines()] == [
        "[start] first",
        "[train] 2/2 steps ",
        "[train] from a wor",
    ]
    log = (tmp_path / LOG).read_text().splitlines()
    assert log[:4] == ["[start] first", "from a library", "from C, on standard output", "from C, on standard error"]
    assert log[4] == "an error that was dealt with"
    assert log[5].startswith("[train] 2/2 steps") and log[6:] == [
        "(RayTrainWorker pid=7) [train] from a worker",
        "later",
    ]
    assert terminal.log == tmp_path / LOG and WATCHED not in os.environ


def test_lines_of_several_threads_stay_whole(capfd: pytest.CaptureFixture[str]):
    def speak(name: str) -> None:
        for number in range(200):
            sys.stderr.write("\x1e")
            sys.stderr.write(f"[{name}] ")
            sys.stderr.write(f"{number}\n")

    with captured() as terminal:
        threads = [threading.Thread(target=speak, args=(name,)) for name in ("one", "two", "three")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shown = capfd.readouterr().err.splitlines()
    for name in ("one", "two", "three"):
        assert [line for line in shown if f"[{name}]" in line] == [f"[{name}] {number}" for number in range(200)]
    terminal.log.unlink()


def test_an_error_names_the_log_where_that_tells_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="wrong") as known, captured() as terminal:
        say("start", "all of it was shown")
        raise ValueError("wrong")
    assert not hasattr(known.value, "__notes__") and not terminal.log.exists()

    with pytest.raises(ValueError, match="wrong") as known, captured() as terminal:
        os.write(2, b"and why\n")
        raise ValueError("wrong")
    assert known.value.__notes__ == [f"The log with all that was said is {terminal.log}."]
    assert terminal.log.read_text() == "and why\n"
    terminal.log.unlink()

    with pytest.raises(KeyboardInterrupt) as interrupted, captured() as terminal:
        terminal.keep_log(tmp_path)
        raise KeyboardInterrupt
    assert str(tmp_path / LOG) in interrupted.value.__notes__[0]


def test_what_holds_the_stream_for_longer_writes_on_into_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with captured() as terminal:
        terminal.keep_log(tmp_path)
        handler = logging.StreamHandler()
    log_record(handler, "at the very end")
    assert (tmp_path / LOG).read_text() == "at the very end\n"
    assert capfd.readouterr().err == ""


def test_a_stream_that_is_no_file_is_written_to(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with captured() as terminal:
        say("start", "first")
        print("noise")
    assert stream.getvalue() == "[start] first\n"
    terminal.log.unlink()


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)

    def shown(stream: io.StringIO) -> Display:
        with display_on(stream) as display:
            return display

    assert isinstance(shown(FakeTerminal()), LiveDisplay)
    assert not isinstance(shown(io.StringIO()), LiveDisplay)
    monkeypatch.setenv("CI", "true")
    assert not isinstance(shown(FakeTerminal()), LiveDisplay)
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert not isinstance(shown(FakeTerminal()), LiveDisplay)


def test_the_live_display_has_stages_done_and_to_come_and_the_progress_of_the_one_at_work():
    from rich.console import Console

    def seen(display: LiveDisplay) -> list[str]:
        console = Console(width=200, file=io.StringIO())
        console.print(display.render())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines()

    display = LiveDisplay(io.StringIO())
    display.plan(["ingest", "tokenize", "train", "publish"])
    display.stage("ingest")
    [line] = seen(display)
    assert line[1:].rstrip() == " ingest 0:00:00 ○ tokenize ○ train ○ publish"
    display.stage("tokenize")
    display.stage("data_report")
    display.progress("[measures] 30/40 rows · 5 rows/s · 0:00:02 left")
    stages, bar = seen(display)
    assert stages.startswith("✓ ingest ✓ tokenize ")
    assert stages.rstrip().endswith(" data_report 0:00:00 ○ train ○ publish")
    assert bar.count("━") == 18 and bar.rstrip().endswith("[measures] 30/40 rows · 5 rows/s · 0:00:02 left")
    display.stage("train")
    assert len(seen(display)) == 1  # the progress of the stage before is gone
    assert isinstance(display._stream, io.StringIO)
    display.line("[train] checkpoint at step 8/16")
    assert display._stream.getvalue() == "[train] checkpoint at step 8/16\n"
