"""An API server of Kubernetes that knows pods alone; each has ended with an exit code as soon as it is made."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

LOG = "2026-11-01T02:00:00.000000000Z [publish] the job's own words\n"
_PODS = re.compile(r"/api/v1/namespaces/(?P<namespace>[\w-]+)/pods(/(?P<name>[\w.-]+))?(?P<log>/log)?")


class Pods:
    """What was asked for."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.made: list[dict[str, Any]] = []
        self.there: dict[str, dict[str, Any]] = {}

    def make(self, pod: dict[str, Any], namespace: str) -> dict[str, Any]:
        """As the API server answers: its status is added."""
        self.made.append(json.loads(json.dumps(pod)))
        name = pod["spec"]["containers"][0]["name"]
        times = {"startedAt": "2026-11-01T02:00:00Z", "finishedAt": "2026-11-01T02:00:01Z"}
        ended = {"exitCode": self.exit_code, "reason": "Error" if self.exit_code else "Completed", **times}
        pod["metadata"] |= {"namespace": namespace, "uid": "1", "creationTimestamp": "2026-11-01T02:00:00Z"}
        pod["status"] = {
            "phase": "Failed" if self.exit_code else "Succeeded",
            "containerStatuses": [
                {
                    "name": name,
                    "image": "i",
                    "imageID": "i",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"terminated": ended},
                }
            ],
        }
        self.there[pod["metadata"]["name"]] = pod
        return pod

    def chosen(self, selector: str) -> list[dict[str, Any]]:
        """Those with the labels of a selector of the forms a=b and a!=b."""
        terms = [re.fullmatch(r"([^!=]+)(!?=)(.*)", term) for term in selector.split(",") if "=" in term]
        wanted = [(term[1], term[2] == "=", term[3]) for term in terms if term is not None]
        return [
            pod
            for pod in self.there.values()
            if all((pod["metadata"]["labels"].get(key) == value) == equal for key, equal, value in wanted)
        ]


@contextmanager
def api_server(exit_code: int, kubeconfig: Path) -> Iterator[Pods]:
    """Serves on loopback, and writes the kubeconfig that leads there."""
    pods = Pods(exit_code)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, found: Any, code: int = 200) -> None:
            body = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _of_pods(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = urlparse(self.path)
            match = _PODS.fullmatch(asked.path)
            if match is None:  # events, which there are none of
                return self._answer({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": []})
            name = match["name"]
            if self.command == "POST":
                return self._answer(pods.make(json.loads(content), match["namespace"]), 201)
            if name is None:
                selector = parse_qs(asked.query).get("labelSelector", [""])[0]
                items = pods.chosen(selector)
                return self._answer({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
            if name not in pods.there:
                return self._answer({"kind": "Status", "code": 404, "reason": "NotFound"}, 404)
            if match["log"]:
                return self._answer(LOG)
            if self.command == "PATCH":
                labels = json.loads(content).get("metadata", {}).get("labels", {})
                pods.there[name]["metadata"]["labels"] |= labels
            if self.command == "DELETE":
                return self._answer(pods.there.pop(name))
            return self._answer(pods.there[name])

        do_GET = do_POST = do_PATCH = do_DELETE = _of_pods

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cluster = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [{"name": "here", "cluster": cluster}],
                "users": [{"name": "me", "user": {}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            }
        )
    )
    try:
        yield pods
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
