"""Whether a cluster has room, and the wait for one that grows, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dpo_ray.config.placement import EngineNodes, TrainingNodes
from dpo_ray.errors import ConfigError
from dpo_ray.on_ray.room import Cluster, Host, Need, Nodes, await_room, lacking, require_room


def test_a_process_must_have_room_on_one_node():
    nodes = [Host({"CPU": 8.0, "memory": 1e9}), Host({"CPU": 8.0, "GPU": 2.0}), Host({"CPU": 8.0, "GPU": 2.0})]
    require_room(nodes, Need("vllm.gpus_per_actor", processes=2, cpus=8, gpus=2, beside=8))
    with pytest.raises(ConfigError, match=r"needs 1 CPUs and 4 GPUs \(vllm\.gpus_per_actor\), and no node"):
        require_room(nodes, Need("vllm.gpus_per_actor", gpus=4))
    with pytest.raises(ConfigError, match=r"no node .* larger nodes"):
        require_room(nodes, Need("train.cpus_per_worker", cpus=16))
    with pytest.raises(ConfigError, match=r"has 24 CPUs, but this needs 25 at once"):
        require_room(nodes, Need("train.num_workers", processes=24, beside=1))


CPU_NODE = Host({"CPU": 8.0, "memory": 1e9}, {"pool": "cpu", "ray.io/node-id": "a"})
GPU_NODE = Host({"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 1.0}, {"pool": "gpu", "ray.io/node-id": "b"})
ENGINES = EngineNodes(label_selector={"pool": "gpu"})


def test_a_process_must_have_room_on_a_node_with_its_labels():
    nodes = [CPU_NODE, CPU_NODE, GPU_NODE, GPU_NODE]
    require_room(nodes, Need("vllm", processes=2, cpus=8, gpus=2, beside=8, place=ENGINES))
    # Of the other nodes there are enough.
    with pytest.raises(ConfigError, match=r"nodes with pool=gpu \(placement\.engines\) have 16 CPUs, .* needs 24 at"):
        require_room(nodes, Need("vllm", processes=3, cpus=8, place=ENGINES))
    with pytest.raises(ConfigError, match=r"no node with pool=gpu \(placement\.engines\) has that many"):
        require_room(nodes, Need("vllm", cpus=9, place=ENGINES))
    with pytest.raises(ConfigError, match=r"the nodes with pool=gpu \(placement\.engines\) have room for 2"):
        require_room(nodes, Need("vllm", processes=3, cpus=5, place=ENGINES))


def test_labels_that_no_node_has_are_named_with_those_that_there_are():
    with pytest.raises(ConfigError) as refused:
        require_room([CPU_NODE, Host({"CPU": 8.0}), CPU_NODE], Need("vllm", place=ENGINES))
    assert str(refused.value) == (
        "No node of the Ray cluster has the labels that placement.engines.label_selector asks for (pool=gpu): there "
        "are 2 with pool=cpu, 1 with no labels. Start nodes with these labels (`ray start --labels`; on Kubernetes, "
        "`labels` of the worker group), or change placement.engines.label_selector."
    )


def test_custom_resources_and_accelerators_are_looked_for_among_the_nodes_with_the_labels():
    slots = Host({"CPU": 8.0, "slot": 2.0}, {"pool": "cpu"})
    place = TrainingNodes(label_selector={"pool": "cpu"}, resources={"slot": 1})
    require_room([slots, GPU_NODE], Need("train", processes=2, place=place))
    with pytest.raises(ConfigError, match=r"needs 1 CPUs and 1 slot on one node .* have room for 2"):
        require_room([slots, GPU_NODE], Need("train", processes=3, place=place))
    with pytest.raises(ConfigError) as refused:
        require_room([CPU_NODE, GPU_NODE], Need("train", place=place))
    assert "placement.training.resources asks each process for 1 slot, and no node with pool=cpu has that: " in str(
        refused.value
    )
    assert "there are 1 with none. Start nodes with it (`ray start --resources`)" in str(refused.value)
    hopper = TrainingNodes(accelerator_type="H100")
    with pytest.raises(ConfigError, match=r"accelerator_type is H100, .* there are 1 with no accelerator, 1 with L4\."):
        require_room([CPU_NODE, GPU_NODE], Need("train", place=hopper))
    require_room([CPU_NODE, GPU_NODE], Need("train", processes=2, gpus=1, place=TrainingNodes(accelerator_type="L4")))


def test_nodes_with_labels_are_asked_for_and_waited_for(capfd: pytest.CaptureFixture[str]):
    need = Need("vllm", processes=2, gpus=1, beside=1, place=EngineNodes(**ENGINES.options, resources={"slot": 0.5}))
    slots = Host({**GPU_NODE.resources, "slot": 1.0}, GPU_NODE.labels)
    growing = Growing(lambda now: [CPU_NODE, *[slots] * int(now >= 40)])
    await_room(growing.cluster, need, 15)
    assert growing.asked[0] == [{"CPU": 1, "GPU": 1, "slot": 0.5}] * 2 + [{"CPU": 1.0}]
    assert growing.labels == [[{"pool": "gpu"}, {"pool": "gpu"}, {}]] * 2 + [[]]
    assert "waiting for 3 CPUs and 2 GPUs at once on nodes with pool=gpu and 0.5 slot (vllm)" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"\(pool=gpu\): there are 1 with pool=cpu\. After 2 min.* wait longer"):
        await_room(Growing(lambda now: [CPU_NODE]).cluster, need, 2)


def test_processes_must_have_room_side_by_side():
    nodes = [Host({"CPU": 8.0}), Host({"CPU": 4.0, "GPU": 4.0})]
    assert lacking(nodes, Need("train", processes=2, cpus=2, gpus=1)) is None
    missing = lacking(nodes, Need("train", processes=3, cpus=2, gpus=1))
    assert missing and "Each of the 3 processes of this needs 2 CPUs and 1 GPUs" in missing.said
    assert "room for 2" in missing.said
    # Trials that share GPUs: no rounding of a sum of parts refuses them.
    assert lacking([Host({"CPU": 10.0, "GPU": 1.0})], Need("trials", processes=10, gpus=0.1)) is None


NEED = Need("train.num_workers", processes=2, cpus=2, gpus=1, beside=1)
HEAD = Host({"CPU": 4.0})
WORKER = Host({"CPU": 4.0, "GPU": 1.0})


class Growing:
    """A cluster whose nodes are a function of the seconds that were waited."""

    def __init__(self, after: Callable[[float], Nodes]) -> None:
        self.seconds = 0.0
        self.asked: list[list[dict[str, float]]] = []
        self.labels: list[list[dict[str, str]]] = []
        self.cluster = Cluster(lambda: after(self.seconds), self.request, lambda: self.seconds, self.pause)

    def request(self, bundles: list[dict[str, float]], label_selectors: list[dict[str, str]]) -> None:
        self.asked.append(bundles)
        self.labels.append(label_selectors)

    def pause(self, seconds: float) -> None:
        self.seconds += seconds


def test_work_begins_when_the_cluster_has_grown_and_asks_for_nothing_more(capfd: pytest.CaptureFixture[str]):
    growing = Growing(lambda now: [HEAD, *[WORKER] * (int(now >= 40) + int(now >= 90))])
    await_room(growing.cluster, NEED, 15)
    assert growing.seconds == 90
    # Again and again: another run that waited has all requests forgotten when it comes to its room.
    assert growing.asked == [[{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 1.0}]] * 3 + [[]]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4
    assert said[0] == (
        "[ray] waiting for 5 CPUs and 2 GPUs at once (train.num_workers): there are 4 CPUs and 0 GPUs on 1 nodes; 0.0 "
        "of at most 15 min (run.wait_for_resources; 0 where nothing adds nodes)"
    )
    assert "8 CPUs and 1 GPUs on 2 nodes; 1.0 of" in said[2]
    assert said[3] == "[ray] there is room after 90 s: 12 CPUs and 2 GPUs on 3 nodes"


def test_a_cluster_with_room_is_asked_for_nothing():
    growing = Growing(lambda now: [HEAD, WORKER, WORKER])
    await_room(growing.cluster, NEED, 15)
    assert (growing.seconds, growing.asked) == (0, [])


def test_after_the_time_it_says_what_came_and_what_is_missing():
    growing = Growing(lambda now: [HEAD, *[WORKER] * int(now >= 40)])
    with pytest.raises(
        ConfigError,
        match=r"has 1 GPUs, but this needs 2 .* 8 CPUs and 1 GPUs on 2 nodes, where it had 4 CPUs and 0 GPUs",
    ):
        await_room(growing.cluster, NEED, 2)
    assert growing.seconds == 120 and growing.asked[-1] == []


def test_where_nothing_is_waited_for_it_is_refused_at_once():
    growing = Growing(lambda now: [HEAD])
    with pytest.raises(ConfigError, match="has 4 CPUs, but this needs 5"):
        await_room(growing.cluster, NEED, 0)
    assert (growing.seconds, growing.asked) == (0, [])


def test_whoever_ends_the_wait_takes_the_request_back():
    def interrupt(now: float) -> Nodes:
        if now > 10:
            raise KeyboardInterrupt
        return [HEAD]

    growing = Growing(interrupt)
    with pytest.raises(KeyboardInterrupt):
        await_room(growing.cluster, NEED, 2)
    assert growing.asked[-1] == []
