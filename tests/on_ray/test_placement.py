"""A head and two workers with labels: each stage's tasks and actors are on the nodes that were chosen for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CONFIGS, LONGEST, Finished, dpo_ray, overrides
from tests.on_ray.test_main_job import SMALL_TRAINING, preference_rows
from tests.ray_head import RayHead, ray_head

pytestmark = pytest.mark.ray

PLACEMENT = {
    "data": {"label_selector": {"pool": "cpu"}},
    "engines": {"label_selector": {"pool": "!in(cpu, spot)", "zone": "a"}},
    "training": {"label_selector": {"pool": "in(gpu, big)"}, "resources": {"slot": 0.5}},
}
DATA = {"MapBatches(_scan_batch)", "MapBatches(write_shards)"}
WORKER = "MapWorker(MapBatches(ShardWorker))"
SLOTS = '--resources={"slot": 2}'
TRAINING = {"MapBatches(fetch_stretch)", "RayTrainWorker", "_score_by_trainer"}


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=1) as head, ExitStack() as nodes:
        for pool, *arguments in (("cpu", "--labels=pool=cpu"), ("gpu", "--labels=pool=gpu,zone=a", SLOTS)):
            nodes.enter_context(head.node(*arguments))
            _wait_for(head, pool)  # for runs that do not wait for nodes
        yield head


@pytest.fixture(scope="module")
def run(head: RayHead, tmp_path_factory, tiny_model: Path, write_preferences) -> Callable[..., Finished]:
    """A command on that cluster."""
    folder = tmp_path_factory.mktemp("job")
    write_preferences(folder / "data", preference_rows(0, 24))

    def run(command: str, **more: Any) -> Finished:
        values = {
            "run__wait_for_resources": 0,
            "run__output": str(folder / "out"),
            "model__path": str(tiny_model),
            "data__train": str(folder / "data"),
            "data__held_out_fraction": 0.25,
            "data__rows_per_shard": 6,
            "reference__engine": "torch",
            "reference__calibration_pairs": 2,
            "train__global_batch_size": 8,
            "publish__gate__accuracy_above": None,
            **SMALL_TRAINING,
            **more,
        }
        return dpo_ray(command, str(CONFIGS / "align_cpu.yaml"), *overrides(**values), env=head.env)

    return run


def listed(head: RayHead, kind: str) -> list[dict[str, Any]]:
    """All nodes, tasks or actors that Ray's state API knows, also those that have ended."""
    with urllib.request.urlopen(f"{head.dashboard}/api/v0/{kind}?limit=10000&detail=1", timeout=60) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return found


def pools(head: RayHead) -> dict[str, str]:
    """Node → its pool."""
    return {node["node_id"]: (node["labels"] or {}).get("pool", "none") for node in listed(head, "nodes")}


def _wait_for(head: RayHead, pool: str) -> None:
    deadline = time.monotonic() + LONGEST
    while pool not in pools(head).values():
        assert time.monotonic() < deadline, f"no node of the pool {pool}"
        time.sleep(1)


def seen(head: RayHead) -> dict[str, set[str]]:
    """Name of a task or class of an actor → the pools of the nodes that had one."""
    of, found = pools(head), defaultdict(set)
    for kind, name in (("tasks", "name"), ("actors", "class_name")):
        for one in listed(head, kind):
            if one["node_id"]:
                found[one[name]].add(of[one["node_id"]])
    return found


def test_labels_that_no_node_has_are_refused_at_once_or_after_the_wait(run: Callable[..., Finished]):
    nowhere = {**PLACEMENT, "training": {"label_selector": {"pool": "tpu"}}}
    refused = run("run", placement=nowhere, run__wait_for_resources=0)
    assert refused.code == 2, refused.log
    said = "No node of the Ray cluster has the labels that placement.training.label_selector asks for (pool=tpu)"
    assert f"reference, train, evaluate: {said}" in refused.log
    for other in ("1 with pool=cpu", "1 with no labels", "1 with pool=gpu and zone=a", "`ray start --labels`"):
        assert other in refused.log
    waited = run("ingest", placement={"data": {"label_selector": {"pool": "tpu"}}}, run__wait_for_resources=0.05)
    assert waited.code == 2, waited.log
    assert waited.lines("[ray] waiting for 2 CPUs at once on nodes with pool=tpu")
    assert "After 0.05 minutes" in waited.log and "change placement.data.label_selector" in waited.log


def test_without_a_cluster_there_are_no_nodes_to_choose_from(run: Callable[..., Finished], monkeypatch):
    monkeypatch.setattr(RayHead, "env", {"RAY_ADDRESS": ""})
    refused = run("ingest", placement=PLACEMENT)
    assert refused.code == 2, refused.log
    assert "placement.data (pool=cpu) and placement.engines (pool=!in(cpu,spot) and zone=a)" in refused.log
    assert "RAY_ADDRESS names none" in refused.log and "-o 'placement={}'" in refused.log


def test_an_engine_is_on_its_node_and_ray_reads_selectors_as_we_do(head: RayHead):
    script = f"""
    import ray
    from dpo_ray.config import NodeChoice, parse_config
    from dpo_ray.on_ray.engine_choice import alone
    from dpo_ray.on_ray.session import join
    from dpo_ray.on_ray.vllm_engine import vllm_pool

    def pool_here():
        here = ray.get_runtime_context().get_node_id()
        return next(node["Labels"].get("pool", "none") for node in ray.nodes() if node["NodeID"] == here)

    tree = {{"run": {{"name": "n", "output": "o"}}, "model": {{"path": "m"}}, "data": {{"train": "x"}}}}
    join()
    print("engine on", alone(vllm_pool(parse_config({{**tree, "placement": {PLACEMENT!r}}}), pool_here, {{}})))
    for selector in ("cpu", "!cpu", "in(cpu)", "in(other, gpu)", "!in(gpu, cpu)", "!in(other,gpu)"):
        chosen = NodeChoice(label_selector={{"pool": selector}})
        ours = {{node["Labels"].get("pool", "none") for node in ray.nodes() if chosen.admits(node["Labels"])}}
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", **chosen.options)(pool_here)
        theirs = set(ray.get([task.remote() for _ in range(12)]))
        print(selector, "agrees" if theirs and theirs <= ours else f"ours {{ours}}, theirs {{theirs}}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **head.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stdout
    assert "engine on gpu" in done.stdout
    assert done.stdout.count("agrees") == 6, done.stdout


@pytest.mark.long
def test_stages_are_on_their_nodes_and_what_is_made_is_the_same(run: Callable[..., Finished], head: RayHead):
    rows = run("tokenize", placement=PLACEMENT)
    assert rows.code == 0, rows.log
    found = seen(head)
    assert {name: found[name] for name in DATA | {WORKER}} == {name: {"cpu"} for name in DATA | {WORKER}}
    whole = run("run", placement=PLACEMENT)
    assert whole.code == 0, whole.log
    found = seen(head)
    assert {name: found[name] for name in DATA} == {name: {"cpu"} for name in DATA}
    assert {name: found[name] for name in TRAINING} == {name: {"gpu"} for name in TRAINING}
    assert found[WORKER] == {"cpu", "gpu"}  # of tokenization, and of the trainer's forward
    # Where something is computed is no part of what it is known by.
    anywhere = run("train")
    assert anywhere.code == 0, anywhere.log
    assert anywhere.lines("Stages: 8, of which 8 were finished already"), anywhere.log
