"""What all faults share: the undisturbed run, a cluster that is healed between them, and the table at the end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.storage.location import Location
from tests.chaos import cells
from tests.chaos.cells import Cell, kept_cells, written
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.job import Job, copy_before, write_pairs
from tests.chaos.running import Running
from tests.chaos.trace import Trace

_RESULTS = pytest.StashKey[dict[str, str]]()
_MADE: list[Cell] = []


class SharedCluster:
    """Started when a fault asks for it, healed for the next one, ended for those that bring their own."""

    def __init__(self, trace: Path):
        self.trace, self.stack = trace, ExitStack()
        self.made: Cluster | None = None

    def get(self) -> Cluster:
        if self.made is not None and self.made.head.process.poll() is not None:
            self.end()
        if self.made is None:
            self.made = self.stack.enter_context(cluster(self.trace))
        self.made.heal()
        return self.made

    def end(self) -> None:
        self.made = None
        self.stack.close()


@pytest.fixture(scope="session")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos") / "trace.jsonl"


@pytest.fixture(scope="session")
def shared(trace_file: Path, home: Path) -> Iterator[SharedCluster]:
    made = SharedCluster(trace_file)
    yield made
    made.end()


@pytest.fixture
def nodes(shared: SharedCluster) -> Cluster:
    """A head and two nodes, all alive."""
    return shared.get()


@pytest.fixture
def no_nodes(shared: SharedCluster) -> None:
    """Of others, where a fault brings its own."""
    shared.end()


@pytest.fixture(scope="session")
def kept(tiny_model: Path) -> Path:
    """The folder of what is made once for the code as it is, with the model and the data of all runs."""
    folder = cells.folder()
    if not (folder / "data").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model, folder / "model")
        write_pairs(folder / "data" / "pairs.jsonl")
    return folder


@pytest.fixture(scope="session")
def new_job(kept: Path, trace_file: Path) -> Callable[..., Job]:
    """new_job(output) → the job over it, whose trace begins now."""

    def make(output: Path | str, **more: Any) -> Job:
        trace = Trace(trace_file, time.monotonic())
        options = {"data": str(kept / "data" / "*.jsonl"), "model": str(kept / "model"), **more}
        return Job(Location.of(output), trace=trace, **options)

    return make


@pytest.fixture(scope="session")
def undisturbed(kept: Path, new_job: Callable[..., Job], shared: SharedCluster) -> Path:
    """The output folder of a run that nothing happened to."""
    folder = kept / "undisturbed"
    if not (folder / "models").exists():
        shutil.rmtree(folder, ignore_errors=True)
        new_job(folder).start(shared.get(), "--run-id", "undisturbed").require_success()
    return folder


@pytest.fixture(autouse=True)
def nothing_goes_on(trace_file: Path, shared: SharedCluster) -> Iterator[None]:
    """What a test has started ends with it: the next one counts what it sees done as its own."""
    trace = Trace(trace_file, time.monotonic())
    yield
    for run in Running.started:
        if not run.has_ended():
            run.kill()
    Running.started.clear()
    for driver in shared.made.drivers_of_jobs() if shared.made is not None else []:
        os.kill(driver, signal.SIGKILL)
    trace.until_quiet()


@pytest.fixture
def job(undisturbed: Path, new_job: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """job(kind) → the job over an output folder that holds what the undisturbed run made before artifacts of a kind;
    before the publication: job(None)."""

    def make(kind: str | None, output: Path | str | None = None, **more: Any) -> Job:
        place = output or tmp_path / "out"
        copy_before(kind, undisturbed, Location.of(place))
        return new_job(place, **more)

    return make


@pytest.fixture
def cell(request: pytest.FixtureRequest, kept: Path) -> Iterator[Callable[[str, str], Cell]]:
    """cell(fault, stage) → what is recorded of it, whether the test passes or fails."""
    made: list[Cell] = []

    def make(fault: str, stage: str) -> Cell:
        made.append(Cell(fault, stage, request.node.name))
        return made[-1]

    yield make
    for one in made:
        one.failed = request.node.stash.get(_RESULTS, {}).get("call")
        if one.failed is None and not one.recovered:  # broken off by Ctrl-C: neither passed nor failed
            continue
        one.keep(kept / "cells")
        _MADE.append(one)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" and report.failed and call.excinfo is not None:
        item.stash.setdefault(_RESULTS, {})["call"] = call.excinfo.exconly()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _MADE:
        return
    folder = cells.folder() / "cells"
    text = written(kept_cells(folder))
    terminalreporter.section("faults, these and those of earlier sessions with the same code")
    terminalreporter.write_line(text)
    if os.environ.get("CHAOS_WRITE"):
        before = cells.TABLE.read_text().partition("\n## ")[0].rstrip()
        cells.TABLE.write_text(f"{before}\n\n{text}")
