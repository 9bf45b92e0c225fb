"""On which nodes of a cluster work is put: by their labels, by custom resources, by the type of their accelerators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from dpo_ray.config.section import Section

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:(?=.{{1,253}}/){_NAME}/)?{_NAME}")
_SELECTOR = re.compile(rf"(?P<no>!?)(?:in\((?P<several>{_NAME}(?:, ?{_NAME})*)\)|(?P<one>{_NAME}))")
_LEAST = 1e-4
"""Of a resource, that Ray can tell from nothing."""


def _check_key(key: str) -> str:
    if _KEY.fullmatch(key) is None:
        raise ValueError(
            f"{key!r} is no label's key: letters, digits, dash, underscore and dot, at most 63 of them, after a domain "
            "and a slash if you like, as in example.com/pool"
        )
    return key


def _check_selector(value: object) -> object:
    """YAML reads `on: yes` and `generation: 5` as what is no text."""
    if not isinstance(value, str) or _SELECTOR.fullmatch(value) is None:
        raise ValueError(
            f"{value!r} selects no labels: write the value that a node's label must have, as in gpu; or 'in(a, b)', "
            "'!gpu' or '!in(a, b)', in quotes"
        )
    return value.replace(" ", "")  # which Ray allows after a comma, and then takes for a part of the label


def is_custom(resource: str) -> bool:
    """Whether a resource is none that Ray gives to nodes by itself."""
    return resource not in {"CPU", "GPU", "memory", "object_store_memory"} and ":" not in resource


def _check_resources(resources: dict[str, float]) -> dict[str, float]:
    for name, number in resources.items():
        if not is_custom(name):
            raise ValueError(
                f"{name} is a resource of Ray's own, and this is for custom ones, which nodes are started with "
                "(`ray start --resources`). CPUs and GPUs are vllm.cpus_per_actor, vllm.gpus_per_actor, "
                "train.cpus_per_worker and train.use_gpu"
            )
        if number < _LEAST or (number > 1 and number != int(number)):
            raise ValueError(
                f"{name}: {number:g} is no quantity to Ray: write one from {_LEAST:g} to 1, or a whole number"
            )
    return resources


Key = Annotated[str, AfterValidator(_check_key)]
Selector = Annotated[str, BeforeValidator(_check_selector)]


class NodeChoice(Section):
    """On which nodes; left out: on any. The fields are called as Ray calls what they are given to."""

    key: ClassVar[str] = "placement"
    """Of the configuration, for messages."""

    label_selector: dict[Key, Selector] = Field(default_factory=dict)
    """Labels of the nodes: key → value, 'in(one, other)', '!value' or '!in(one, other)'; the last two hold on nodes
    without the label too."""
    resources: Annotated[dict[str, float], AfterValidator(_check_resources)] = Field(default_factory=dict)
    """Custom resources that each process takes of its node, by name."""
    accelerator_type: str | None = Field(None, min_length=1)
    """The accelerator of the nodes by Ray's name for it, such as H100."""

    @property
    def options(self) -> dict[str, object]:
        """Those that are given, by the names of Ray's options."""
        return {name: value for name, value in self if value}

    @property
    def options_of_labels(self) -> dict[str, object]:
        """The same for a process that takes nothing of its node, which others may have taken whole."""
        return {name: value for name, value in self.options.items() if name == "label_selector"}

    @property
    def taken(self) -> dict[str, float]:
        """What each process takes of its node beside CPUs and GPUs, by Ray's names."""
        accelerator = {f"{ACCELERATOR}{self.accelerator_type}": 0.001} if self.accelerator_type else {}
        return {**self.resources, **accelerator}

    def admits(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels may be taken."""
        return all(_selects(selector, labels.get(key)) for key, selector in self.label_selector.items())

    @property
    def selected(self) -> str:
        """The labels in words."""
        return " and ".join(f"{key}={selector}" for key, selector in self.label_selector.items())

    def __str__(self) -> str:
        parts = [self.selected] if self.label_selector else []
        parts += [f"{number:g} {name}" for name, number in self.resources.items()]
        return " and ".join(parts + ([self.accelerator_type] if self.accelerator_type else []))


ANYWHERE = NodeChoice()
ACCELERATOR = "accelerator_type:"
"""Ray gives a node with accelerators a resource of this name and their type."""


def _selects(selector: str, value: str | None) -> bool:
    parsed = _SELECTOR.fullmatch(selector)
    assert parsed is not None
    wanted = (parsed["several"] or parsed["one"]).split(",")
    return (value in wanted) != bool(parsed["no"])


class DataNodes(NodeChoice):
    key: ClassVar[str] = "placement.data"


class EngineNodes(NodeChoice):
    key: ClassVar[str] = "placement.engines"


class TrainingNodes(NodeChoice):
    key: ClassVar[str] = "placement.training"


class Placement(Section):
    """For a cluster, whose nodes differ. What is computed does not depend on it."""

    data: DataNodes = DataNodes()
    """What carries rows, a CPU each: files that are looked through, ingest, duplicates, tokenization, rules, pairs,
    reports, and what asks a judge's endpoint."""
    engines: EngineNodes = EngineNodes()
    """vLLM's engines, which have the sizes of `vllm`: of candidates, of the reference, of reward models and judges that
    are served here. An engine's GPUs are all of one node."""
    training: TrainingNodes = TrainingNodes()
    """What has the sizes of `train`: workers, also those of trials, and what is read for them; and the trainer's own
    forward: calibration, evaluation, benchmark tasks, and a reference or reward model that vLLM does not compute."""
