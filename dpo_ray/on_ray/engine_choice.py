"""vLLM or torch, where an option says auto: decided once for a model by what the two say of some rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dpo_ray.on_ray.pool import Pool
from dpo_ray.on_ray.session import connect
from dpo_ray.on_ray.vllm_version import has_vllm, require_vllm
from dpo_ray.progress import say
from dpo_ray.shards.score import Engine
from dpo_ray.storage.artifact import Contents, make
from dpo_ray.storage.location import Location


class CannotServe(Exception):
    """Says why vLLM cannot do for this model what it was asked for."""


class Undecided(Exception):
    """Says why this run cannot tell whether vLLM can serve the model; the next one may."""


def choose(
    output: Location,
    kind: str,
    stage: str,
    asked: str,
    identity: dict[str, Any],
    compare: Callable[[], dict[str, Any]],
) -> Engine:
    """What `compare` chooses; torch where vLLM is not installed, or cannot serve the model.

    The choice is an artifact of model and versions: later runs keep to it.

    Args:
        kind: of the artifact.
        stage: who says so.
        asked: the option that says auto, by its name.
        identity: what the choice depends on beside vLLM's version.
        compare: a `choice`, with more to be recorded. May raise CannotServe, and Undecided.
    """
    installed = has_vllm()
    identity = {**identity, "vllm": require_vllm(f"{asked}=auto") if installed else None}

    def decide(_: Location) -> Contents:
        if not installed:
            return Contents(metrics=choice("torch", "vLLM is not installed"))
        try:
            return Contents(metrics=compare())
        except CannotServe as why:
            return Contents(metrics=choice("torch", str(why)))

    try:
        artifact, _ = make(output, kind, identity, {}, decide)
    except Undecided as why:
        say(stage, f"{asked}=auto: torch for this run, for {why}")
        return "torch"
    made = artifact.manifest.metrics
    engine: Engine = made["engine"]
    say(
        stage,
        f"{asked}=auto: {engine}, for {made['why']} (decided {artifact.manifest.created}; to decide anew, remove "
        f"{artifact.location})",
    )
    return engine


def choice(engine: Engine, why: str) -> dict[str, Any]:
    """What is recorded of a choice."""
    return {"engine": engine, "why": why}


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
        if not isinstance(error, RayTaskError):  # a lost node or a killed process
            raise Undecided(why) from error
        raise CannotServe(why) from error


def alone(pool: Pool) -> Any:
    """What the function of a pool returns, in a process of its own that ends with it, and its engine's memory too."""
    connect(replace(pool.need, beside=0))
    import ray

    function: Callable[..., Any] = pool.build
    task = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, max_calls=1)(function)
    environment = {"runtime_env": {"env_vars": pool.env}} if pool.env else {}
    return ray.get(task.options(**environment).remote(**pool.arguments))
