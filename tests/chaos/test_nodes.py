"""A node that is lost, cut off, taken away with a warning, or whose clock is wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.cells import Cell
from tests.chaos.clock import WrongClock, wrong_clock
from tests.chaos.cluster import DRAINED, NODES, Cluster, cluster
from tests.chaos.job import Job
from tests.chaos.network import INTERFACE, cut_off_node
from tests.chaos.test_processes import STAGES
from tests.chaos.trace import Event
from tests.command_line import LONGEST

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

Cells = Callable[[str, str], Cell]
SOON = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""Of a head that gives a silent node up after some 20 s, where Ray by itself takes a minute."""


def on_a_node(event: Event) -> bool:
    return event.node in NODES


@pytest.mark.parametrize("kind", ["reference", "step"])
def test_killed_raylet(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, kind: str):
    what = cell("SIGKILL of a node's raylet", STAGES[kind])
    mine = job("train" if kind == "step" else kind)
    run = mine.start(nodes)
    victim = mine.trace.at_work(kind, run, after=14 if kind == "step" else 1, of=on_a_node)
    what.strikes()
    os.kill(nodes.raylet(victim.node), signal.SIGKILL)
    run.require_success()
    what.ends_as(undisturbed, mine, "by itself")


@pytest.mark.parametrize("kind", ["reference", "step"])
def test_killed_head(nodes: Cluster, shared, job: Callable[..., Job], cell: Cells, undisturbed: Path, kind: str):
    """With its driver; the other nodes are left to themselves, and another cluster goes on."""
    what = cell("SIGKILL of Ray's head: GCS, raylet, dashboard, driver", STAGES[kind])
    mine = job("train" if kind == "step" else kind)
    first = mine.submit(nodes)
    mine.trace.at_work(kind, first, after=14 if kind == "step" else 2)
    what.strikes()
    nodes.kill_head()
    assert first.code() != 0
    with cluster(shared.trace) as another:
        what.is_over()
        mine.submit(another).require_success()
    what.ends_as(undisturbed, mine, "submitted again to another head")


@pytest.mark.parametrize("kind", ["reference", "step"])
@pytest.mark.usefixtures("no_nodes")
def test_cut_off_node(
    job: Callable[..., Job], cell: Cells, undisturbed: Path, trace_file: Path, tmp_path: Path, kind: str
):
    """A node in a network namespace of its own, whose packets are dropped from a moment on, and let through again when
    the head has given it up. It then learns of that, ends, and another one takes its place."""
    with cut_off_node() as network:
        arguments = {
            # Without room for a worker of the training, so that the other node has one.
            "one": ([f"--node-ip-address={network.outside}", "--num-cpus=1"], ()),
            "two": ([f"--node-ip-address={network.inside}"], network.enter),
        }
        gloo = {"GLOO_SOCKET_IFNAME": INTERFACE}
        options = {"ip": network.outside, "env": gloo, "head_env": {**SOON, **gloo}, "arguments": arguments}
        with cluster(trace_file, **options) as nodes:
            what = cell("network partition of a node (namespaces)", STAGES[kind])
            mine = job("train" if kind == "step" else kind)
            run = mine.start(nodes)
            after = 14 if kind == "step" else 1
            mine.trace.at_work(kind, run, after=after, of=lambda event: event.node == "two")
            what.strikes()
            network.cut()
            nodes.await_alive(2)
            network.mend()
            what.is_over()
            nodes.nodes["two"].wait(LONGEST)
            nodes.heal()
            run.require_success()
            what.ends_as(undisturbed, mine, "by itself")


def test_spot_node(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path):
    """SIGTERM to a node, as when a spot instance is taken back: Ray tells the training, and ends the node then."""
    what = cell(f"SIGTERM of a train worker's node, which ends {DRAINED} s later", "train")
    mine = job("train")
    run = mine.start(nodes)
    victim = mine.trace.at_work("step", run, after=14, of=on_a_node)
    what.strikes()
    nodes.nodes[victim.node].terminate()
    run.require_success()
    assert "will be taken away" in run.log
    what.ends_as(undisturbed, mine, "by itself")


@pytest.mark.parametrize("jump", ["ahead", "back"])
@pytest.mark.usefixtures("no_nodes")
def test_clock_jumps(
    job: Callable[..., Job], cell: Cells, undisturbed: Path, trace_file: Path, tmp_path: Path, jump: str
):
    """The clock of the driver and of both nodes beside the head jumps by an hour while they train."""
    clock: WrongClock = wrong_clock(tmp_path / "clock")
    with cluster(trace_file, env=clock.env) as nodes:
        what = cell(f"the clocks of driver and nodes jump an hour {jump}", "train")
        mine = job("train", env=clock.env)
        run = mine.start(nodes)
        mine.trace.at_work("step", run, after=14)
        what.strikes()
        clock.set(3600 if jump == "ahead" else -3600)
        run.require_success()
        what.ends_as(undisturbed, mine, "by itself")
