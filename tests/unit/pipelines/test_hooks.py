"""Who is told how a run ended, and that nothing goes wrong by telling."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from urllib3.util import Retry

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import Busy, ConfigError, DataError, GateFailed, Interrupted
from pipelines.hooks import require_hooks, told_when_ended
from tests.command_line import in_process
from tests.whole_run import Job, number_rows

SECRET = "T0KEN-of-the-channel"


def config_of(folder: Path, **hooks: Any) -> Config:
    run = {"name": "nightly", "output": str(folder / "out"), "hooks": hooks}
    return parse_config({"run": run, "model": {"path": "m"}, "data": {"train": "x"}})


def writer(folder: Path) -> tuple[list[str], Callable[[], list[dict[str, Any]]]]:
    """A command that keeps what it is given, and what it was given."""
    kept = folder / "kept"
    code = f"import sys; open({str(kept)!r}, 'a').write(sys.stdin.read() + '\\n'); print('heard', sys.argv[1])"
    return [sys.executable, "-c", code, "; touch /tmp/no-shell"], lambda: [
        json.loads(line) for line in kept.read_text().splitlines()
    ]


class Webhook:
    """A server that answers with these codes, one after the other, and then with 200; it keeps what it is sent."""

    def __init__(self, *answers: int):
        self.answers, self.got = list(answers), list[tuple[str, dict[str, Any]]]()
        mine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                mine.got.append((self.path, json.loads(body)))
                self.send_response(mine.answers.pop(0) if mine.answers else 200)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{SECRET}"


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch, *answers: int) -> Iterator[Webhook]:
    hook = Webhook(*answers)
    monkeypatch.setenv("ALERTS", hook.url)
    monkeypatch.setattr(Retry, "get_backoff_time", lambda self: 0.0)
    thread = threading.Thread(target=hook.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hook
    finally:
        hook.server.shutdown()
        hook.server.server_close()
        thread.join()


def end(config: Config, error: BaseException | None = None, **summary: Any) -> None:
    """A run that ends so."""
    try:
        with told_when_ended(config) as ended:
            ended.folder, ended.summary = "/out/runs/r", {"run_id": "r", **summary}
            if error is not None:
                raise error
    except BaseException as raised:
        if raised is not error:
            raise


def test_a_command_gets_json_and_no_shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    command, kept = writer(tmp_path)
    accuracy = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 40}
    end(config_of(tmp_path, on_success={"command": command}), published="/p/v", eval={"accuracy": accuracy}, cost={})
    assert kept() == [
        {
            "event": "success",
            "text": "nightly: published /p/v",
            "name": "nightly",
            "run_id": "r",
            "output": str(tmp_path / "out"),
            "folder": "/out/runs/r",
            "exit_code": 0,
            "error": None,
            "reasons": [],
            "published": "/p/v",
            "nothing_new": None,
            "input": None,
            "cost": {},
            "accuracy": accuracy,
            "win_rate": None,
        }
    ]
    said = capfd.readouterr().err
    assert "heard ; touch /tmp/no-shell" in said and "[hooks] run.hooks.on_success.command done" in said


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (GateFailed("the accuracy is low"), "gate_failed", 4),
        (DataError("no file"), "error", 3),
        (RuntimeError("odd"), "error", 1),
        (None, "success", 0),
    ],
)
def test_each_end_has_its_hook(tmp_path: Path, error: BaseException | None, event: str, code: int):
    command, kept = writer(tmp_path)
    end(
        config_of(tmp_path, **{name: {"command": command} for name in ("on_success", "on_gate_failed", "on_error")}),
        error,
    )
    [told] = kept()
    assert (told["event"], told["exit_code"], told["error"]) == (event, code, error and type(error).__name__)
    assert told["reasons"] == ([str(error)] if error is not None else []) and str(error or "done") in told["text"]


@pytest.mark.parametrize("error", [Busy("another run"), Interrupted("Ctrl-C"), KeyboardInterrupt()])
def test_who_left_or_was_interrupted_tells_nobody(tmp_path: Path, error: BaseException):
    command, _ = writer(tmp_path)
    end(config_of(tmp_path, on_error={"command": command}), error)
    assert not (tmp_path / "kept").exists()


def test_a_webhook_is_posted_to_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    with listening(monkeypatch, 503, 429) as hook:
        end(config_of(tmp_path, on_gate_failed={"url_env": "ALERTS"}), GateFailed("low"))
    assert [path for path, _ in hook.got] == [f"/services/{SECRET}"] * 3
    assert hook.got[-1][1]["text"] == "nightly: not published: low"
    assert "run.hooks.on_gate_failed.url_env done" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("answers", "tries", "said"),
    [((500,) * 9, 3, "answered 500, in 3 tries"), ((404,), 1, "answered 404"), ((302,), 1, "answered 302")],
)
def test_a_webhook_that_does_not_take_it_is_told_without_its_url(
    tmp_path: Path, monkeypatch, capfd, answers: tuple[int, ...], tries: int, said: str
):
    logging.getLogger("urllib3.connectionpool").setLevel(logging.DEBUG)
    with listening(monkeypatch, *answers) as hook:
        end(config_of(tmp_path, on_error={"url_env": "ALERTS", "max_retries": 2}), DataError("x"))
    logging.getLogger("urllib3.connectionpool").setLevel(logging.NOTSET)
    printed = "".join(capfd.readouterr())
    assert len(hook.got) == tries and f"failed: {said}. The run ended as it did without it" in printed
    assert SECRET not in printed and not logging.getLogger("urllib3.connectionpool").disabled


def test_where_nobody_listens_or_the_url_is_none_the_run_ends_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, caplog
):
    monkeypatch.setattr(Retry, "get_backoff_time", lambda self: 0.0)
    for url in (f"http://127.0.0.1:9/services/{SECRET}", f"no-url-{SECRET}", f"http://[{SECRET}"):
        monkeypatch.setenv("ALERTS", url)
        config = config_of(
            tmp_path, on_error={"url_env": "ALERTS", "timeout_seconds": 2}, on_success={"url_env": "ALERTS"}
        )
        end(config)
        with pytest.raises(DataError, match="the data"), told_when_ended(config):
            raise DataError("the data")
    printed = "".join(capfd.readouterr()) + caplog.text
    assert printed.count("failed: ") == 6 and SECRET not in printed


@pytest.mark.parametrize(
    ("code", "said"),
    [("import sys; sys.exit(7)", "exit code 7"), ("import time; time.sleep(60)", "more than timeout_seconds=0.5")],
)
def test_a_command_that_fails_is_told_and_changes_nothing(tmp_path: Path, capfd, code: str, said: str):
    hook = {"command": [sys.executable, "-c", code], "timeout_seconds": 0.5 if "sleep" in code else 30}
    end(config_of(tmp_path, on_success=hook))
    assert said in capfd.readouterr().err


def test_a_command_may_leave_something_running(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)']).pid)"
    end(config_of(tmp_path, on_success={"command": [sys.executable, "-c", code], "timeout_seconds": 20}))
    said = capfd.readouterr().err
    os.kill(int(said.split()[0]), signal.SIGKILL)
    assert "run.hooks.on_success.command done" in said


def test_what_a_command_that_takes_too_long_has_started_is_ended_with_it(tmp_path: Path, capfd):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    end(config_of(tmp_path, on_success={"command": [sys.executable, "-c", code], "timeout_seconds": 1.5}))
    assert "more than timeout_seconds=1.5 and was ended" in capfd.readouterr().err
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_of_much_that_a_command_prints_the_end_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    code = "print('x' * 1_000_000); print('the end')"
    end(config_of(tmp_path, on_success={"command": [sys.executable, "-c", code]}))
    said = capfd.readouterr().err
    assert len(said) < 100_000 and "bytes before this are left out]" in said and "the end\n" in said


def test_a_webhook_is_done_when_it_has_answered_whatever_it_goes_on_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100):
                if ended.wait(0.2):
                    return
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("ALERTS", f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}")
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        began = time.monotonic()
        end(config_of(tmp_path, on_success={"url_env": "ALERTS", "timeout_seconds": 5}))
        took = time.monotonic() - began
        ended.set()
        thread.join()
    assert "run.hooks.on_success.url_env done" in capfd.readouterr().err
    assert took < 15  # of 20 that the answer takes


def test_both_are_called_where_both_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command, kept = writer(tmp_path)
    with listening(monkeypatch) as hook:
        end(config_of(tmp_path, on_success={"command": command, "url_env": "ALERTS"}))
    assert hook.got[0][1] == kept()[0]


def test_what_could_not_be_called_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError, match=r"on_error\.url_env is NO_SUCH, and there is no such environment variable"):
        require_hooks(config_of(tmp_path, on_error={"url_env": "NO_SUCH"}))
    for url in (f"hooks.example/{SECRET}", f"http://[{SECRET}", f"'https://hooks.example/{SECRET}'", "https://"):
        monkeypatch.setenv("ALERTS", url)
        with pytest.raises(ConfigError, match=r"on_error\.url_env is ALERTS, .* is no URL") as raised:
            require_hooks(config_of(tmp_path, on_error={"url_env": "ALERTS"}))
        assert SECRET not in str(raised.value)
    with pytest.raises(ConfigError, match=r"on_success\.command begins with no-such-program"):
        require_hooks(config_of(tmp_path, on_success={"command": ["no-such-program"]}))


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ({}, "neither a `command` nor a `url_env`"),
        ({"command": ["x"], "max_retries": 2}, "there is no `url_env`"),
        ({"command": []}, "command"),
        ({"url_env": "https://hooks.example/secret"}, "url_env"),
        ({"url": "x"}, "url is not a known key"),
    ],
)
def test_a_hook_that_means_nothing_is_refused(tmp_path: Path, hook: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path, on_error=hook)


def test_a_run_tells_of_itself_and_of_what_failed_before_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command, kept = writer(tmp_path)
    job = Job(
        tmp_path, tmp_path, run={"hooks": {"on_success": {"url_env": "ALERTS"}, "on_error": {"command": command}}}
    )
    with listening(monkeypatch) as hook:
        failed = job.run(command="ingest")
        assert failed.code == 3 and failed.lines("[hooks] run.hooks.on_error.command done")
        job.write("a.jsonl", number_rows(0, 12))
        done = job.run(command="ingest")
        assert done.code == 0, done.log
    [told] = kept()
    assert (told["exit_code"], told["run_id"], told["folder"]) == (3, None, None) and "no file is there" in told["text"]
    [(_, heard)] = hook.got
    assert heard["input"]["rows"] == 12 and Path(heard["folder"]).name == heard["run_id"]
    written = "".join(f.read_text() for f in job.output.rglob("*") if f.suffix in {".json", ".yaml", ".txt", ".html"})
    assert SECRET not in written + done.log and "ALERTS" in written


def test_a_dry_run_shows_the_hooks_and_calls_none(tmp_path: Path):
    command, _ = writer(tmp_path)
    job = Job(tmp_path, tmp_path, run={"hooks": {"on_success": {"command": command}}})
    shown = in_process("run", str(job.path), "--dry-run")
    assert shown.code == 0 and "on_success" in shown.log and not (tmp_path / "kept").exists()
