"""All checks, in the order in which a run would meet what they find.

A check tells what it found in lines, and may raise at any point: what it raises is a line too, and the next one begins.
What a run checks at its start is checked by the same functions (pipelines.preflight, pipelines.needs).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ray import machine
from dpo_ray.config import Config, Model, Placement, load_config
from dpo_ray.errors import ConfigError
from dpo_ray.machine import Disk, Machine
from dpo_ray.on_ray.engine_start import start_engine
from dpo_ray.on_ray.room import Host, Nodes, described, fitting
from dpo_ray.on_ray.vllm_version import has_vllm
from dpo_ray.storage.location import Location
from pipelines import planned
from pipelines.doctor.asked import extras, extras_text, modules, uses_vllm, wants_gpus
from pipelines.doctor.clocks import clock
from pipelines.doctor.disks import Needed, folders, needed, room_on, session_folder
from pipelines.doctor.gpus import gpus
from pipelines.doctor.lines import Check, Found, Line, looked_at
from pipelines.needs import without_room
from pipelines.preflight import checks as of_a_run
from pipelines.preflight import models

if TYPE_CHECKING:
    from dpo_ray.on_ray.ask_nodes import Answer, Node

_PLENTY = 1e6
_SECONDS_TO_LOOK = 420.0  # a node imports libraries from a disk of its own


@dataclass(frozen=True)
class Cluster:
    """What is asked of a Ray cluster."""

    address: str
    join: Callable[[], None]
    """Raises ConfigError where none answers, or where it does not let this process in."""
    nodes: Callable[[], Nodes]
    ask: Callable[[Callable[..., Any], Callable[[Node], tuple[Any, ...]]], list[tuple[Node, Answer | None]]]
    """What a function gives back on each node, with its arguments for each."""
    see: Callable[[Location], None]
    """Raises ConfigError where a node does not see a folder."""


def of_environment() -> Cluster | None:
    """That of RAY_ADDRESS; None: a run would start a Ray of its own on this machine."""
    from dpo_ray.on_ray.ask_nodes import alive, ask
    from dpo_ray.on_ray.session import is_embedded, join, nodes
    from dpo_ray.on_ray.shared_output import require_seen_by_all

    if is_embedded():
        return None

    def ask_all(
        function: Callable[..., Any], arguments: Callable[[Node], tuple[Any, ...]]
    ) -> list[tuple[Node, Answer | None]]:
        asked = alive()
        return list(zip(asked, ask(asked, function, arguments, seconds=_SECONDS_TO_LOOK), strict=True))

    return Cluster(os.environ["RAY_ADDRESS"], join, nodes, ask_all, require_seen_by_all)


def examine_file(
    path: Path, overrides: list[str] | None, *, starts_engine: bool, begins: Callable[[str], None]
) -> Iterator[Line]:
    """The same of a file, on this machine or on the cluster of RAY_ADDRESS."""
    configs: list[Config] = []

    def load() -> Iterator[Found]:
        configs.append(load_config(path, overrides))
        yield "ok", f"{path} is understood"

    yield from looked_at("file", load)
    for config in configs:  # nothing more is known without one
        yield from examine(config, of_environment(), start=start_engine if starts_engine else None, begins=begins)


def examine(
    config: Config,
    cluster: Cluster | None,
    *,
    start: Callable[[Config], float] | None = None,
    disk_of: Callable[[str], Disk] = machine.disk_of,
    begins: Callable[[str], None] = lambda check: None,
) -> Iterator[Line]:
    """All that is found, a line each.

    Args:
        cluster: where the work will run; None: on this machine.
        start: has vLLM load the model, and gives the seconds; None: it is not started.
        disk_of: what is known of the disk of a folder of this machine.
        begins: told the name of each check before it.
    """
    for name, check in _Examination(config, cluster, start, disk_of).checks():
        begins(name)
        yield from looked_at(name, check)


class _Examination:
    def __init__(
        self,
        config: Config,
        cluster: Cluster | None,
        start: Callable[[Config], float] | None,
        disk_of: Callable[[str], Disk],
    ) -> None:
        self.config, self.cluster, self.start, self.disk_of = config, cluster, start, disk_of
        self.output = Location.of(config.run.output)
        self.joined = False

    def checks(self) -> Iterator[tuple[str, Check]]:
        yield "packages", self._packages
        for name, check in of_a_run(self.config):
            yield name, partial(_passed, check)
        for key, model in models(self.config).items():
            yield f"tokenizer of {key}", partial(self._tokenizer, model)
        yield "output", self._output
        yield "disk", self._disk
        if self.cluster is None:
            yield "GPUs", lambda: gpus(self.config, self.here, "This machine")
            yield "room", self._room
        else:
            yield "Ray's token", self._token
            yield "cluster", partial(self._cluster, self.cluster)
            yield "nodes", partial(self._nodes, self.cluster)
        yield "engine", self._engine

    @cached_property
    def here(self) -> Machine:
        asks_torch = self.cluster is None
        return machine.look(modules(self.config), extras(self.config), {}, asks_torch)

    @cached_property
    def needed(self) -> Needed:
        try:
            return needed(self.config)
        except ConfigError:  # told by the looks at the model; the disks are looked at all the same
            return {}

    def _packages(self) -> Iterator[Found]:
        here = self.here
        yield from self._packages_of(here, "", serves=self.cluster is None or self.config.vllm.gpus_per_actor == 0)
        if not here.unmet and not here.broken:
            named = ", ".join(f"{name} {version}" for name, version in here.versions.items())
            yield "ok", f"Python {here.python}; {named or 'dpo-ray is not installed as a package'}"

    def _packages_of(self, found: Machine, where: str, *, serves: bool) -> Iterator[Found]:
        """serves: whether vLLM's engines may run there."""
        for text in found.unmet:
            if serves or not text.startswith("vllm"):
                yield (
                    "failed",
                    f"{where}{text}. Install dpo-ray{extras_text(self.config)} there anew, in the environment that "
                    "runs it.",
                )
        for module, why in found.broken.items():
            if serves or module != "vllm":
                yield (
                    "failed",
                    f"{where}`import {module}` fails: {why}. Install it again in that environment, from the same "
                    "source as PyTorch: most often it was built for another CUDA or another PyTorch.",
                )

    def _tokenizer(self, model: Model) -> Iterator[Found]:
        from transformers import AutoConfig

        from dpo_ray.data.chat import ChatTokenizer, require_chat_template, require_prompt_room
        from dpo_ray.model.resolve import ModelFolder
        from dpo_ray.pairs import Message

        folder = ModelFolder.of(model)
        tokenizer = folder.tokenizer()
        require_chat_template(tokenizer, model.path)
        try:
            whole = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"The configuration of {model.path} cannot be read by transformers ({' '.join(str(error).split())}). "
                "Use a version of transformers that knows the model, or set model.trust_remote_code=true for a model "
                "whose own code you have read."
            ) from error
        shape = whole.get_text_config()
        if len(tokenizer) > shape.vocab_size:
            raise ConfigError(
                f"The tokenizer of {model.path} has {len(tokenizer)} tokens, and the model's vocabulary "
                f"{shape.vocab_size}: ids beyond it have no embedding. Take the tokenizer that the model was saved "
                "with, or resize the model's embeddings."
            )
        chat = ChatTokenizer(tokenizer, folder.template_arguments)
        require_prompt_room(chat, self.config.data)
        [prompt] = chat.prompts([([Message(role="user", content="Is it late?")], None)])
        longest = self.config.data.max_prompt_tokens + self.config.data.max_completion_tokens
        places = getattr(shape, "max_position_embeddings", None)
        said = f"{model.path}: {shape.model_type}, {len(tokenizer)} tokens; a question of 3 words is {len(prompt.ids)}"
        if places is not None and longest > places:
            yield (
                "failed" if uses_vllm(self.config) else "warning",
                f"{said}. data.max_prompt_tokens + data.max_completion_tokens is {longest}, and the model was made for "
                f"{places} positions (max_position_embeddings): vLLM refuses more. Lower the two limits, or use a "
                "model with a longer context.",
            )
            return
        yield "ok", f"{said}; up to {longest} tokens are asked of it{f', it has {places}' if places else ''}"

    def _output(self) -> Iterator[Found]:
        from dpo_ray.storage.probe import try_out

        ahead = try_out(self.output)
        yield "ok", f"{self.output}: files are written, read, listed, conditionally replaced and removed"
        yield from clock("The store's", ahead)

    def _disk(self) -> Iterator[Found]:
        for what, folder in folders(self.output, session_folder()).items():
            yield from room_on(what, self.disk_of(folder), self.needed, "")

    def _room(self) -> Iterator[Found]:
        from dpo_ray.on_ray.session import num_cores

        # A Ray of a run's own plans with as many CPUs as the run asks for.
        nodes = [Host({"CPU": _PLENTY, "GPU": float(self.here.torch_gpus)})]
        anywhere = self.config.model_copy(update={"placement": Placement()})  # told by a check of its own
        for status, said in _lacking(anywhere, nodes, grows=False):
            yield status, said.replace("The Ray cluster", "This machine").replace("node of the Ray cluster", "machine")
        train, cores = self.config.train, num_cores()
        if train.num_workers * train.cpus_per_worker > cores:
            yield (
                "warning",
                f"train.num_workers={train.num_workers} with train.cpus_per_worker={train.cpus_per_worker:g} are more "
                f"than this machine's {cores} cores: workers will wait for each other. Lower one of the two.",
            )

    def _token(self) -> Iterator[Found]:
        from dpo_ray.on_ray.authentication import WAY_IN, find_token, mode

        token = find_token()
        if mode() == "token" and token is None:
            raise ConfigError(f"RAY_AUTH_MODE is token, and no token is found here. {WAY_IN}")
        if token is not None and token.readable_by_others:
            yield (
                "warning",
                f"{token.place} may be read by other users of this machine, who could then run code on the cluster: "
                f"chmod 600 {token.place}.",
            )
        if mode() == "token":
            assert token is not None
            yield "ok", f"RAY_AUTH_MODE is token, and a token is in {token.place}"
        else:
            beside = f"; the one in {token.place} is not sent" if token is not None else ""
            yield (
                "warning",
                f"RAY_AUTH_MODE is {mode()}, so no token is sent{beside}. A cluster that asks for one refuses "
                "that; one that does not runs the code of whoever reaches its ports: have it ask for one.",
            )

    def _cluster(self, cluster: Cluster) -> Iterator[Found]:
        cluster.join()
        self.joined = True
        nodes = cluster.nodes()
        yield "ok", f"{cluster.address} has {described(nodes)}"
        for _, chosen in self.config.placement:
            if there := chosen.options and fitting(nodes, chosen):
                yield "ok", f"{chosen.key} ({chosen}): {len(there)} of {len(nodes)} nodes"
        yield from _lacking(self.config, nodes, grows=True)

    def _engine(self) -> Iterator[Found]:
        if not uses_vllm(self.config):
            yield "ok", "vLLM is not asked for"
        elif not has_vllm():
            raise ConfigError(
                "vLLM is asked for and not installed. Install it (pip install 'dpo-ray[vllm]' on a GPU machine; "
                "`make env` on a CPU machine), or set reference.engine=torch where only the reference asks for it."
            )
        elif "vllm" in self.here.broken:
            raise ConfigError(f"vLLM cannot be imported: {self.here.broken['vllm']}. See `packages`.")
        elif self.start is None:
            yield "ok", "vLLM can be imported; with --start-engine it is started, which fetches the model's weights"
        elif self.cluster is not None and not self.joined:
            raise ConfigError("vLLM was not started, for the cluster was not joined: see above.")
        else:
            yield (
                "ok",
                f"vLLM has loaded {self.config.model.path} and scored a pair, in {self.start(self.config):.0f} s",
            )

    def _nodes(self, cluster: Cluster) -> Iterator[Found]:
        if not self.joined:
            yield "failed", "Not looked at, for the cluster was not joined: see above."
            return
        if self.output.is_local:
            self.config.run.require_absolute_output()
            cluster.see(self.output)
        asked = cluster.ask(
            machine.look,
            lambda node: (
                modules(self.config),
                extras(self.config),
                folders(self.output, node.session),
                wants_gpus(self.config),
            ),
        )
        for node, answer in asked:
            yield from self._node(node, answer)
        alike = sum(answer is not None and answer.failure is None for _, answer in asked)
        yield "ok", f"{alike} of {len(asked)} nodes answered"

    def _node(self, node: Node, answer: Answer | None) -> Iterator[Found]:
        if answer is None:
            yield (
                "failed",
                f"{node.name} did not answer within {_SECONDS_TO_LOOK:g} s. Look at it with `ray status` and in its "
                f"logs ({node.session}/logs); take it out of the cluster if it hangs.",
            )
            return
        if answer.failure is not None:
            yield (
                "failed",
                f"{node.name} could not be looked at ({answer.failure}): most often dpo-ray is not installed there, or "
                f"in another version. Install the version of this machine on every node "
                f"({self.here.versions.get('dpo-ray', 'unknown')}).",
            )
            return
        found: Machine = answer.value
        may_serve = self.config.placement.engines.admits(node.labels)
        yield from self._packages_of(
            found,
            f"{node.name}: ",
            serves=may_serve and (self.config.vllm.gpus_per_actor == 0 or bool(found.gpus)),
        )
        if others := _differences(self.here, found):
            yield (
                "failed",
                f"{node.name} has other versions than this machine: {', '.join(others)}. Install the same on every "
                "node (one image for all is simplest): objects may not travel, and numbers may differ.",
            )
        if found.gpus or found.no_driver is not None:
            yield from gpus(self.config, found, node.name)
        yield from clock(f"The clock of {node.name}", found.clock - answer.received)
        for what, disk in found.disks.items():
            yield from (one for one in room_on(what, disk, self.needed, f"{node.name}: ") if one[0] != "ok")


