"""Data sets of the hub, on a server of this machine's that answers as the hub does: asked, downloaded, and offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dpo_ray.errors import DataError
from dpo_ray.storage.hub import HubPath, is_hub_place
from tests.command_line import LONGEST

COMMIT = "c0ffee" * 6 + "beef"
ROOT = Path(__file__).parents[3]
TRANSCRIPT = "\n\nHuman: Why?\n\nAssistant: {}"
FILES = {
    "README.md": b"# A card",
    "data/train.jsonl": json.dumps({"chosen": TRANSCRIPT.format("So."), "rejected": TRANSCRIPT.format("No.")}).encode(),
    "data/test.json": json.dumps([{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]).encode(),
    "_data/hidden.jsonl": b"{}",
}


class Hub:
    """One data set, org/name."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                if self.path.split("?")[0] in {"/api/datasets/org/name", f"/api/datasets/org/name/revision/{COMMIT}"}:
                    siblings = [{"rfilename": name} for name in FILES]
                    info = {"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                    self.answer(json.dumps(info).encode())
                    return
                self.do_HEAD()

            def do_HEAD(self) -> None:
                data = FILES.get(self.path.removeprefix(f"/datasets/org/name/resolve/{COMMIT}/"))
                if data is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.answer(data)

            def answer(self, data: bytes) -> None:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.close()


def told(source: str, home: Path, endpoint: str, *, offline: bool = False) -> tuple[int, str, str]:
    """What `dpo-ray data` says of a source: exit code, output, errors."""
    return python(["-m", "pipelines.cli", "data", source, "--json"], home, endpoint, offline=offline)


def python(arguments: list[str], home: Path, endpoint: str, *, offline: bool = False) -> tuple[int, str, str]:
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=home, env=environment, capture_output=True, text=True, timeout=LONGEST
    )
    return done.returncode, done.stdout, done.stderr


def test_a_data_set_is_taken_by_its_name_downloaded_once_and_taken_again_without_the_hub(hub: Hub, tmp_path: Path):
    code, said, errors = told("org/name", tmp_path, hub.url)
    assert code == 0, errors
    [sheet] = json.loads(said)
    assert sheet["files"] == [f"hf://datasets/org/name@{COMMIT}/data/train.jsonl"]
    assert (sheet["format"], sheet["rows"], sheet["examples"][0]["messages"]["chosen"]) == ("hh_rlhf", 1, "So.")
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert fetched == [f"/datasets/org/name/resolve/{COMMIT}/data/train.jsonl"]
    hub.close()
    assert told("org/name", tmp_path, hub.url, offline=True)[1] == said
    assert told(f"hf://datasets/org/name@{COMMIT}/data/*.jsonl", tmp_path, hub.url, offline=True)[1] == said


SCAN = """
import json
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.read import read_rows
from dpo_ray.data.raw.scan import scan
from dpo_ray.storage.location import Location, find_files

[file] = find_files("org/name", ".jsonl")
record = scan(Stamp.of(file), 1, Location.of("files"))
rows = [row for _, source in record.sources(Location.of("files")) for row in read_rows(source)]
print(json.dumps([record.uri, record.mtime_ns, record.sha256, rows]))
"""


def test_a_file_of_the_hub_is_scanned_and_read_in_parts_on_a_node_that_fetches_it_itself(hub: Hub, tmp_path: Path):
    said = []
    for node in ("one", "other"):
        (tmp_path / node).mkdir()
        code, output, errors = python(["-c", SCAN], tmp_path / node, hub.url)
        assert code == 0, errors
        said.append(json.loads(output))
    data = FILES["data/train.jsonl"]
    uri, sha256 = f"hf://datasets/org/name@{COMMIT}/data/train.jsonl", hashlib.sha256(data).hexdigest()
    # Without a time, which each node's copy has of its own.
    assert said == [[uri, None, sha256, [[1, json.loads(data)]]]] * 2


def test_a_file_of_a_data_set_is_named_by_its_path(hub: Hub, tmp_path: Path):
    code, said, errors = told("hf://datasets/org/name/data/test.json", tmp_path, hub.url)
    assert code == 0, errors
    [sheet] = json.loads(said)
    assert (sheet["format"], sheet["files"]) == ("paired", [f"hf://datasets/org/name@{COMMIT}/data/test.json"])


def test_what_neither_the_hub_nor_this_machine_has_is_an_error_that_names_both_ways(hub: Hub, tmp_path: Path):
    for source, offline in (("org/another", False), ("org/name", True), ("hf://datasets/org/another", False)):
        code, _, errors = told(source, tmp_path, hub.url, offline=offline)
        assert code == 3 and "is no file or folder here, and as a data set the hub did not give it (" in errors
        assert "Check the path; or the name, the network and the access rights" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("hf://datasets/org/name", HubPath("org/name", None, "")),
        ("org/name@v1.0", HubPath("org/name", "v1.0", "")),
        ("hf://datasets/org/name@main/data/*.parquet", HubPath("org/name", "main", "data/*.parquet")),
        (
            "hf://datasets/org/name@refs/convert/parquet/a/b.parquet",
            HubPath("org/name", "refs/convert/parquet", "a/b.parquet"),
        ),
        ("hf://datasets/org/name@refs%2Fpr%2F1/a", HubPath("org/name", "refs/pr/1", "a")),
    ],
)
def test_a_place_on_the_hub_is_read_and_written_alike(place: str, expected: HubPath):
    assert HubPath.of(place) == expected
    assert HubPath.of(expected.uri(COMMIT, "a/b.parquet")) == HubPath("org/name", COMMIT, "a/b.parquet")


def test_what_is_spelled_wrong_says_how_to_spell_it():
    with pytest.raises(DataError, match="Spell it hf://datasets/owner/name"):
        HubPath.of("hf://org/name/data")


def test_a_name_is_looked_up_where_no_such_folder_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_place("org/name") and is_hub_place("org/name@main") and is_hub_place("hf://datasets/org/name")
    for local in (
        "/org/name",
        "./org/name",
        "~/name",
        "data",
        "a/b/c",
        "data/*.parquet",
        "s3://bucket/name",
        "../name",
        "data/train.csv.gz",
    ):
        assert not is_hub_place(local)
    (tmp_path / "org/name").mkdir(parents=True)
    assert not is_hub_place("org/name")
