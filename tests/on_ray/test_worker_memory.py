"""Which nodes are asked for the memory of a training worker, and that the least of them counts."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Train
from dpo_ray.config.placement import ANYWHERE, TrainingNodes
from dpo_ray.on_ray.worker_memory import (
    least_memory,
    may_hold_a_worker,
    node_name,
    some_of_each_kind,
    what_was_found,
    workers_beside,
)
from dpo_ray.training.memory import worker_memory

GIB = 2**30


def node(
    number: int, *, alive: bool = True, labels: dict[str, str] | None = None, **resources: float
) -> dict[str, Any]:
    named = {name.replace("__", ":"): value for name, value in resources.items()}
    return {
        "NodeID": f"{number:056x}"[::-1],
        "NodeManagerAddress": "10.0.0.1",
        "Alive": alive,
        "Resources": named,
        "Labels": labels or {},
    }


def test_only_nodes_that_can_hold_a_worker_are_asked():
    nodes = [node(1, CPU=4), node(2, CPU=8, GPU=1), node(3, CPU=1, GPU=8), node(4, CPU=8, GPU=2, alive=False), node(5)]
    options = Train(use_gpu=True, cpus_per_worker=2)
    assert may_hold_a_worker(nodes, options, ANYWHERE) == [nodes[1]]
    assert may_hold_a_worker(nodes, Train(cpus_per_worker=2), ANYWHERE) == nodes[:2]
    assert may_hold_a_worker(nodes, Train(use_gpu=True, gpus_per_worker=0.5), ANYWHERE) == [nodes[1], nodes[2]]


def test_only_nodes_of_the_chosen_kind_are_asked():
    nodes = [node(1, CPU=4, labels={"pool": "cpu"}), node(2, CPU=4, labels={"pool": "gpu"}), node(3, CPU=4, slot=1)]
    assert may_hold_a_worker(nodes, Train(), TrainingNodes(label_selector={"pool": "gpu"})) == [nodes[1]]
    assert may_hold_a_worker(nodes, Train(), TrainingNodes(label_selector={"pool": "!gpu"})) == [nodes[0], nodes[2]]
    assert may_hold_a_worker(nodes, Train(), TrainingNodes(resources={"slot": 1})) == [nodes[2]]


@pytest.mark.parametrize("most", [1, 3, 64])
def test_of_a_large_cluster_every_kind_is_among_those_asked(most: int):
    many = [node(n, CPU=8, GPU=8, accelerator_type__H100=1, memory=100 * GIB + n) for n in range(200)]
    other = [node(200, CPU=8, GPU=8, accelerator_type__A100=1), node(201, CPU=8, GPU=4, accelerator_type__H100=1)]
    asked = some_of_each_kind(many + other, most)
    assert len(asked) == most
    assert len({n["NodeID"] for n in asked}) == most
    if most >= 3:
        assert all(one in asked for one in other)
    assert some_of_each_kind((many + other)[::-1], most) == asked


def test_workers_share_the_memory_of_their_node_and_no_other():
    assert workers_beside(node(1, CPU=8), Train(num_workers=4, cpus_per_worker=2)) == 4
    assert workers_beside(node(1, CPU=4), Train(num_workers=4, cpus_per_worker=2)) == 2
    assert workers_beside(node(1, CPU=4), Train(num_workers=4, min_workers=1, cpus_per_worker=1)) == 4


def test_what_differs_and_what_was_not_asked_is_told():
    assert what_was_found({"a": 80 * GIB, "b": 80 * GIB + 1000}, [], 2, 2) == []
    [line] = what_was_found({"a": 80 * GIB, "b": 40 * GIB, "c": 80 * GIB}, [], 3, 3)
    assert "40.0 GiB on node b" in line and "80.0 GiB on others" in line
    few, busy = what_was_found({"a": 80 * GIB}, ["b", "c"], 3, 200)
    assert few.startswith("3 of the 200 nodes")
    assert busy.startswith("2 nodes did not tell") and busy.endswith("the first: b")


@pytest.mark.ray
@pytest.mark.usefixtures("no_ray")
def test_of_two_nodes_the_one_with_less_memory_for_a_worker_counts(capfd: pytest.CaptureFixture[str]):
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        shared = made.add_node(num_cpus=3)
        ray.init(address=made.address)
        found = least_memory(Train(num_workers=3), ANYWHERE)
        names = {n["NodeID"]: node_name(n) for n in ray.nodes()}
    finally:
        ray.shutdown()
        made.shutdown()
    assert found == worker_memory(3, 0.0)
    assert f"on node {names[shared.node_id]}" in capfd.readouterr().err
