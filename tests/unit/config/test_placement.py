"""Which nodes a placement chooses, and what is refused because Ray would not understand it."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.config.placement import ANYWHERE, EngineNodes, NodeChoice, Placement
from dpo_ray.errors import ConfigError


def config(**placement: Any) -> Config:
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "x"}}
    return parse_config({**tree, "placement": placement})


def test_left_out_it_chooses_nothing_and_ray_is_given_nothing():
    assert config().placement == Placement()
    assert all(chosen.options == {} and chosen.admits({}) for _, chosen in config().placement)
    assert ANYWHERE.taken == {}


@pytest.mark.parametrize(
    ("selector", "taken", "refused"),
    [
        ("gpu", ["gpu"], ["cpu", None]),
        ("!gpu", ["cpu", None], ["gpu"]),
        ("in(gpu, big)", ["gpu", "big"], ["cpu", None]),
        ("in(gpu)", ["gpu"], ["gpus", None]),
        ("!in(gpu,big)", ["cpu", None], ["gpu", "big"]),
    ],
)
def test_a_selector_takes_the_nodes_that_it_takes_for_ray(
    selector: str, taken: list[str | None], refused: list[str | None]
):
    chosen = NodeChoice(label_selector={"example.com/pool": selector})

    def admits(value: str | None) -> bool:
        return chosen.admits({} if value is None else {"example.com/pool": value, "zone": "a"})

    assert [admits(value) for value in taken + refused] == [True] * len(taken) + [False] * len(refused)


def test_all_labels_must_hold():
    chosen = NodeChoice(label_selector={"pool": "gpu", "zone": "!b"})
    assert chosen.admits({"pool": "gpu", "zone": "a"}) and not chosen.admits({"pool": "gpu", "zone": "b"})
    assert str(chosen) == "pool=gpu and zone=!b"


KEYS = ["pool", "example.com/pool", "ray.io/accelerator-type", "a" * 63, "Under_score.dot"]
NO_KEYS = ["", "-pool", "pool-", "a b", "a/b/c", "a" * 64, "/pool"]
SELECTORS = ["gpu", "!gpu", "in(a)", "in(a,b)", "in(a, b)", "!in(a, b)", "5", "a" * 63]
NO_SELECTORS = ["", "!", "in()", "(a, b)", "in(a,", "in(a, !b)", "!!a", "-a", "not in(a)", "a, b", 5, None, ["a"]]


def test_ray_understands_what_is_taken():
    from ray._private.label_utils import validate_label_selector

    for key in KEYS:
        for selector in SELECTORS:
            given = config(engines={"label_selector": {key: selector}}).placement.engines.label_selector
            assert given == {key: selector.replace(" ", "")}  # Ray would look for a label that begins with the space
            assert validate_label_selector(given) is None


@pytest.mark.parametrize("selector", NO_SELECTORS)
def test_what_is_no_selector_is_refused_by_name(selector: Any):
    with pytest.raises(
        ConfigError, match=r"placement\.data\.label_selector\.pool: .* selects no labels: write the val"
    ):
        config(data={"label_selector": {"pool": selector}})


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_refused(key: str):
    with pytest.raises(ConfigError, match="is no label's key"):
        config(data={"label_selector": {key: "a"}})


@pytest.mark.parametrize("name", ["CPU", "GPU", "memory", "object_store_memory", "node:10.0.0.1", "accelerator_type:L"])
def test_rays_own_resources_stand_elsewhere(name: str):
    with pytest.raises(ConfigError, match=r"placement\.engines\.resources: .* resource of Ray's own"):
        config(engines={"resources": {name: 1}})


@pytest.mark.parametrize("number", [0, -1, 1e-5, 1.5])
def test_quantities_that_ray_does_not_take_are_refused(number: float):
    with pytest.raises(ConfigError, match=r"slot: .* is no quantity to Ray"):
        config(engines={"resources": {"slot": number}})


def test_options_are_called_as_ray_calls_them():
    import inspect

    import ray.data

    chosen = EngineNodes(label_selector={"pool": "gpu"}, resources={"slot": 1}, accelerator_type="L4")
    assert chosen.options.keys() <= inspect.signature(ray.data.Dataset.map_batches).parameters.keys()
    assert chosen.options.keys() == NodeChoice.model_fields.keys()
    assert chosen.taken == {"slot": 1, "accelerator_type:L4": 0.001}
    assert chosen.options_of_labels == {"label_selector": {"pool": "gpu"}}
    assert str(chosen) == "pool=gpu and 1 slot and L4"


def test_a_group_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"placement\.engine is not a known key; did you mean engines\?"):
        config(engine={"accelerator_type": "L4"})
