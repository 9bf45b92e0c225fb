"""How lines and progress are shown: plain lines in a log, one display that stays at the bottom of a terminal."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

_COUNTS = re.compile(r"\[\w+\] (\d+)/(\d+) ")
_BAR = 24


class Display:
    """Plain lines: where no person looks on, or the terminal can do no more."""

    interval = 5.0
    """Seconds between two lines of progress."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def line(self, text: str) -> None:
        """Show a line that stays."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def progress(self, text: str) -> None:
        """Show how far the stage has come: `[stage] done/total …`."""
        self.line(text)

    def plan(self, stages: Sequence[str]) -> None:
        """The stages to come."""

    def stage(self, name: str) -> None:
        """A stage begins, one of the plan or a part of one."""

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """A table of how the stage's parts stand, its head first; none: it goes away."""


class LiveDisplay(Display):
    """Lines run by above; at the bottom stand the stages, done and to come, and how far the one at work has come."""

    interval = 1.0

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        super().__init__(stream)
        self._console = Console(file=stream, highlight=False)
        self._frames = Spinner("dots").frames
        self._plan: list[str] = []
        self._reached = -1
        """Place in the plan of the last stage that began."""
        self._at_work = ""
        self._began = time.monotonic()
        self._progress = ""
        self._table: Sequence[Sequence[str]] = ()
        self.live = Live(
            console=self._console,
            get_renderable=self.render,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def line(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text), soft_wrap=True)

    def progress(self, text: str) -> None:
        self._progress = text

    def plan(self, stages: Sequence[str]) -> None:
        self._plan = list(stages)

    def stage(self, name: str) -> None:
        if name in self._plan:
            self._reached = self._plan.index(name)
        self._at_work, self._began, self._progress = name, time.monotonic(), ""

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        self._table = rows

    def render(self) -> RenderableType:
        from rich.console import Group

        parts = [self._stages()]
        if self._table:
            parts.append(self._rows())
        if self._progress:
            parts.append(self._bar())
        return Group(*parts)

    def _rows(self) -> RenderableType:
        from rich.table import Table

        head, *rows = self._table
        table = Table(*head, box=None, pad_edge=False, header_style="dim")
        for row in rows:
            table.add_row(*row)
        return table

    def _stages(self) -> RenderableType:
        from rich.text import Text

        done = self._plan[: self._reached + 1]
        if self._at_work in done:
            done.remove(self._at_work)
        stages = Text(" ").join(
            [
                *(Text(f"✓ {name}", "green") for name in done),
                Text(f"{self._turning()} {self._at_work or 'start'} {self._elapsed()}"),
                *(Text(f"○ {name}", "dim") for name in self._plan[self._reached + 1 :]),
            ]
        )
        stages.no_wrap, stages.overflow = True, "ellipsis"
        return stages

    def _turning(self) -> str:
        return self._frames[int(time.monotonic() * 10) % len(self._frames)]

    def _elapsed(self) -> timedelta:
        return timedelta(seconds=int(time.monotonic() - self._began))

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row: list[RenderableType] = [Text(self._progress, no_wrap=True, overflow="ellipsis")]
        if found := _COUNTS.match(self._progress):
            done, total = map(int, found.groups())
            row.insert(0, ProgressBar(total=total, completed=done, width=_BAR))
        grid = Table.grid(padding=(0, 1))
        grid.add_row(*row)
        return grid


@contextmanager
def display_on(stream: TextIO, *, plain: bool = False) -> Iterator[Display]:
    """The display that this stream can show: a live one on a terminal, unless it is to be plain."""
    if plain or not stream.isatty() or os.environ.get("TERM") in {None, "dumb"} or os.environ.get("CI"):
        yield Display(stream)
        return
    display = LiveDisplay(stream)
    with display.live:
        yield display
