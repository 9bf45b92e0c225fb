"""The command line: `dpo-ray …`. Errors end as one paragraph and an exit code, never as a bare traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_ray.config import Config, dump_config, load_config, overridden
from dpo_ray.errors import Busy, ConfigError, DpoRayError, GateFailed, Interrupted, Terminated
from dpo_ray.progress import say
from pipelines import STAGES, Stage, planned, require_run_id
from pipelines.last_words import last_words, wanted_traceback

if TYPE_CHECKING:
    from dpo_ray.storage.location import Location
    from dpo_ray.storage.published import Move
    from pipelines.context import RunContext
    from pipelines.hooks import Ended
    from pipelines.terminal import Terminal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Align language models from preference data on a Ray cluster.",
)

ConfigPath = Annotated[Path, typer.Argument(help="The YAML configuration.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="dotted.key=value, over what the file says. Repeatable.")
]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard, as in http://127.0.0.1:8265.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option(help="Print the resolved configuration and the plan, and stop.")]


def _run_id(given: str | None) -> str | None:
    if given is not None:
        require_run_id(given)
    return given


RunId = Annotated[
    str | None, typer.Option(callback=_run_id, help="Name of the run's folder; default: run.name and the time.")
]


Since = Annotated[
    str | None, typer.Option(help="Only files of data.train of this day and later ones, as in 2026-11-01: data.since.")
]
Until = Annotated[str | None, typer.Option(help="Only files of data.train up to this day, it included: data.until.")]
Partitions = Annotated[
    list[str] | None,
    typer.Option(
        "--partition", help="Only files below such folders, as in date=2026-11-01. Repeatable: data.partitions."
    ),
]


def _chosen(since: str | None, until: str | None, partitions: list[str] | None) -> list[str]:
    """The options as overrides."""
    named = {"since": since, "until": until, "partitions": json.dumps(partitions) if partitions else None}
    return [f"data.{name}={value}" for name, value in named.items() if value is not None]


@app.command()
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
    _run_until("publish", config, [*(override or []), *_chosen(since, until, partition)], dry_run, run_id)


def _stage_command(stage: Stage) -> None:
    def command(
        config: ConfigPath,
        override: Overrides = None,
        dry_run: DryRun = False,
        run_id: RunId = None,
        since: Since = None,
        until: Until = None,
        partition: Partitions = None,
    ) -> None:
        _run_until(stage, config, [*(override or []), *_chosen(since, until, partition)], dry_run, run_id)

    command.__doc__ = f"Run the stages up to {stage}; what is finished is taken over."
    app.command(name=stage)(command)


for _stage in STAGES:
    if _stage != "train":
        _stage_command(_stage)


@app.command()
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
    chosen = _chosen(since, until, partition)
    if reference is None:
        _run_until("train", config, [*(override or []), *chosen], dry_run, run_id)
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
        _print_plan(loaded, "train")
        return
    path = reference

    def work(context: RunContext) -> None:
        from pipelines.reference import given_reference
        from pipelines.train import train as train_stage

        train_stage(context, given_reference(context, path))

    _carry_out(loaded, run_id, work, ("train", "--reference", reference), plan=["train"])


@app.command()
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
    _carry_out(loaded, run_id, work, ("sweep",), plan=plan, check_for="publish")


@app.command()
def submit(
    config: ConfigPath,
    address: Address = None,
    override: Overrides = None,
    command: Annotated[str, typer.Option(help="What to run there: run, sweep, iterate or a stage.")] = "run",
    submission_id: Annotated[
        str | None, typer.Option(callback=_run_id, help="Name of the job and of its run; the cluster accepts it once.")
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
        raise ConfigError(f"--command {command}: name one of run, sweep, iterate, {', '.join(STAGES)}.")
    loaded = load_config(config, override)
    if period is not None and not re.fullmatch(r"\w[\w.:+=@-]*", period):
        raise ConfigError(f"--period {period!r}: letters, digits and any of . _ - : + = @, as in 2026-11-01.")
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


job = typer.Typer(no_args_is_help=True, help="Watch or end a job that was submitted.")
app.add_typer(job, name="job")
Job = Annotated[str, typer.Argument(help="The submission id, as `dpo-ray submit` told it.")]


@job.command()
def status(name: Job, address: Address = None) -> None:
    """Tell how a job stands; the exit code is 0 unless it ended badly, and then the job's own."""
    from cluster.jobs import connected, known

    found = known(connected(address), name)
    typer.echo(found.told())
    raise typer.Exit(found.exit_code() if found.ended else 0)


