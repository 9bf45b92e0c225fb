"""Prometheus and promtool, where they are: on PATH, or in the folder that DPO_RAY_PROMETHEUS names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import LONGEST
from tests.ray_head import free_ports

OBSERVABILITY = Path(__file__).parent.parent / "cluster" / "manifests" / "observability"
ALERTS = OBSERVABILITY / "alerts.yaml"


def program(name: str) -> str:
    """Path of prometheus or promtool; skips the test where there is none."""
    folder = os.environ.get("DPO_RAY_PROMETHEUS")
    found = shutil.which(name, path=folder)
    if found is None and folder:
        pytest.fail(f"DPO_RAY_PROMETHEUS is {folder}, and there is no {name} in that folder")
    if found is None:
        pytest.skip(f"there is no {name} here: apt-get install prometheus, or set DPO_RAY_PROMETHEUS to its folder")
    return found


def rules() -> list[dict[str, Any]]:
    """The alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((OBSERVABILITY / "dashboard.json").read_text())


def panels() -> list[dict[str, Any]]:
    """Those of the dashboard that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def shown() -> dict[str, str]:
    """Title of a panel → its expression, as Grafana sends it with all runs chosen."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", ".*").replace("$__rate_interval", "10s")
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


def selectors(expression: str) -> set[str]:
    """The metrics that an expression asks for, each with its labels."""
    return set(re.findall(r"\b(?:ray_\w+|up)\b(?:\{[^}]*\})?", expression))


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    address: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer. Raises AssertionError with Prometheus' own words where it refuses."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def over(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """The series of an expression in that time, a value a second."""
        found: list[dict[str, Any]] = self.ask("query_range", query=expression, start=start, end=end, step=1)["result"]
        return found

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """Until an expression has a value."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
            if found:
                return found
            time.sleep(1)
        raise AssertionError(f"{expression} had no value within {LONGEST:g} seconds")


@contextmanager
def prometheus(targets: Path) -> Iterator[Prometheus]:
    """Start it with the configuration and the rules that an operator has, but for an interval of a second.

    Args:
        targets: the file in which Ray names its nodes.
    """
    [port] = free_ports(1)
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(OBSERVABILITY / name) for name in config["rule_files"]]
    [scrape] = config["scrape_configs"]
    [discovery] = scrape["file_sd_configs"]
    assert discovery["files"] == [f"/tmp/ray/{targets.name}"]
    discovery |= {"files": [str(targets)], "refresh_interval": "1s"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [
            program("prometheus"),
            f"--config.file={file}",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                _wait(f"http://127.0.0.1:{port}/-/ready", process, Path(folder) / "log")
                yield Prometheus(f"http://127.0.0.1:{port}")
            finally:
                process.terminate()
                process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer at {url} within {LONGEST:g} seconds")
