"""A cluster's jobs as seen from elsewhere: what is said where no dashboard of Ray answers, and how a job is dated."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster import jobs
from cluster.jobs import Outcome, connected, pasted
from dpo_ray.errors import ConfigError


@contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    """A server that is no dashboard of Ray; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "body"),
    [(502, b"<html>"), (404, b""), (200, b"<html>"), (200, b"{}"), (200, b"[]")],
    ids=["a proxy's error", "no such page", "another page", "another API", "another one"],
)
def test_a_server_that_is_no_dashboard_is_named(code: int, body: bytes):
    with (
        answering(code, body) as address,
        pytest.raises(ConfigError, match=f"No Ray dashboard answers at {address} .*--address http://127.0.0.1:8265"),
    ):
        connected(address)


def test_a_head_that_takes_the_connection_and_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"No Ray dashboard answers at {address} \(.*timed out"):
            connected(address)


def test_an_address_without_a_scheme_is_told_what_it_was_taken_for(monkeypatch: pytest.MonkeyPatch):
    from ray.exceptions import RpcError
    from ray.job_submission import JobSubmissionClient

    def refuse(*_: Any) -> None:
        raise RpcError("Timed out while waiting for GCS to become available.", rpc_code=4)

    monkeypatch.setattr(JobSubmissionClient, "__init__", refuse)
    with pytest.raises(ConfigError, match=r"Without http:// before it, Ray took head:8265 for the port by which nodes"):
        connected("head:8265")


def test_a_job_is_dated_in_utc():
    told = Outcome("night", "SUCCEEDED", "Done.", 0, 1_793_491_200.0, None).told()
    assert told == "night: SUCCEEDED, exit code 0; began 2026-11-01T00:00:00Z, ended -. Done."


@pytest.mark.parametrize(
    ("address", "expected"), [("http://h:1/a b", "'night 1' --address 'http://h:1/a b'"), (None, "'night 1'")]
)
def test_a_job_is_named_as_a_shell_takes_it_with_its_cluster(address: str | None, expected: str):
    class Client:
        given = address

    assert pasted(Client(), "night 1") == expected  # type: ignore[arg-type]
