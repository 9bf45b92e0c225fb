"""Commands about configuration files: what may stand in one, and the first one for somebody's data."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path, PurePath
from typing import Annotated

import typer

from dpo_ray.config.load import told
from dpo_ray.errors import ConfigError
from pipelines.commands.options import Overrides


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/configuration.md instead.")] = False,
) -> None:
    """Print the JSON Schema of a configuration, by which an editor completes and checks it."""
    from dpo_ray.config.described import page
    from dpo_ray.config.schema import config_schema, written_schema

    typer.echo(page(config_schema()) if markdown else written_schema(), nl=False)


def init(
    source: Annotated[str, typer.Argument(help="A file, a folder, a glob, or a data set of the hub.")],
    model: Annotated[str, typer.Option(help="What is trained: a folder, a .gguf file, a hub id: model.path.")],
    to: Annotated[Path, typer.Option(help="The file that is written.")] = Path("run.yaml"),
    name: Annotated[str | None, typer.Option(help="run.name; default: by the data.", show_default=False)] = None,
    output: Annotated[str | None, typer.Option(help="run.output; default: out/NAME.", show_default=False)] = None,
    override: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are looked through and measured.")] = 1000,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a configuration for your data, model and machine, with why each value is so.

    What -o sets stands in it, such as -o data.columns.prompt=question where columns have other names.
    """
    if to.exists() and not force:
        raise ConfigError(f"{to} is there already: name another file with --to, or write over it with --force.")
    if not to.parent.is_dir():
        raise ConfigError(f"There is no folder {to.parent}: make it, or name another file with --to.")
    given = dict(map(told, override or []))
    from pipelines.draft.choices import draft
    from pipelines.draft.hardware import Hardware
    from pipelines.draft.written import written
    from pipelines.preview.render import lines

    called = name or _name(source)
    made = draft(source, model, called, output or f"out/{called}", given, Hardware.here(), rows)
    made.config()
    head = [f"Made by: {shlex.join(['dpo-ray', *sys.argv[1:]])}", f"Next: dpo-ray doctor {to}, then dpo-ray run {to}"]
    to.write_text(written(made.choices, head), encoding="utf-8")
    for sheet in made.sheets:
        for line in lines(sheet):
            typer.echo(line)
    if made.lacking is not None:
        said = "Take a smaller model, or run it on a larger machine."
        typer.echo(f"This machine has no room for it: {made.lacking}. {said}")
    typer.echo(f"{to} is written. Look at it, then: dpo-ray doctor {to}; dpo-ray run {to}")


def import_config(
    file: Annotated[Path, typer.Argument(help="A YAML file of TRL's DPO (`trl dpo --config`) or of LLaMA-Factory.")],
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs, or processes, that it trains on: the batch is by them.", show_default=False),
    ] = None,
    data: Annotated[str | None, typer.Option(help="data.train, whatever the file names.", show_default=False)] = None,
    whose: Annotated[
        str | None,
        typer.Option("--from", help="trl or llama-factory; default: by its options.", show_default=False),
    ] = None,
) -> None:
    """Print another trainer's configuration as ours, and what became of each of its options."""
    from pipelines.foreign.file import imported

    typer.echo(imported(file, devices, data, whose), nl=False)


def _name(source: str) -> str:
    """Of a run, by its data."""
    path = PurePath(source.rstrip("/*"))
    stem = path.name.partition(".")[0] or path.parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:63] or "aligned"
