"""Commands that start jobs on a cluster, watch and end them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from dpo_ray.config import load_config
from dpo_ray.errors import ConfigError
from pipelines import STAGES
from pipelines.commands.options import Address, ConfigPath, Overrides, checked_run_id

Job = Annotated[str, typer.Argument(help="The submission id, as `dpo-ray submit` told it.")]


def submit(
    config: ConfigPath,
    address: Address = None,
    override: Overrides = None,
    command: Annotated[str, typer.Option(help="What to run there: run, sweep, iterate or a stage.")] = "run",
    submission_id: Annotated[
        str | None,
        typer.Option(callback=checked_run_id, help="Name of the job and of its run; the cluster accepts it once."),
    ] = None,
    period: Annotated[
        str | None,
        typer.Option(help="What the run is for, as 2026-11-01: a job that runs or went well runs no second time."),
    ] = None,
    ship: Annotated[
        list[Path] | None, typer.Option(help="A file or folder that travels with the configuration. Repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="A variable of here that the job is given; the dashboard shows it. Repeatable."),
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML of Ray's runtime environment: pip, uv, image_uri, env_vars, …")
    ] = None,
    executable: Annotated[str, typer.Option(help="The dpo-ray to call on the cluster.")] = "dpo-ray",
    wait: Annotated[bool, typer.Option(help="Follow the log and return the job's exit status.")] = True,
) -> None:
    """Run a command as a job on a Ray cluster, follow its log and return its exit status.

    Modules of rules that lie here travel with it.
    """
    if command not in {"run", "sweep", "iterate", *STAGES}:
        raise ConfigError(f"--command {command} is not known: name one of run, sweep, iterate, {', '.join(STAGES)}.")
    loaded = load_config(config, override)
    if period is not None and not re.fullmatch(r"\w[\w.:+=@-]*", period):
        raise ConfigError(
            f"--period {period!r} is no name of a period: take letters, digits and any of . _ - : + = @, as in "
            "2026-11-01."
        )
    from cluster.submit import Submission, submit_job

    submission = Submission(
        command=command,
        executable=executable,
        submission_id=submission_id,
        period=period,
        ship=ship or (),
        env=env or (),
        runtime_env=runtime_env,
    )
    raise typer.Exit(submit_job(loaded, address, submission, wait=wait))


def status(name: Job, address: Address = None) -> None:
    """Tell how a job stands; the exit code is 0 unless it ended badly, and then the job's own."""
    from cluster.jobs import connected, known

    found = known(connected(address), name)
    typer.echo(found.told())
    raise typer.Exit(found.exit_code() if found.ended else 0)


def logs(
    name: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="To its end, and with its exit status.")] = False,
) -> None:
    """Print what a job has said."""
    from cluster import jobs

    client = jobs.connected(address)
    if follow:
        raise typer.Exit(jobs.follow(client, name))
    jobs.print_logs(client, name)


def cancel(name: Job, address: Address = None) -> None:
    """End a job. What its stages have finished is kept."""
    from cluster.jobs import cancel as end
    from cluster.jobs import connected

    typer.echo(end(connected(address), name).told())
