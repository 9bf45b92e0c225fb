"""A run and its record: whatever comes of the work, the run's folder gets its summary and its report, and who is to be
told of it is told. Nothing here needs a terminal; who has one looks on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_ray.config import Config
from dpo_ray.errors import Busy, DpoRayError, GateFailed, Interrupted, Terminated
from dpo_ray.progress import say
from pipelines.work import Work

if TYPE_CHECKING:
    from pipelines.context import RunContext
    from pipelines.hooks import Ended


@dataclass(frozen=True)
class Looking:
    """Who looks on, and is told how a run comes on."""

    opened: Callable[[RunContext], None] = lambda context: None
    """The run has its folder."""
    begins: Callable[[str], None] = lambda name: None
    """As of RunContext."""
    table: Callable[[Sequence[Sequence[str]]], None] = lambda rows: None
    """As of RunContext."""


@dataclass(frozen=True)
class Done:
    """A run that has ended well."""

    context: RunContext
    summary: dict[str, Any]
    """As summary.json has it."""


def record_run(work: Work, run_id: str | None, looking: Looking) -> Done:
    """Do the work in a run's folder. May be called by any thread, and again and again in one process.

    A Ray that this process has is used and left as it is; one that is started for the run ends with it.

    Raises what ends the run, when it is recorded: Interrupted for Ctrl-C, Terminated for SIGTERM, which only the main
    thread is told of.
    """
    from pipelines.hooks import require_hooks, told_when_ended

    require_hooks(work.config)
    if "ray" in sys.modules:  # what the configuration alone is wrong in is told without it
        from dpo_ray.on_ray.session import look_for_ray

        look_for_ray()
    with told_when_interrupted(), told_when_ended(work.config) as ended:
        if work.check_for is not None:
            from pipelines.preflight import preflight

            say("start", "checking configuration, inputs and model")
            preflight(work.config, work.check_for)
        from dpo_ray.model.pin import pinned

        return _record(pinned(work.config), work, run_id, looking, ended)


def _record(config: Config, work: Work, run_id: str | None, looking: Looking, ended: Ended) -> Done:
    from dpo_ray.on_ray.metrics import RUNS, count
    from dpo_ray.on_ray.session import disconnect, is_embedded
    from pipelines.context import RunContext
    from pipelines.live import told_live
    from pipelines.report import write_report
    from pipelines.tracking import begin_tracking, end_tracking

    context = RunContext.start(config, run_id)
    context.command = work.command
    ended.folder = context.folder.uri
    looking.opened(context)
    context.begins, context.table = looking.begins, looking.table
    try:
        told = told_live(context.live, context.folder, work.command, work.plan, context.stages)
        with told, told_when_interrupted():
            if work.is_done is None or not work.is_done(context):
                if not is_embedded():
                    from pipelines.needs import check_cluster

                    check_cluster(config, context.output, work.plan)
                begin_tracking(context, work.plan)
                work.do(context)
        count(RUNS, outcome="ok")
    except BaseException as error:
        count(RUNS, outcome=_outcome(error))
        code = error.exit_code if isinstance(error, DpoRayError) else 1
        reason = str(error) if isinstance(error, DpoRayError) else f"{type(error).__name__}: {error}"
        try:
            ended.summary = summary = context.write_summary(code, [reason])
            write_report(context, summary)
        except Exception as wrong:  # as on a full disk: what ended the run is what is told of it
            say("end", f"the run's record could not be written ({type(wrong).__name__}: {wrong})")
        end_tracking(context, "stopped" if _outcome(error) == "stopped" else "failed")
        raise
    finally:
        disconnect()
    try:
        ended.summary = summary = context.write_summary(0, [])
        write_report(context, summary)
    except OSError as error:
        raise DpoRayError(
            f"The run has done its work, and what it published stands, but its record in {context.folder} could not "
            f"be written ({error}). Make room there, or see that this user may write; the same command takes over all "
            "that is done and writes a record."
        ) from error
    finally:
        end_tracking(context, "finished")
    return Done(context, summary)


def _outcome(error: BaseException) -> str:
    """Of a run that ended by an error, as its metric names it."""
    if isinstance(error, GateFailed):
        return "gate_failed"
    return "stopped" if isinstance(error, Busy | Interrupted | KeyboardInterrupt | Terminated) else "error"


_KEPT = "What is finished is kept: the same command goes on from there."


@contextmanager
def told_when_interrupted() -> Iterator[None]:
    """typer would end the process without a word, and so would Python on SIGTERM, or not at all as a container's first
    process. Ray turns SIGTERM into sys.exit of its number, once it is connected."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)) if in_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(_KEPT) from error
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            raise Terminated(f"It got SIGTERM, as Kubernetes, Slurm or a shutdown send it. {_KEPT}") from error
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
