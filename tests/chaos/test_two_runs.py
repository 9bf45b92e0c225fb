"""Two commands over one output folder, with clocks that agree and with clocks that do not."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.cells import Cell
from tests.chaos.clock import wrong_clock
from tests.chaos.cluster import Cluster
from tests.chaos.job import Job
from tests.command_line import DPO_RAY, LONGEST

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

Cells = Callable[[str, str], Cell]


def test_two_runs_at_once(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path):
    """Both from the raw rows on: each makes what the other has not finished, one trains, both end well."""
    what = cell("a second run of the same at the same time", "all")
    mine = job("pairs")
    first = mine.start(nodes, "--run-id", "first")
    mine.trace.at_work("pairs", first, after=1)
    what.strikes()
    second = mine.start(nodes, "--run-id", "second")
    first.require_success()
    second.require_success()
    what.ends_as(undisturbed, mine, "by itself")


def test_second_run_an_hour_ahead(
    nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, tmp_path: Path
):
    """By its clock the first run has given no sign for an hour: it waits all the same."""
    clock = wrong_clock(tmp_path / "clock", 3600)
    what = cell("a second run, whose clock is an hour ahead", "train")
    mine = job("train")
    first = mine.start(nodes, "--run-id", "first")
    mine.trace.at_work("step", first, after=8)
    what.strikes()
    second = mine.start(nodes, "--run-id", "second", env=clock.env)
    second.until(r"the work of run first by .*: waiting until it has ended")
    first.require_success()
    second.require_success()
    assert "taken over" not in second.log
    what.ends_as(undisturbed, mine, "by itself")


def test_gc_a_month_ahead(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, tmp_path: Path):
    """Garbage is collected again and again, by a machine to which all files are a month old."""
    clock = wrong_clock(tmp_path / "clock", 31 * 86400)
    what = cell("gc beside it, by a clock that is a month ahead", "all")
    mine = job("pairs")
    run = mine.start(nodes)
    mine.trace.at_work("pairs", run, after=1)
    what.strikes()
    env, collected = {**os.environ, **clock.env}, 0
    while not run.has_ended():
        command = [DPO_RAY, "gc", mine.output.uri, "--delete"]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=LONGEST)
        collected += 1
        time.sleep(2)
    run.require_success()
    assert collected > 2
    what.ends_as(undisturbed, mine, "by itself")
