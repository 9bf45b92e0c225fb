"""An object store whose endpoint can go away: a proxy before moto's server that stops to serve in one of three ways."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import pytest

from tests.object_store import ObjectStore, object_store

Away = Literal["refuses", "hangs", "unavailable"]
_UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
)
_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Endpoint:
    """The proxy."""

    upstream: tuple[str, int]
    address: tuple[str, int] = ("127.0.0.1", 0)
    away: Away | None = None
    """How it fails now: no connection is taken, nothing is answered, or 503."""
    _listening: socket.socket | None = None
    _open: set[socket.socket] = field(default_factory=set)

    def start(self) -> None:
        listening = socket.create_server(self.address)
        self.address = listening.getsockname()[:2]
        self._listening = listening
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def stop(self) -> None:
        if self._listening is not None:
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        self._break_off()

    def goes(self, away: Away) -> None:
        self.away = away
        if away == "refuses":
            self.stop()
        elif away == "unavailable":
            self._break_off()

    def returns(self) -> None:
        self.away = None
        self._break_off()
        if self._listening is None:
            self.start()

    def _break_off(self) -> None:
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        with suppress(OSError), client:
            if self.away == "unavailable":
                client.recv(1 << 16)
                client.sendall(_UNAVAILABLE % (len(_BODY), _BODY))
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):  # what is still being sent; a reset would take the answer away
                    pass
            elif self.away == "hangs":
                while client.recv(1 << 16):
                    pass
            else:
                with socket.create_connection(self.upstream) as server:
                    self._open.add(server)
                    back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
                    back.start()
                    self._pump(client, server)
                    back.join()
                    self._open.discard(server)
        self._open.discard(client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.away is None:  # what comes while it hangs goes nowhere
                    target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def endpoint() -> Iterator[tuple[Endpoint, ObjectStore]]:
    """moto's server behind one; this process and those that it starts go by way of it."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        at = urlsplit(store.env["AWS_ENDPOINT_URL"])
        assert at.hostname is not None and at.port is not None
        made = Endpoint((at.hostname, at.port))
        made.start()
        url = f"http://{made.address[0]}:{made.address[1]}"
        patch.setenv("AWS_ENDPOINT_URL", url)
        try:
            yield made, ObjectStore({**store.env, "AWS_ENDPOINT_URL": url})
        finally:
            made.stop()


def stays_away(proxy: Endpoint, away: Away, seconds: float) -> None:
    """For so long."""
    proxy.goes(away)
    time.sleep(seconds)
    proxy.returns()
