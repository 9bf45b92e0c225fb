"""What a run is to do: its stages, and what is looked at before. Each function is a command that computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from pipelines import Stage, planned

if TYPE_CHECKING:
    from pipelines.context import RunContext


@dataclass(frozen=True)
class Work:
    """What a run is to do."""

    config: Config
    command: tuple[str, ...]
    """What does the same again, as of RunContext."""
    plan: list[str]
    """Its stages."""
    do: Callable[[RunContext], None]
    check_for: Stage | None = None
    """The last stage whose needs are checked before."""
    is_done: Callable[[RunContext], bool] | None = None
    """Finds out, without Ray, whether there is nothing to do."""


def stages_until(config: Config, stage: Stage) -> Work:
    """All stages up to one; what is finished is taken over."""

    def do(context: RunContext) -> None:
        from pipelines.align import align

        align(context, until=stage)

    def is_done(context: RunContext) -> bool:
        from pipelines.nothing_new import is_nothing_new

        return is_nothing_new(context)

    publishes = stage == "publish"
    command = "run" if publishes else stage
    return Work(config, (command,), planned(config, stage), do, stage, is_done if publishes else None)


def training_on(config: Config, reference: str) -> Work:
    """The stage train alone, on a finished reference artifact. Raises ConfigError where the loss takes none."""
    from pipelines.preflight import require_reference_use

    require_reference_use(config)

    def do(context: RunContext) -> None:
        from pipelines.reference import given_reference
        from pipelines.train import train

        train(context, given_reference(context, reference))

    return Work(config, ("train", "--reference", reference), ["train"], do)


def a_sweep(config: Config) -> Work:
    """The search of the section tune. Raises ConfigError where there is nothing to search."""
    from tuning.space import require_space

    _require_start_from_model(config, "sweep", "the trials")
    require_space(config)

    def do(context: RunContext) -> None:
        from pipelines.sweep import sweep

        sweep(context)

    return Work(config, ("sweep",), [*planned(config, "reference"), "sweep", "evaluate", "publish"], do, "publish")


def rounds(config: Config, source: str = "The configuration") -> Work:
    """The rounds of the section iterate. Raises ConfigError where there is none. source: of it, for the message."""
    if config.iterate is None:
        raise ConfigError(f"{source} has no section iterate: add one, such as -o iterate.rounds=3.")
    _require_start_from_model(config, "iterate", "the first round")

    def do(context: RunContext) -> None:
        from pipelines.iterate import iterate

        iterate(context)

    return Work(config, ("iterate",), planned(config, "publish"), do, "publish")


def _require_start_from_model(config: Config, command: str, who: str) -> None:
    """Raises ConfigError where train.start says otherwise, which these commands do not follow."""
    if config.train.start != "base":
        raise ConfigError(
            f"train.start={config.train.start} is for `dpo-ray run` and its stages: in `dpo-ray {command}` {who} "
            "start from model.path. Set train.start=base; to go on from a published model, name it as model.path."
        )
