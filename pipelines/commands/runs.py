"""Commands that compute: runs and their stages, sweeps, rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_ray.config import Config, dump_config, load_config
from dpo_ray.errors import ConfigError
from pipelines import Stage, planned
from pipelines.commands.carry_out import carry_out, print_plan, run_until
from pipelines.commands.options import ConfigPath, DryRun, Overrides, Partitions, RunId, Since, Until, file_choice

if TYPE_CHECKING:
    from pipelines.context import RunContext


def run(
    config: ConfigPath,
    override: Overrides = None,
    dry_run: DryRun = False,
    run_id: RunId = None,
    since: Since = None,
    until: Until = None,
    partition: Partitions = None,
) -> None:
    """Run the main job: from preference data or prompts to a published model."""
    run_until("publish", config, [*(override or []), *file_choice(since, until, partition)], dry_run, run_id)


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command that runs the stages up to one."""

    def command(
        config: ConfigPath,
        override: Overrides = None,
        dry_run: DryRun = False,
        run_id: RunId = None,
        since: Since = None,
        until: Until = None,
        partition: Partitions = None,
    ) -> None:
        run_until(stage, config, [*(override or []), *file_choice(since, until, partition)], dry_run, run_id)

    command.__doc__ = f"Run the stages up to {stage}; what is finished is taken over."
    return command


def train(
    config: ConfigPath,
    override: Overrides = None,
    dry_run: DryRun = False,
    run_id: RunId = None,
    reference: Annotated[
        str | None, typer.Option(help="Train on this finished reference artifact instead of this configuration's own.")
    ] = None,
    since: Since = None,
    until: Until = None,
    partition: Partitions = None,
) -> None:
    """Run the stages up to train; what is finished is taken over."""
    chosen = file_choice(since, until, partition)
    if reference is None:
        run_until("train", config, [*(override or []), *chosen], dry_run, run_id)
        return
    if chosen:
        raise ConfigError(
            f"--reference names the rows to train on, and {chosen[0]} chooses among files that are not read then: "
            "leave one of them out."
        )
    from pipelines.preflight import require_reference_use

    loaded = load_config(config, override)
    require_reference_use(loaded)
    if dry_run:
        print_plan(loaded, "train")
        return
    path = reference

    def work(context: RunContext) -> None:
        from pipelines.reference import given_reference
        from pipelines.train import train as train_stage

        train_stage(context, given_reference(context, path))

    carry_out(loaded, run_id, work, ("train", "--reference", reference), plan=["train"])


def sweep(config: ConfigPath, override: Overrides = None, dry_run: DryRun = False, run_id: RunId = None) -> None:
    """Search the space of the section tune with Ray Tune, and publish the best model past the gate."""
    from tuning.space import require_space

    loaded = load_config(config, override)
    _require_start_from_model(loaded, "sweep", "the trials")
    require_space(loaded)
    if dry_run:
        from pipelines.show import plan_lines, sweep_lines

        typer.echo(dump_config(loaded))
        for line in [*plan_lines(loaded, "reference"), *sweep_lines(loaded)]:
            typer.echo(f"# {line}")
        return

    def work(context: RunContext) -> None:
        from pipelines.sweep import sweep

        sweep(context)

    plan = [*planned(loaded, "reference"), "sweep", "evaluate", "publish"]
    carry_out(loaded, run_id, work, ("sweep",), plan=plan, check_for="publish")


def iterate(config: ConfigPath, override: Overrides = None, dry_run: DryRun = False, run_id: RunId = None) -> None:
    """Run rounds of sampling, training and measuring, each from the policy before it, and publish the best one."""
    loaded = load_config(config, override)
    if loaded.iterate is None:
        raise ConfigError(f"{config} has no section iterate: add one, such as -o iterate.rounds=3.")
    _require_start_from_model(loaded, "iterate", "the first round")
    if dry_run:
        from pipelines.show import iterate_lines

        typer.echo(dump_config(loaded))
        for line in iterate_lines(loaded):
            typer.echo(f"# {line}")
        return

    def work(context: RunContext) -> None:
        from pipelines.iterate import iterate

        iterate(context)

    carry_out(loaded, run_id, work, ("iterate",), plan=planned(loaded, "publish"), check_for="publish")


def _require_start_from_model(config: Config, command: str, who: str) -> None:
    """Raises ConfigError where train.start says otherwise, which these commands do not follow."""
    if config.train.start != "base":
        raise ConfigError(
            f"train.start={config.train.start} is for `dpo-ray run` and its stages: in `dpo-ray {command}` {who} "
            "start from model.path. Set train.start=base; to go on from a published model, name it as model.path."
        )
