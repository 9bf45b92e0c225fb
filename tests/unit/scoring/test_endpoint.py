"""A judge behind a server: a real one of the test, on loopback, that is well, slow, broken or wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dpo_ray.config import Endpoint, Judge
from dpo_ray.errors import ConfigError, EndpointError
from dpo_ray.pairs import Message
from dpo_ray.scoring.endpoint import EndpointChat, require_endpoint

Reply = Callable[[dict[str, Any]], tuple[int, Any]]


HTML = "<html>welcome</html>"


class Server:
    """Answers each request by a function: body → status and JSON."""

    def __init__(self) -> None:
        self.requests: list[tuple[float, dict[str, Any], str | None]] = []
        self.reply: Reply = lambda body: (200, completion(body["messages"][-1]["content"].upper()))
        self.at_once, self.most = 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((time.monotonic(), body, self.headers["Authorization"]))
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                status, value = outer.reply(body)
                with outer.lock:
                    outer.at_once -= 1
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "10")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


def completion(text: str | None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice]}


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def chat(server: Server, **options: Any) -> EndpointChat:
    endpoint = Endpoint(base_url=server.url, model="j", **{"max_retries": 2, **options})
    return EndpointChat(Judge(endpoint=endpoint, max_tokens=7), endpoint)


def ask(*texts: str) -> list[list[Message]]:
    return [[Message(role="user", content=text)] for text in texts]


def test_each_dialogue_has_its_reply_in_order(server: Server):
    def slower_the_shorter(body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][-1]["content"]
        time.sleep(0.2 / len(text))
        return 200, completion(text.upper())

    server.reply = slower_the_shorter
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert chat(server, concurrent_requests=3).replies(ask(*texts), {"type": "object"}) == [t.upper() for t in texts]
    assert server.most <= 3
    body = server.requests[0][1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("j", 0.0, 7)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    chat(server).replies(ask("a"), None)
    assert "response_format" not in server.requests[-1][1]


def test_a_reply_without_text_is_empty_text(server: Server):
    server.reply = lambda body: (
        200,
        {**completion(None), "choices": []} if body["messages"][0]["content"] == "a" else completion(None),
    )
    assert chat(server).replies(ask("a", "b"), None) == ["", ""]


def test_no_more_requests_than_the_rate_allows(server: Server):
    chat(server, requests_per_minute=600).replies(ask(*"abcdefghijklmnop"), None)
    times = sorted(when for when, *_ in server.requests)
    # Sixteen, one each tenth of a second; the connection of the first takes some of it.
    assert times[-1] - times[0] >= 1.2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_is_asked_again_with_pauses_and_then_told(server: Server, status: int):
    def fails_twice(body: dict[str, Any]) -> tuple[int, Any]:
        return (200, completion("yes")) if len(server.requests) > 2 else (status, {"error": {"message": "busy"}})

    server.reply = fails_twice
    assert chat(server, concurrent_requests=1).replies(ask("a"), None) == ["yes"]
    server.reply = lambda body: (status, {"error": {"message": "busy"}})
    with pytest.raises(EndpointError, match=r"The judge j at http://127\.0\.0\.1:\d+/v1 failed 3 times .*busy"):
        chat(server).replies(ask("a"), None)
    assert len(server.requests) == 6


def test_a_server_that_is_too_slow_is_told(server: Server):
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(1)
        return 200, completion("late")

    server.reply = slow
    with pytest.raises(EndpointError, match=r"APITimeoutError.*raise endpoint\.timeout_seconds"):
        chat(server, timeout_seconds=0.1, max_retries=0).replies(ask("a"), None)


def test_nobody_who_listens_is_told(server: Server):
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="j", max_retries=0)
    with pytest.raises(EndpointError, match="APIConnectionError"):
        EndpointChat(Judge(endpoint=endpoint), endpoint).replies(ask("a"), None)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "refuses the key in JUDGE_KEY .*set endpoint.api_key_env"),
        (403, "refuses the key in JUDGE_KEY"),
        (404, "is not known there .*check endpoint.base_url and endpoint.model"),
        (400, "refuses a question as wrong .*set structured=false"),
    ],
)
def test_what_no_retry_can_mend_is_told_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, said: str
):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    server.reply = lambda body: (status, {"error": {"message": "no"}})
    with pytest.raises(ConfigError, match=said) as caught:
        chat(server, api_key_env="JUDGE_KEY").replies(ask("a"), None)
    assert "secret" not in str(caught.value)
    assert [key for *_, key in server.requests] == ["Bearer secret-1"]


def test_a_key_that_is_not_there_is_told_before_anything_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="there is no such environment variable here"):
        require_endpoint(Endpoint(base_url=server.url, model="j", api_key_env="JUDGE_KEY"))


@pytest.mark.parametrize("answer", [HTML, {"choices": [{"index": 0}]}, [1]])
def test_an_answer_that_is_no_chat_completion_names_the_address(server: Server, answer: Any):
    server.reply = lambda body: (200, answer)
    with pytest.raises(ConfigError, match=r"answers with what is no chat completion .*ends in /v1") as caught:
        chat(server).replies(ask("Hello"), None)
    assert server.url in str(caught.value)
