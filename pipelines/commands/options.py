"""Arguments and options that several commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines import require_run_id
from pipelines.completion import overrides

ConfigPath = Annotated[Path, typer.Argument(help="The YAML configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        "-o",
        help="dotted.key=value, over what the file says. Repeatable.",
        autocompletion=overrides,
    ),
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


def checked_run_id(given: str | None) -> str | None:
    if given is not None:
        require_run_id(given)
    return given


RunId = Annotated[
    str | None, typer.Option(callback=checked_run_id, help="Name of the run's folder; default: run.name and the time.")
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

AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


def file_choice(since: str | None, until: str | None, partitions: list[str] | None) -> list[str]:
    """The options as overrides."""
    named = {"since": since, "until": until, "partitions": json.dumps(partitions) if partitions else None}
    return [f"data.{name}={value}" for name, value in named.items() if value is not None]