@job.command()
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


@job.command()
def cancel(name: Job, address: Address = None) -> None:
    """End a job. What its stages have finished is kept."""
    from cluster.jobs import cancel as end
    from cluster.jobs import connected

    typer.echo(end(connected(address), name).told())


@app.command()
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

    _carry_out(loaded, run_id, work, ("iterate",), plan=planned(loaded, "publish"), check_for="publish")


def _require_start_from_model(config: Config, command: str, who: str) -> None:
    """Raises ConfigError where train.start says otherwise, which these commands do not follow."""
    if config.train.start != "base":
        raise ConfigError(
            f"train.start={config.train.start} is for `dpo-ray run` and its stages: in `dpo-ray {command}` {who} "
            "start from model.path. Set train.start=base; to go on from a published model, name it as model.path."
        )


Published = Annotated[str, typer.Argument(help="The name that models are published under: run.name.")]
Why = Annotated[str, typer.Option(help="Kept in the record.")]


@app.command()
def promote(
    output: Annotated[str, typer.Argument(help="The output folder.")],
    name: Published,
    version: Annotated[str, typer.Argument(help="A folder of models/NAME.")],
    why: Why = "",
) -> None:
    """Make a published version the latest one, whatever its gate said."""
    from dpo_ray.storage.published import promote

    _move(output, name, "promote", lambda place: promote(place, name, version, why))


@app.command()
def rollback(output: Annotated[str, typer.Argument(help="The output folder.")], name: Published, why: Why = "") -> None:
    """Make the version the latest one that was so before the present one."""
    from dpo_ray.storage.published import rollback

    _move(output, name, "rollback", lambda place: rollback(place, name, why))


def _move(output: str, name: str, command: str, move: Callable[[Location], Move]) -> None:
    """Move the pointer of a name while nobody else does."""
    from dpo_ray.storage.location import Location
    from dpo_ray.storage.published import published_folder, require_any
    from pipelines.publish import name_lease

    place = Location.of(output)
    require_any(published_folder(place, name))
    with name_lease(place, name, command):
        made = move(place)
    typer.echo(f"The latest version is {made.version} (before: {made.previous or 'none'}): {made.path}")


