"""The metrics of a training's steps, brought from its worker to whoever follows it while it trains.

They lie in a folder that both see, in files of some hundred lines as metrics.jsonl has them, one after the other:
000000.jsonl, 000001.jsonl, … Object stores append to nothing, so the last file is written anew as it grows. A worker
begins with a file of its own, and tells steps again that it makes again: who follows goes by their numbers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.progress import say
from dpo_ray.storage.location import Location

_LINES = 500
_MOST_UNWRITTEN = 100_000
"""Lines that are kept for a folder that cannot be written; trackers miss the others, which metrics.jsonl has."""
_PAUSE_S = 2.0
_PAUSE_OF_STORES_S = 10.0


def steps_folder(training: Location) -> Location:
    """Where they are while a training is not finished.

    Args:
        training: where its artifact lies.
    """
    return training / "checkpoints" / "steps"  # which is removed when it is finished


def told_steps(training: Location) -> list[dict[str, Any]]:
    """The metrics of the steps that an unfinished training has told of, each step once, in order.

    Args:
        training: where its artifact lies.

    Raises OSError or ValueError where they cannot be read.
    """
    by_step = {metrics["step"]: metrics for metrics in StepReader(steps_folder(training)).new()}
    return [by_step[step] for step in sorted(by_step)]


class StepWriter:
    """Written by a thread: a worker never waits for it.

    Args:
        pause: seconds between two writes; None: 2, or 10 to an object store.
        before: metrics of the steps that a training goes on after. The worker that made them may have died before it
            told the last of them.
    """

    def __init__(self, folder: Location, pause: float | None = None, before: Sequence[Mapping[str, Any]] = ()) -> None:
        self._folder, self._before = folder, before
        self._pause = pause if pause is not None else _PAUSE_S if folder.is_local else _PAUSE_OF_STORES_S
        self._lines: list[str] = []
        self._number: int | None = None
        self._written: list[str] = []
        """In the file of that number."""
        self._unwritten: list[str] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Tell of a step."""
        line = json.dumps(metrics)
        with self._lock:
            self._lines.append(line)

    def close(self) -> None:
        """Write what is left."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        told = False
        is_last = False
        while not is_last:
            is_last = self._closing.wait(self._pause)
            try:
                self._write_new()
            except Exception as error:  # the training goes on, and who follows it has its metrics at the end
                if not told:
                    say("train", f"{self._folder}: metrics cannot be told at the moment, tried again later ({error})")
                told = True

    def _write_new(self) -> None:
        with self._lock:
            new, self._lines = self._lines, []
            if len(self._unwritten) + len(new) <= _MOST_UNWRITTEN:
                self._unwritten += new
        if not self._unwritten and not self._before:
            return
        if self._number is None:
            number, last = _end(self._folder)
            self._unwritten[:0] = [json.dumps(metrics) for metrics in self._before if metrics["step"] > last]
            self._number, self._before = number, ()
        while self._unwritten:
            room = _LINES - len(self._written)
            lines = self._written + self._unwritten[:room]
            _file(self._folder, self._number).write_bytes("".join(f"{line}\n" for line in lines).encode())
            self._written, self._unwritten = lines, self._unwritten[room:]
            if len(lines) == _LINES:
                self._number, self._written = self._number + 1, []


class StepReader:
    """Reads what was told, each line once."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self.lock = threading.Lock()
        """Held by the thread that reads."""
        self._number = 0
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """What has been told since the last time, in order."""
        found: list[dict[str, Any]] = []
        while True:
            try:
                # Asked before the file is read: who has begun the next one has written this one to its end.
                has_next = _file(self._folder, self._number + 1).exists()
                some, read = self._rest()
            except (OSError, ValueError):
                if found:  # is given first; the next look tells what is wrong
                    return found
                raise
            found += some
            if not has_next:
                self._read = read
                return found
            self._number, self._read = self._number + 1, 0

    def _rest(self) -> tuple[list[dict[str, Any]], int]:
        """What the file has that was not read, and how many lines it has."""
        try:
            lines = _file(self._folder, self._number).read_bytes().splitlines()
        except FileNotFoundError:
            return [], 0
        return [json.loads(line) for line in lines[self._read :]], len(lines)


def _file(folder: Location, number: int) -> Location:
    return folder / f"{number:06d}.jsonl"


def _end(folder: Location) -> tuple[int, int]:
    """The number of the next file, and the last step that was told."""
    last = max((int(file.name.partition(".")[0]) for file in folder.children()), default=-1)
    if last < 0:
        return 0, 0
    return last + 1, json.loads(_file(folder, last).read_bytes().splitlines()[-1])["step"]
