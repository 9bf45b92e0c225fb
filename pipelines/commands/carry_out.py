"""A command's work, seen by a person: on the terminal what is for them, in a log file all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dpo_ray.config import Config, dump_config, load_config
from pipelines import Stage
from pipelines.record_run import Looking, record_run
from pipelines.work import Work, stages_until

if TYPE_CHECKING:
    from pipelines.context import RunContext


def run_until(stage: Stage, path: Path, overrides: list[str] | None, dry_run: bool, run_id: str | None) -> None:
    config = load_config(path, overrides)
    if dry_run:
        print_plan(config, stage)
        return
    carry_out(stages_until(config, stage), run_id)


def print_plan(config: Config, stage: Stage) -> None:
    from pipelines.show import plan_lines

    typer.echo(dump_config(config))
    for line in plan_lines(config, stage):
        typer.echo(f"# {line}")


def carry_out(work: Work, run_id: str | None, *, quiet: bool = False) -> None:
    """Do the work, and close with what came of it. quiet: without closing words."""
    from pipelines.terminal import captured

    as_json = work.config.run.log_format == "json"
    with captured(as_json) as terminal:
        terminal.display.plan(work.plan)

        def opened(context: RunContext) -> None:
            terminal.records.run = context.run_id
            if context.folder.is_local:
                terminal.keep_log(Path(context.folder.uri))

        done = record_run(work, run_id, Looking(opened, terminal.display.stage, terminal.display.table))
        from pipelines.show import closing_lines

        lines = closing_lines(done.context, done.summary, terminal.log)
        terminal.records.add("\n".join(lines).strip())
    for line in () if quiet or as_json else lines:
        typer.echo(line)
