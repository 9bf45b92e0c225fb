"""What a person sees while a run works: our own lines, and a log file with all that anybody prints.

Told apart are:

- our own lines: `dpo_ray.progress` marks them, in this process and in Ray's workers, whose output Ray brings here;
- what Ray's nodes and its autoscaler say, `(raylet) …` and `(autoscaler …) …`: that memory or a disk is full, that a
  worker was killed for it, that nothing has room for the work. They are shown too, for a run may stand still by them;
  but not that many processes were started on a node, which trainings side by side do, and which harms nothing;
- everything else is in the log file alone: what libraries and their C++ print or warn, a worker's traceback, what a
  reward function of the user's prints.

What ends a run is an error of ours or an unexpected one, which is shown when the run has ended and names the log file.

Programs get what a person is shown as JSON lines: in a second file, and where it is asked for on the terminal itself.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from dpo_ray.progress import FIELDS_END, LINE, PROGRESS, WATCHED
from pipelines.display import Display, display_on
from pipelines.last_words import SAID, last_words, wanted_traceback
from pipelines.records import Level, Records

LOG = "log.txt"
"""Below the run's folder."""

_HEADS = re.compile(f"[{LINE}{PROGRESS}](?:{{[^{FIELDS_END}\n]*{FIELDS_END})?")
_OF_A_NODE = re.compile(
    r"(\x1b\[\d+m)?\((raylet|autoscaler)\b(, ip=(?P<ip>[^)]+))?(?!.*worker processes have been started on node)"
)


@dataclass(frozen=True)
class Told:
    """What a person is shown of a line."""

    kind: Literal["line", "progress"]
    text: str
    level: Level = "info"
    fields: dict[str, Any] = field(default_factory=dict)
    """Of dpo_ray.progress, where it said them."""


def told_apart(line: str) -> Told | None:
    """None: nothing of it is shown, it is for the log file."""
    if PROGRESS in line:
        return _ours("progress", line.partition(PROGRESS)[2])
    if LINE in line:  # what stands before the mark is the name that Ray gives a worker
        return _ours("line", line.partition(LINE)[2])
    if found := _OF_A_NODE.match(line):
        return Told("line", line, "warning", {"node": found["ip"]} if found["ip"] else {})
    return None


def _ours(kind: Literal["line", "progress"], marked: str) -> Told:
    head, end, text = marked.rpartition(FIELDS_END)
    return Told(kind, text, fields=json.loads(head) if end else {})


class Terminal:
    """The terminal that a person sees, and the log file that stands in its place for everybody else."""

    def __init__(self, display: Display, as_json: bool):
        self.display = display
        self.as_json = as_json
        self.records = Records(display.line if as_json else None)
        self.descriptor, name = tempfile.mkstemp(prefix="dpo-ray-", suffix=".log")
        self.log = Path(name)
        self._is_kept = False
        self._shown = 0

    def keep_log(self, folder: Path) -> None:
        """From now on the log is in this folder, with what it holds already."""
        target = folder / LOG
        shutil.copyfile(self.log, target)
        self.log.unlink()
        self.log, self._is_kept = target, True
        self.records.keep(folder)
        opened = os.open(target, os.O_WRONLY | os.O_APPEND)
        for descriptor in (self.descriptor, 1, 2):
            os.dup2(opened, descriptor)
        os.close(opened)

    def take(self, line: str) -> None:
        """Show a line, if it is one for a person."""
        told = told_apart(line)
        if told is None:
            return
        self._shown += len(f"{told.text}\n".encode())
        self.records.add(_message(told), told.level, **told.fields)
        if self.as_json:
            return
        if told.kind == "line":
            self.display.line(told.text)
        else:
            self.display.progress(told.text)

    def tells_more(self) -> bool:
        """Whether the log is one of a run, or holds what was not shown."""
        return self._is_kept or self.log.stat().st_size > self._shown


def _message(told: Told) -> str:
    """The text without the stage that stands before it, which is a field of its own."""
    return told.text.removeprefix(f"[{told.fields.get('stage')}] ")


class _Captured(io.TextIOWrapper):
    """Standard output and error of this process: into the log file, and by whole lines to the terminal."""

    def __init__(self, terminal: Terminal):
        # It closes the descriptor when nobody has it any more: handlers of loggers keep their streams.
        raw = io.FileIO(terminal.descriptor, "w")
        super().__init__(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
        self._terminal = terminal
        self._begun = threading.local()  # of each thread its own, for print writes the end of a line apart

    def write(self, text: str) -> int:
        super().write(_HEADS.sub("", text))
        *lines, rest = (getattr(self._begun, "line", "") + text).split("\n")
        self._begun.line = rest
        for line in lines:
            self._terminal.take(line)
        return len(text)


@contextmanager
def captured(as_json: bool = False) -> Iterator[Terminal]:
    """Within it, the terminal shows what is for a person, and the log file gets all of it.

    An error that passes gets a note that names the log file, where that holds more than was shown.

    Args:
        as_json: show each line as a record. An error is shown so too, and ends the process with its exit code.
    """
    streams, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    for stream in streams:
        stream.flush()
    with display_on(_apart(sys.stderr), plain=as_json) as display, _watched(display.interval):
        terminal = Terminal(display, as_json)
        for descriptor in (1, 2):
            os.dup2(terminal.descriptor, descriptor)
        sys.stdout = sys.stderr = _Captured(terminal)
        try:
            yield terminal
        except BaseException as error:
            if terminal.tells_more():
                error.add_note(f"{SAID} {terminal.log}.")
            else:
                terminal.log.unlink()
            if isinstance(error, Exception):
                text, code = last_words(error)
                terminal.records.add(f"{wanted_traceback(error)}{text}", "error")
                if as_json:
                    raise SystemExit(code) from error
            raise
        finally:
            terminal.records.close()
            sys.stdout, sys.stderr = streams
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


@contextmanager
def _watched(interval: float) -> Iterator[None]:
    """This process and those that it starts mark their lines."""
    before = os.environ.get(WATCHED)
    os.environ[WATCHED] = str(interval)
    try:
        yield
    finally:
        del os.environ[WATCHED]
        if before is not None:
            os.environ[WATCHED] = before


def _apart(stream: TextIO) -> TextIO:
    """A stream that stays what it is when the descriptors 1 and 2 become others."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):  # not a file, as where a test reads it
        return stream
    if descriptor not in (1, 2):
        return stream
    return open(os.dup(descriptor), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
