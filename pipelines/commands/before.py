"""Commands that look before a run: whether it can be, what it will take, what its data are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dpo_ray.config import load_config, overridden
from dpo_ray.errors import ConfigError
from pipelines.commands.carry_out import carry_out
from pipelines.commands.options import AsJson, ConfigPath, Overrides
from pipelines.record_run import told_when_interrupted
from pipelines.work import stages_until


def doctor(
    config: ConfigPath,
    override: Overrides = None,
    start_engine: Annotated[
        bool,
        typer.Option("--start-engine", help="Start vLLM too, which fetches the model's weights and takes a while."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look whether a configuration can run here, or on the cluster of RAY_ADDRESS, before anything is computed."""
    from dpo_ray.on_ray.session import disconnect
    from pipelines.doctor.examination import examine_file
    from pipelines.doctor.lines import as_told, exit_code, last_words
    from pipelines.terminal import captured

    with captured() as terminal, told_when_interrupted():
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
    as_json: AsJson = False,
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
        carry_out(stages_until(loaded, "tokenize"), None, quiet=True)
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


def data(
    source: Annotated[str, typer.Argument(help="A file, a folder, a glob, a data set of the hub, or a configuration.")],
    override: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each format that are looked through.")] = 1000,
    every: Annotated[bool, typer.Option("--all", help="Look through all rows.")] = False,
    examples: Annotated[int, typer.Option(min=0, help="Pairs of each format that are shown.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what preference data are taken for: format, columns, what is dropped, and some pairs as the model sees them.

    Of a file that is named by itself, -o model.path=… says whose chat template is applied.
    """
    is_config = source.endswith((".yaml", ".yml"))
    tree = {"run": {"name": "data", "output": "out"}, "model": {"path": ""}, "data": {"train": source}}
    loaded = load_config(source, override) if is_config else overridden(tree, override, source)
    if loaded.data.train is None:
        raise ConfigError(
            f"{source} makes its pairs with `generate`, and names no preference data to look at. Name a file or a "
            "folder of pairs."
        )
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
