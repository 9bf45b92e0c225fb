"""Looking on while a run is at work, from anywhere that its folder can be read."""

from __future__ import annotations

import time
from typing import Annotated

import typer

_LOOK_S = 5.0
"""Seconds between two looks: what is looked at is written every ten."""


def watch(
    output: Annotated[str, typer.Argument(help="An output folder, whose newest run is meant, or the folder of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once, as without a terminal.")] = False,
) -> None:
    """Show how a run stands, until it has ended: stages, shards, curves of the training, trials, its last words.

    It reads what the run stores, from any machine, and starts nothing.
    """
    from rich.console import Console
    from rich.live import Live

    from dpo_ray.storage.location import Location
    from pipelines.watch.reading import Watched, run_folder
    from pipelines.watch.render import render

    watched = Watched(run_folder(Location.of(output)))
    console = Console(highlight=False)
    if once or not console.is_terminal:
        console.print(render(watched.look(), console.width))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        try:
            while True:
                look = watched.look()
                live.update(render(look, console.width), refresh=True)
                if look.state in {"ended", "dead"}:
                    return
                time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            return  # who looks on ends nothing by it
