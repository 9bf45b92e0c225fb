"""An S3 endpoint on this machine: moto's server as a process of its own, with one bucket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from dpo_ray.storage import location as storage
from tests.command_line import LONGEST

BUCKET = "bucket"

_SERVER = """
import threading
from moto.s3.responses import S3Response
from moto.server import main
put, lock = S3Response.put_object, threading.RLock()
def put_object(self):
    with lock:
        return put(self)
S3Response.put_object = put_object
if CONDITIONAL:
    main()
else:
    from moto.server import DomainDispatcherApplication
    serve = DomainDispatcherApplication.__call__
    def without_conditions(self, environ, start_response):
        for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
            environ.pop(name, None)
        return serve(self, environ, start_response)
    DomainDispatcherApplication.__call__ = without_conditions
    main()
"""
"""moto's server looks at If-Match and If-None-Match and then writes, in several threads: here nobody comes between."""


@dataclass(frozen=True)
class ObjectStore:
    """The endpoint, and what a process has to have in its environment to use it."""

    env: dict[str, str]

    def client(self) -> Any:
        """boto3's view of it: what there is, whatever the code under test makes of it."""
        return boto3.client("s3", endpoint_url=self.env["AWS_ENDPOINT_URL"])

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects but the empty ones that stand for folders."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [o["Key"] for page in pages for o in page.get("Contents", []) if not o["Key"].endswith("/")]


@contextmanager
def object_store(*, conditional: bool = True, knows_keys: bool = True) -> Iterator[ObjectStore]:
    """Start the endpoint on a free port, point this process's environment at it, and stop it at the end.

    Args:
        conditional: whether it heeds the conditions of conditional writes.
        knows_keys: whether it lets anybody in whatever the credentials are; otherwise, once the bucket is made, nobody.
    """
    with tempfile.TemporaryFile("w+") as log, pytest.MonkeyPatch.context() as patch:
        command = [sys.executable, "-c", f"CONDITIONAL = {conditional}\n{_SERVER}", "-H", "127.0.0.1", "-p", "0"]
        login = {} if knows_keys else {"INITIAL_NO_AUTH_ACTION_COUNT": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **login})
        try:
            env = {
                "AWS_ENDPOINT_URL": _address(process, log),
                "AWS_ACCESS_KEY_ID": "someone",
                "AWS_SECRET_ACCESS_KEY": "not-to-be-logged",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "NO_PROXY": "127.0.0.1",
            }
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            storage._filesystem.cache_clear()  # the one of another endpoint
            store = ObjectStore(env)
            store.client().create_bucket(Bucket=BUCKET)
            yield store
        finally:
            storage._filesystem.cache_clear()
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen, log: Any) -> str:
    for _ in range(int(10 * LONGEST)):
        log.seek(0)
        if found := re.search(r"http://127\.0\.0\.1:\d+", text := log.read()):
            return found[0]
        assert process.poll() is None, f"moto's server ended:\n{text}"
        time.sleep(0.1)
    raise AssertionError(f"moto's server did not start within {LONGEST:g} seconds:\n{text}")


def upload(folder: Path, prefix: str) -> str:
    """Put the files of a local folder there. Returns the URI of the folder that they make."""
    place = storage.Location.of(f"s3://{BUCKET}/{prefix}")
    for file in sorted(folder.iterdir()):
        storage.Location.of(file).copy_to(place / file.name)
    return place.uri