def _lacking(config: Config, nodes: Nodes, *, grows: bool) -> Iterator[Found]:
    plan = [*planned(config, "publish"), *(["sweep"] if config.tune is not None else [])]
    missing = without_room(config, plan, nodes)
    minutes = config.run.wait_for_resources
    for lack, stages in missing.items():
        said = f"{', '.join(stages)}: {lack.said} {lack.way_out}"
        if stages == ["sweep"]:
            yield "warning", f"{said} Only `dpo-ray sweep` needs it."
        elif grows and minutes:
            yield (
                "warning",
                f"{said} The stage will ask the cluster's autoscaler for it, and wait {minutes:g} minutes "
                "(run.wait_for_resources): where nothing adds nodes, it fails then.",
            )
        else:
            yield "failed", said
    if not missing:
        yield "ok", f"there is room for each of {', '.join(plan)}"


def _passed(check: Callable[[], None]) -> Iterator[Found]:
    check()
    yield "ok", "as a run asks for it"


def _differences(here: Machine, there: Machine) -> list[str]:
    """What is there in another version; what one of the two lacks is told where it is needed."""
    from packaging.version import Version

    found = [] if here.python == there.python else [f"Python {there.python} ({here.python} here)"]
    for name in sorted(here.versions.keys() & there.versions.keys()):
        # A build for CUDA and one for CPUs are one version.
        if Version(here.versions[name]).public != Version(there.versions[name]).public:
            found.append(f"{name} {there.versions[name]} ({here.versions[name]} here)")
    if not found and here.source != there.source:
        found.append(
            f"another source of dpo-ray {there.versions.get('dpo-ray', '')} ({there.source}, {here.source} here)"
        )
    return found
