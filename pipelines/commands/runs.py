"""Commands that compute: runs and their stages, sweeps, rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dpo_ray.config import dump_config, load_config
from dpo_ray.errors import ConfigError
from pipelines import Stage
from pipelines.commands.carry_out import carry_out, print_plan, run_until
from pipelines.commands.options import ConfigPath, DryRun, Overrides, Partitions, RunId, Since, Until, file_choice
from pipelines.work import a_sweep, rounds, training_on


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
    work = training_on(load_config(config, override), reference)
    if dry_run:
        print_plan(work.config, "train")
        return
    carry_out(work, run_id)


def sweep(config: ConfigPath, override: Overrides = None, dry_run: DryRun = False, run_id: RunId = None) -> None:
    """Search the space of the section tune with Ray Tune, and publish the best model past the gate."""
    work = a_sweep(load_config(config, override))
    if dry_run:
        from pipelines.show import plan_lines, sweep_lines

        typer.echo(dump_config(work.config))
        for line in [*plan_lines(work.config, "reference"), *sweep_lines(work.config)]:
            typer.echo(f"# {line}")
        return
    carry_out(work, run_id)


def iterate(config: ConfigPath, override: Overrides = None, dry_run: DryRun = False, run_id: RunId = None) -> None:
    """Run rounds of sampling, training and measuring, each from the policy before it, and publish the best one."""
    work = rounds(load_config(config, override), str(config))
    if dry_run:
        from pipelines.show import iterate_lines

        typer.echo(dump_config(work.config))
        for line in iterate_lines(work.config):
            typer.echo(f"# {line}")
        return
    carry_out(work, run_id)