@app.command()
def doctor(
    config: ConfigPath,
    override: Overrides = None,
    start_engine: Annotated[
        bool,
        typer.Option("--start-engine", help="Start vLLM too, which fetches the model's weights and takes a while."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Look whether a configuration can run here, or on the cluster of RAY_ADDRESS, before anything is computed."""
    from dpo_ray.on_ray.session import disconnect
    from pipelines.doctor.examination import examine_file
    from pipelines.doctor.lines import as_told, exit_code, last_words
    from pipelines.terminal import captured

    with captured() as terminal, _told_when_interrupted():
        try:
            found = list(
                examine_file(
                    config,
                    override,
                    starts_engine=start_engine,
                    begins=lambda name: terminal.display.progress(f"[doctor] {name}"),
                )
            )
        finally:
            disconnect()
    code = exit_code(found)
    if as_json:
        typer.echo(as_told(found))
    else:
        for line in found:
            typer.secho(str(line), fg={"ok": None, "warning": "yellow", "failed": "red"}[line.status])
        log = f" What libraries said meanwhile is in {terminal.log}." if code and terminal.tells_more() else ""
        typer.echo(f"{last_words(found)}{log}")
    if not code or as_json or not terminal.tells_more():
        terminal.log.unlink()
    raise typer.Exit(code)


@app.command()
def plan(
    config: ConfigPath,
    override: Overrides = None,
    exact: Annotated[bool, typer.Option("--exact", help="Tokenize all rows first; a run takes that over.")] = False,
    sample: Annotated[int, typer.Option(min=1, help="Rows that are tokenized where nothing is yet.")] = 2000,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.0, help="State how fast the training is, instead of earlier runs.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Or the share of the peak that is reached.")
    ] = None,
    peak_tflops: Annotated[float | None, typer.Option(min=0.0, help="Peak of a GPU, or a worker, in TFLOP/s.")] = None,
    memory_gib: Annotated[float | None, typer.Option(min=0.0, help="Memory of a GPU, or of a worker on CPUs.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0.0, help="Of a GPU; of a process without one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Count what a run will take: rows, tokens, memory, time, cost; and what it takes over. Nothing is computed."""
    loaded = load_config(config, override)
    from pipelines.plan.speeds import Stated

    stated = Stated(tokens_per_second, mfu, peak_tflops)
    if exact:
        if loaded.generate is not None:
            raise ConfigError(
                "--exact tokenizes all rows, and with `generate` they are sampled first, which is most of the work. "
                "Leave --exact out, or run `dpo-ray generate`."
            )
        _tokenize_all(loaded)
    from dpo_ray.model.pin import pinned
    from pipelines.plan.render import lines
    from pipelines.plan.stages import as_dict, make_plan

    memory = int(memory_gib * 2**30) if memory_gib is not None else None
    made = make_plan(pinned(loaded), rows=sample, stated=stated, memory=memory, price=price_per_hour)
    if as_json:
        typer.echo(json.dumps(as_dict(made)))
        return
    for line in lines(made):
        typer.echo(line)


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="A file, a folder, a glob, a data set of the hub, or a configuration.")],
    override: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each format that are looked through.")] = 1000,
    every: Annotated[bool, typer.Option("--all", help="Look through all rows.")] = False,
    examples: Annotated[int, typer.Option(min=0, help="Pairs of each format that are shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what preference data are taken for: format, columns, what is dropped, and some pairs as the model sees them.

    Of a file that is named by itself, -o model.path=… says whose chat template is applied.
    """
    is_config = source.endswith((".yaml", ".yml"))
    tree = {"run": {"name": "data", "output": "out"}, "model": {"path": ""}, "data": {"train": source}}
    loaded = load_config(source, override) if is_config else overridden(tree, override, source)
    if loaded.data.train is None:
        raise ConfigError(f"{source} makes its pairs with `generate`, and names no preference data to look at.")
    from pipelines.preview.render import as_dict, lines
    from pipelines.preview.sheet import sheets

    found = sheets(loaded, None if every else rows, examples, with_model=bool(loaded.model.path))
    if as_json:
        typer.echo(json.dumps([as_dict(sheet) for sheet in found], ensure_ascii=False))
        return
    for sheet in found:
        for line in lines(sheet):
            typer.echo(line)
    if not loaded.model.path:
        typer.echo("\nWithout a model no chat template is applied and no token counted: name one with -o model.path=…")


def _tokenize_all(config: Config) -> None:
    def work(context: RunContext) -> None:
        from pipelines.align import align

        align(context, until="tokenize")

    plan = planned(config, "tokenize")
    _carry_out(config, None, work, ("tokenize",), plan=plan, check_for="tokenize", quiet=True)


@app.command()
def show(
    output: Annotated[str, typer.Argument(help="An output folder, or the folder of one run.")],
    last: Annotated[int, typer.Option(min=1, help="The newest so many runs.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="All runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the newest runs of an output folder: data, measures, outcome, cost; and which models are the latest."""
    from dpo_ray.storage.location import Location
    from pipelines.history import lines, page

    place = Location.of(output)
    if (place / "summary.json").exists():
        typer.echo((place / "summary.json").read_bytes().decode())
        return
    for line in lines(page(place, None if every else last), as_json=as_json):
        typer.echo(line)


@app.command()
def lineage(
    output: Annotated[str, typer.Argument(help="The output folder.")],
    asked: Annotated[
        str, typer.Argument(help="A model: name, name/version or version. Or a pair id, a file, or a partition.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Tell what a published model was made from, or which published models have seen a row or a file."""
    from dpo_ray.storage.location import Location
    from pipelines.lineage import lines, trace_back

    for line in lines(trace_back(Location.of(output), asked), as_json=as_json):
        typer.echo(line)


@app.command()
def gc(
    output: Annotated[str, typer.Argument(help="The output folder.")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
    older_than: Annotated[str, typer.Option(help="Spare what was written or used since: 7d, 36h, 2w.")] = "7d",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List what no run, sweep or published model needs any more, and remove it if told to."""
    from dpo_ray.storage.location import Location
    from pipelines.gc import collect, lines

    found = collect(Location.of(output), older_than, delete=delete)
    for line in lines(found, as_json=as_json):
        typer.echo(line)


def _run_until(stage: Stage, path: Path, overrides: list[str] | None, dry_run: bool, run_id: str | None) -> None:
    config = load_config(path, overrides)
    if dry_run:
        _print_plan(config, stage)
        return

    def work(context: RunContext) -> None:
        from pipelines.align import align

        align(context, until=stage)

    def is_done(context: RunContext) -> bool:
        from pipelines.nothing_new import is_nothing_new

        return is_nothing_new(context)

    may_be_done = is_done if stage == "publish" else None
    command = ("run" if stage == "publish" else stage,)
    _carry_out(config, run_id, work, command, plan=planned(config, stage), check_for=stage, is_done=may_be_done)


def _print_plan(config: Config, stage: Stage) -> None:
    from pipelines.show import plan_lines

    typer.echo(dump_config(config))
    for line in plan_lines(config, stage):
        typer.echo(f"# {line}")


def _carry_out(
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
    with captured(as_json) as terminal, _told_when_interrupted(), told_when_ended(config) as ended:
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

    context = RunContext.start(config, run_id)
    context.command = command
    ended.folder = context.folder.uri
    terminal.records.run = context.run_id
    if context.folder.is_local:
        terminal.keep_log(Path(context.folder.uri))
    context.begins = terminal.display.stage
    context.table = terminal.display.table
    try:
        with _told_when_interrupted():
            if is_done is None or not is_done(context):
                if not is_embedded():
                    from pipelines.needs import check_cluster

                    check_cluster(config, context.output, plan)
                work(context)
        count(RUNS, outcome="ok")
    except BaseException as error:
        count(RUNS, outcome=_outcome(error))
        code = error.exit_code if isinstance(error, DpoRayError) else 1
        reason = str(error) if isinstance(error, DpoRayError) else f"{type(error).__name__}: {error}"
        ended.summary = summary = context.write_summary(code, [reason])
        write_report(context, summary)
        raise
    finally:
        disconnect()
    ended.summary = summary = context.write_summary(0, [])
    write_report(context, summary)
    return closing_lines(context, summary, terminal.log)


def _outcome(error: BaseException) -> str:
    """Of a run that ended by an error, as its metric names it."""
    if isinstance(error, GateFailed):
        return "gate_failed"
    return "stopped" if isinstance(error, Busy | Interrupted | KeyboardInterrupt | Terminated) else "error"


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our progress lines, in place of every library's bars
    try:
        app()
    except Exception as error:
        text, code = last_words(error)
        typer.echo(f"{wanted_traceback(error)}\n{text}", err=True)
        sys.exit(code)


@contextmanager
def _told_when_interrupted() -> Iterator[None]:
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


if __name__ == "__main__":
    main()
