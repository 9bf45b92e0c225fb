"""A command's work in the folder of a run: seen by a person, with a log file, closed with what came of it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dpo_ray.config import Config, dump_config, load_config
from dpo_ray.errors import Busy, DpoRayError, GateFailed, Interrupted, Terminated
from dpo_ray.progress import say
from pipelines import Stage, planned

if TYPE_CHECKING:
    from pipelines.context import RunContext
    from pipelines.hooks import Ended
    from pipelines.terminal import Terminal


def run_until(stage: Stage, path: Path, overrides: list[str] | None, dry_run: bool, run_id: str | None) -> None:
    config = load_config(path, overrides)
    if dry_run:
        print_plan(config, stage)
        return

    def work(context: RunContext) -> None:
        from pipelines.align import align

        align(context, until=stage)

    def is_done(context: RunContext) -> bool:
        from pipelines.nothing_new import is_nothing_new

        return is_nothing_new(context)

    may_be_done = is_done if stage == "publish" else None
    command = ("run" if stage == "publish" else stage,)
    carry_out(config, run_id, work, command, plan=planned(config, stage), check_for=stage, is_done=may_be_done)


def print_plan(config: Config, stage: Stage) -> None:
    from pipelines.show import plan_lines

    typer.echo(dump_config(config))
    for line in plan_lines(config, stage):
        typer.echo(f"# {line}")


def carry_out(
    config: Config,
    run_id: str | None,
    work: Callable[[RunContext], None],
    command: tuple[str, ...],
    *,
    plan: list[str],
    check_for: Stage | None = None,
    is_done: Callable[[RunContext], bool] | None = None,
    quiet: bool = False,
) -> None:
    """Run the work in a run's folder, seen by a person and with a log file, and close with what came of it.

    Args:
        command: what does the same again, as of RunContext.
        plan: the stages of the work.
        check_for: the last stage whose needs are checked before.
        is_done: finds out, without Ray, whether there is nothing to do.
        quiet: without closing words.
    """
    from pipelines.hooks import require_hooks, told_when_ended
    from pipelines.terminal import captured

    require_hooks(config)
    as_json = config.run.log_format == "json"
    with captured(as_json) as terminal, told_when_interrupted(), told_when_ended(config) as ended:
        terminal.display.plan(plan)
        if check_for is not None:
            from pipelines.preflight import preflight

            say("start", "checking configuration, inputs and model")
            preflight(config, check_for)
        from dpo_ray.model.pin import pinned

        lines = _record(terminal, pinned(config), run_id, work, command, plan, is_done, ended)
        terminal.records.add("\n".join(lines).strip())
    for line in () if quiet or as_json else lines:
        typer.echo(line)


def _record(
    terminal: Terminal,
    config: Config,
    run_id: str | None,
    work: Callable[[RunContext], None],
    command: tuple[str, ...],
    plan: list[str],
    is_done: Callable[[RunContext], bool] | None,
    ended: Ended,
) -> list[str]:
    """Do the work; whatever comes of it, the run's folder gets its log, its summary and its report.

    Returns the last words of a run that ended well.
    """
    from dpo_ray.on_ray.metrics import RUNS, count
    from dpo_ray.on_ray.session import disconnect, is_embedded
    from pipelines.context import RunContext
    from pipelines.report import write_report
    from pipelines.show import closing_lines
    from pipelines.tracking import begin_tracking, end_tracking

    context = RunContext.start(config, run_id)
    context.command = command
    ended.folder = context.folder.uri
    terminal.records.run = context.run_id
    if context.folder.is_local:
        terminal.keep_log(Path(context.folder.uri))
    context.begins = terminal.display.stage
    context.table = terminal.display.table
    try:
        with told_when_interrupted():
            if is_done is None or not is_done(context):
                if not is_embedded():
                    from pipelines.needs import check_cluster

                    check_cluster(config, context.output, plan)
                begin_tracking(context, plan)
                work(context)
        count(RUNS, outcome="ok")
    except BaseException as error:
        count(RUNS, outcome=_outcome(error))
        code = error.exit_code if isinstance(error, DpoRayError) else 1
        reason = str(error) if isinstance(error, DpoRayError) else f"{type(error).__name__}: {error}"
        ended.summary = summary = context.write_summary(code, [reason])
        write_report(context, summary)
        end_tracking(context, "stopped" if _outcome(error) == "stopped" else "failed")
        raise
    finally:
        disconnect()
    ended.summary = summary = context.write_summary(0, [])
    write_report(context, summary)
    end_tracking(context, "finished")
    return closing_lines(context, summary, terminal.log)


def _outcome(error: BaseException) -> str:
    """Of a run that ended by an error, as its metric names it."""
    if isinstance(error, GateFailed):
        return "gate_failed"
    return "stopped" if isinstance(error, Busy | Interrupted | KeyboardInterrupt | Terminated) else "error"


@contextmanager
def told_when_interrupted() -> Iterator[None]:
    """typer would end the process without a word, and so would Python on SIGTERM, or not at all as a container's first
    process. Ray turns SIGTERM into sys.exit of its number, once it is connected."""
    kept = "What is finished is kept: the same command goes on from there."
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)) if in_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(kept) from error
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            raise Terminated(f"It got SIGTERM, as Kubernetes, Slurm or a shutdown send it. {kept}") from error
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
