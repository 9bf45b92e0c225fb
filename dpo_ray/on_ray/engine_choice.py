"""vLLM or torch, where an option says auto: decided once for a model by what the two say of some rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray.errors import DpoRayError
from dpo_ray.on_ray.pool import Pool
from dpo_ray.on_ray.session import connect
from dpo_ray.on_ray.usage import used
from dpo_ray.on_ray.vllm_version import has_vllm, require_vllm
from dpo_ray.progress import say
from dpo_ray.shards.score import Engine
from dpo_ray.storage.artifact import Artifact, Contents, make
from dpo_ray.storage.location import Location

_CANNOT = "cannot"


class CannotServe(Exception):
    """Says why vLLM cannot do for this model what it was asked for."""


class Undecided(Exception):
    """Says why this run cannot tell whether vLLM can serve the model; the next one may."""


@dataclass(frozen=True)
class Choice:
    """An engine, and why it is the one."""

    engine: Engine
    why: str


def choose(
    output: Location,
    kind: str,
    stage: str,
    asked: str,
    identity: dict[str, Any],
    compare: Callable[[], dict[str, Any]],
    judge: Callable[[dict[str, Any]], Choice],
) -> Engine:
    """What `judge` makes of the comparison; torch where vLLM is not installed, or cannot serve the model.

    The comparison is an artifact of model and versions: later runs keep to it.

    Args:
        asked: the option that says auto, by its name.

    Others are those of `compared`.
    """
    try:
        found = compared(output, kind, f"{asked}=auto", identity, compare)
    except Undecided as why:
        say(stage, f"{asked}=auto: torch for this run, for {why}")
        return "torch"
    metrics = found.manifest.metrics
    made = Choice("torch", metrics[_CANNOT]) if _CANNOT in metrics else judge(metrics)
    say(stage, f"{asked}=auto: {made.engine}, for {made.why} ({when(found)})")
    return made.engine


def compared(
    output: Location, kind: str, asked_by: str, identity: dict[str, Any], compare: Callable[[], dict[str, Any]]
) -> Artifact:
    """The artifact whose metrics are what `compare` measured, or why vLLM could not be compared with anything.

    Args:
        kind: of the artifact.
        asked_by: who needs vLLM's version.
        identity: what the comparison depends on beside it.
        compare: what is to be recorded. May raise CannotServe, which is recorded, and Undecided.
    """
    installed = has_vllm()
    identity = {**identity, "vllm": require_vllm(asked_by) if installed else None}

    def measure(_: Location) -> Contents:
        if not installed:
            return Contents(metrics={_CANNOT: "vLLM is not installed"})
        try:
            return Contents(metrics=compare())
        except CannotServe as why:
            return Contents(metrics={_CANNOT: str(why)})

    artifact, _ = make(output, kind, identity, {}, measure)
    return artifact


def when(found: Artifact) -> str:
    """Of which day a comparison is, and how to have another."""
    return f"compared {found.manifest.created}; to compare anew, remove {found.location}"


def tried(pool: Pool, doing: str) -> Any:
    """What a pool's function returns with vLLM. Raises CannotServe where it fails, Undecided where the failure says
    nothing of the model.

    Args:
        doing: such as "score this model".
    """
    try:
        return alone(pool)
    except Exception as error:
        from ray.exceptions import RayError, RayTaskError

        if not isinstance(error, RayError):
            raise
        # What vLLM does not know of a model, torch still computes.
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        why = f"vLLM cannot {doing}: {last[:500]}"
        cause = getattr(error, "cause", None)
        says_nothing = isinstance(cause, DpoRayError | OSError | MemoryError) or "out of memory" in str(error).lower()
        if not isinstance(error, RayTaskError) or says_nothing:  # a lost node, files that could not be had, no room
            raise Undecided(why) from error
        raise CannotServe(why) from error


def alone(pool: Pool) -> Any:
    """What the function of a pool returns, in a process of its own that ends with it, and its engine's memory too."""
    connect(replace(pool.need, beside=0))
    used(1, pool.num_gpus)
    import ray

    function: Callable[..., Any] = pool.build
    resources = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, **pool.place.options}
    task = ray.remote(max_calls=1, **resources)(function)
    environment = {"runtime_env": {"env_vars": pool.env}} if pool.env else {}
    return ray.get(task.options(**environment).remote(**pool.arguments))
