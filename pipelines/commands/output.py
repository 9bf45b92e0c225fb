"""Commands on an output folder: what lies there, where it is from, which version is the latest, what may go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.options import AsJson

if TYPE_CHECKING:
    from dpo_ray.storage.location import Location
    from dpo_ray.storage.published import Move

Published = Annotated[str, typer.Argument(help="The name that models are published under: run.name.")]
Why = Annotated[str, typer.Option(help="Kept in the record.")]


def show(
    output: Annotated[str, typer.Argument(help="An output folder, or the folder of one run.")],
    last: Annotated[int, typer.Option(min=1, help="The newest so many runs.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="All runs.")] = False,
    as_json: AsJson = False,
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


def lineage(
    output: Annotated[str, typer.Argument(help="The output folder.")],
    asked: Annotated[
        str, typer.Argument(help="A model: name, name/version or version. Or a pair id, a file, or a partition.")
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what a published model was made from, or which published models have seen a row or a file."""
    from dpo_ray.storage.location import Location
    from pipelines.lineage import lines, trace_back

    for line in lines(trace_back(Location.of(output), asked), as_json=as_json):
        typer.echo(line)


def promote(
    output: Annotated[str, typer.Argument(help="The output folder.")],
    name: Published,
    version: Annotated[str, typer.Argument(help="A folder of models/NAME.")],
    why: Why = "",
) -> None:
    """Make a published version the latest one, whatever its gate said."""
    from dpo_ray.storage.published import promote

    _move(output, name, "promote", lambda place: promote(place, name, version, why))


def rollback(output: Annotated[str, typer.Argument(help="The output folder.")], name: Published, why: Why = "") -> None:
    """Make the version the latest one that was so before the present one."""
    from dpo_ray.storage.published import rollback

    _move(output, name, "rollback", lambda place: rollback(place, name, why))


def _move(output: str, name: str, command: str, move: Callable[[Location], Move]) -> None:
    """Move the pointer of a name while nobody else does."""
    from dpo_ray.storage.location import Location
    from dpo_ray.storage.published import published_folder, require_any
    from dpo_ray.tracking.registry import follow_move
    from pipelines.publish import name_lease

    place = Location.of(output)
    require_any(published_folder(place, name))
    with name_lease(place, name, command):
        made = move(place)
        follow_move(published_folder(place, name), made.version, lambda line: typer.echo(line, err=True))
    typer.echo(f"The latest version is {made.version} (before: {made.previous or 'none'}): {made.path}")


def gc(
    output: Annotated[str, typer.Argument(help="The output folder.")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
    older_than: Annotated[str, typer.Option(help="Spare what was written or used since: 7d, 36h, 2w.")] = "7d",
    as_json: AsJson = False,
) -> None:
    """List what no run, sweep or published model needs any more, and remove it if told to."""
    from dpo_ray.storage.location import Location
    from pipelines.gc import collect, lines

    found = collect(Location.of(output), older_than, delete=delete)
    for line in lines(found, as_json=as_json):
        typer.echo(line)
