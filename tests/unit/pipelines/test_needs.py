"""What a configuration needs is known before its first stage begins."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.on_ray.room import Host
from pipelines import planned
from pipelines.needs import needs, require_room_for_all

GPUS = {
    "reference": {"engine": "vllm"},
    "vllm": {"gpus_per_actor": 4, "cpus_per_actor": 6},
    "train": {"use_gpu": True, "num_workers": 8, "min_workers": 2, "cpus_per_worker": 3},
}


def config(run: dict[str, Any] | None = None, **more: Any) -> Config:
    tree = {"run": {"name": "n", "output": "o", **(run or {})}, "model": {"path": "m"}, "data": {"train": "x"}}
    return parse_config(tree | more)


def test_each_stage_needs_what_it_asks_for():
    found = {}
    for stage, need in needs(config(**GPUS), planned(config(**GPUS), "publish")):
        found.setdefault(stage, []).append((need.processes, need.cpus, need.gpus, need.beside))
    scorer = (1, 3, 1, 1)
    assert found == {
        "ingest": [(1, 1, 0, 1), (1, 1, 0, 1)],
        "tokenize": [(1, 1, 0, 1)],
        "reference": [(1, 6, 4, 1), scorer],
        "train": [(2, 3, 1, 0)],
        "evaluate": [scorer],
    }


def test_rewards_and_samples_need_their_engines():
    reward = [
        {"type": "rule", "function": "dpo_ray.rewards:exact"},
        {"type": "judge", "path": "j"},
        {"type": "judge", "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "j"}, "name": "far"},
    ]
    more = {**GPUS, "data": {}, "generate": {"prompts": "p", "reward": reward[:1]}}
    sampled = [need.gpus for stage, need in needs(config(**more), ["generate"])]
    assert sampled == [4, 0, 0]
    tuned = config(**GPUS, tune={"beta": [0.1, 0.2], "max_concurrent_trials": 3})
    [(_, trials)] = needs(tuned, ["sweep"])
    assert (trials.processes, trials.all_gpus) == (24, 24)


PLACEMENT = {
    "data": {"label_selector": {"pool": "cpu"}},
    "engines": {"label_selector": {"pool": "gpu"}},
    "training": {"label_selector": {"pool": "in(gpu, big)"}, "accelerator_type": "H100"},
}


def test_each_stage_needs_its_nodes():
    reward = [
        {"type": "rule", "function": "dpo_ray.rewards:exact"},
        {"type": "judge", "model": "j"},
        {"type": "judge", "endpoint": {"base_url": "http://127.0.0.1:1/v1", "model": "j"}, "name": "far"},
        {"type": "implicit", "policy": "p"},
    ]
    placed = config(**GPUS, placement=PLACEMENT)
    keys: dict[str, list[str]] = {}
    for stage, need in needs(placed, planned(placed, "publish")):
        keys.setdefault(stage, []).append(need.place.key.removeprefix("placement."))
    assert keys == {
        "ingest": ["data", "data"],
        "tokenize": ["data"],
        "reference": ["engines", "training"],
        "train": ["training"],
        "evaluate": ["training"],
    }
    samples = {**GPUS, "data": {}, "generate": {"prompts": "p", "reward": reward}, "placement": PLACEMENT}
    sampled = [need.place.key.removeprefix("placement.") for _, need in needs(config(**samples), ["generate"])]
    assert sampled == ["engines", "data", "data", "engines", "data", "training"]
    tuned = config(**GPUS, tune={"beta": [0.1, 0.2]}, placement=PLACEMENT)
    [(_, trials)] = needs(tuned, ["sweep"])
    assert trials.place == placed.placement.training


def test_labels_that_no_node_has_are_named_with_their_stages_before_the_first_begins():
    small = [Host({"CPU": 16.0}, {"pool": "cpu"}), Host({"CPU": 16.0, "GPU": 8.0}, {"pool": "gpus"})]
    placed = config({"wait_for_resources": 0}, **GPUS, placement=PLACEMENT)
    with pytest.raises(ConfigError) as error:
        require_room_for_all(placed, planned(placed, "publish"), small)
    said = str(error.value)
    assert (
        "reference: No node of the Ray cluster has the labels that placement.engines.label_selector asks for "
        "(pool=gpu): there are 1 with pool=cpu, 1 with pool=gpus." in said
    )
    assert "reference, train, evaluate: No node of the Ray cluster has the labels that placement.training" in said
    assert "change placement.engines.label_selector." in said and "wait_for_resources" in said
    assert "ingest" not in said


def test_a_cluster_that_does_not_grow_is_refused_with_all_that_has_no_room():
    small = [Host({"CPU": 16.0, "GPU": 1.0})]
    with pytest.raises(ConfigError) as error:
        require_room_for_all(config({"wait_for_resources": 0}, **GPUS), ["ingest", "reference", "train"], small)
    said = str(error.value)
    assert "reference: The Ray cluster has 1 GPUs, but this needs 4" in said
    assert "train: The Ray cluster has 1 GPUs, but this needs 2" in said
    assert "ingest" not in said


def test_one_that_may_grow_is_told_what_will_be_asked_for(capfd: pytest.CaptureFixture[str]):
    require_room_for_all(config(**GPUS), ["ingest", "train"], [Host({"CPU": 16.0})])
    said = capfd.readouterr().err
    assert "train: The Ray cluster has 0 GPUs, but this needs 2 at once" in said
    assert "waits up to 15 minutes (run.wait_for_resources)" in said
    require_room_for_all(config(), ["ingest", "train"], [Host({"CPU": 16.0})])
    assert capfd.readouterr().err == ""
