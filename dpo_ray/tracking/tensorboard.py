"""Event files for TensorBoard, written by tensorboardX, which Ray Tune brings.

The file is written by its EventsWriter and not its SummaryWriter, which queues events for a process-wide thread: what
was taken is to be in the file. An object store appends to nothing, so there the file lies on this machine, and is put
into the store every half a minute.
"""

from __future__ import annotations

import struct
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_ray.storage.location import Location
from dpo_ray.tracking.tracker import Opening, Point, State, Tracker

FOLDER = "tensorboard"
"""Below the run's folder."""
_UPLOAD_S = 30.0
_LARGEST = 4 << 20
"""Bytes of a file that lies in an object store, after which there is another: it is put there whole each time."""
_PARAMS = "configuration"


class TensorBoard(Tracker):
    """Args:
    folder: of the run.
    """

    name = "tensorboard"

    def __init__(self, folder: Location) -> None:
        self._folder = folder / FOLDER
        self._files: dict[str, _EventFile] = {}

    def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
        from tensorboardX.summary import text

        if known:  # by its place among the runs of the output folder, which may be mounted elsewhere now
            _, is_ours, place = known.rpartition("/runs/")
            folder = self._folder.parent.parent / place if is_ours else Location(known)
        else:
            folder = self._folder / opening.whose if opening.whose else self._folder
        last, told = 0, False
        for event in events(folder):
            last = max(last, event.step)
            told = True
        self._files[opening.whose] = file = _EventFile(folder)
        if not told:
            rows = "".join(f"\n| {key} | {value} |" for key, value in opening.params.items())
            file.write(text(_PARAMS, f"| option | value |\n|---|---|{rows}"), 0, time.time())
        file.flush()
        return folder.uri, last

    def log(self, whose: str, points: Sequence[Point]) -> None:
        from tensorboardX.summary import scalar

        file = self._files[whose]
        for point in points:
            for key, value in point.values.items():
                if file.is_new(key, point.step):  # what was taken and not stored is given again
                    file.write(scalar(key, value), point.step, point.when)
        file.flush()

    def conclude(self, whose: str, point: Point) -> None:
        file = self._files[whose]
        known = {(value.tag, event.step) for event in events(file.folder) for value in event.summary.value}
        new = {key: value for key, value in point.values.items() if (key, point.step) not in known}
        self.log(whose, [Point(point.step, point.when, new)])

    def close(self, whose: str, state: State) -> None:
        self._files[whose].close()
        del self._files[whose]  # not before: it may fail, and is tried again

    def way_out(self) -> str:
        return f"See that there is room and that this user may write in {self._folder}, or set track.tensorboard=false."


class _EventFile:
    """One, which is new."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._scratch = None if folder.is_local else tempfile.TemporaryDirectory(prefix="dpo-ray-events-")
        self._local = Path(folder.uri) if self._scratch is None else Path(self._scratch.name)
        self._local.mkdir(parents=True, exist_ok=True)
        self._uploaded = 0.0
        self._steps: dict[str, int] = {}
        """Metric → the last step that was written."""
        self._begin()

    def _begin(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        mine = f".{uuid.uuid4().hex[:8]}"  # else the name tells machine and second alone
        self._writer = EventsWriter(str(self._local / "events"), mine)
        self._writer.flush()
        self._is_open = True
        [self._file] = self._local.glob(f"*{mine}")

    def is_new(self, key: str, step: int) -> bool:
        """Whether a metric was not written for this step or a later one; from now on it was."""
        if step <= self._steps.get(key, -1):
            return False
        self._steps[key] = step
        return True

    def write(self, summary: Any, step: int, when: float) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(summary=summary, step=step, wall_time=when))

    def flush(self) -> None:
        self._writer.flush()
        if self._scratch is not None and time.monotonic() - self._uploaded > _UPLOAD_S:
            self._upload()
            if self._file.stat().st_size > _LARGEST:
                self._writer.close()
                self._file.unlink()
                self._begin()

    def close(self) -> None:
        """Again, where it has failed."""
        if self._is_open:
            self._writer.close()
            self._is_open = False
        if self._scratch is not None:
            self._upload()
            self._scratch.cleanup()

    def _upload(self) -> None:
        Location(str(self._file)).copy_to(self.folder / self._file.name)
        self._uploaded = time.monotonic()


def events(folder: Location) -> Iterator[Any]:
    """The events of all event files right in a folder, file by file; of one that a kill has cut off, what is whole.

    Each is a record of TFRecord's form: its length as 8 bytes, 4 of a checksum, the event, 4 of a checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    for file in folder.children():
        if not file.name.startswith("events."):
            continue
        data = file.read_bytes()
        at = 0
        while at + 12 <= len(data):
            [length] = struct.unpack_from("<Q", data, at)
            end = at + 12 + length
            if end + 4 > len(data):
                break
            yield Event.FromString(data[at + 12 : end])
            at = end + 4
