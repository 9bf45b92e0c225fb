"""Leases: of two runs that would write the same, one works and the other waits or leaves.

<output>/leases/<name>.json holds who works: the run, user and machine, process, and a heartbeat that the holder renews
every 10 s. The file is only ever replaced where it still is what was last seen of it (dpo_ray.storage.conditional), so
that of two who take a lease one gets it, and a holder who has lost his learns of it with his next heartbeat.

A lease is taken over when it has expired: whoever waits has seen one and the same heartbeat for 60 s *by his own
monotonic clock*. No machine's clock is compared with another's. On the holder's own machine, where it can be seen that
its process has ended, nobody waits for that.

What a lease cannot do: a holder that is stopped (SIGSTOP, a machine that sleeps) between its last `require` and the
write that follows, for more than 60 s, still writes when it goes on. Both would then have written the same artifact, or
moved a pointer that both were allowed to move.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import Busy, ConfigError, LeaseLost, StorageError
from dpo_ray.progress import waiting
from dpo_ray.storage.conditional import ConditionalFile, Seen, conditional_file
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import has_ended, started, this_machine
from dpo_ray.storage.published import who

EXPIRY = 60.0
"""Seconds without a heartbeat after which a lease may be taken over."""
_RENEWAL = 10.0
_LOOK = 2.0  # seconds between two looks at a lease that another run holds
_TOLD = 60.0

WhenBusy = Literal["wait", "leave"]


class Record(BaseModel):
    """What the file of a lease says."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    holder: str
    """The one attempt to hold it; a process may make several."""
    run_id: str
    by: str
    """user@machine"""
    pid: int
    process: str | None
    """The process among all of its machine since that started, to tell it from a later one of the same number."""
    machine: str | None
    """Where `pid` means this process: a boot of a kernel and a namespace of process ids."""
    since: str
    beat: int = 0
    held: bool = True
    """False once it was given back."""

    def __str__(self) -> str:
        return f"run {self.run_id} by {self.by} (process {self.pid}), since {self.since}"


@dataclass(frozen=True)
class Clock:
    """Time as a waiting run takes it."""

    now: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


def lease_file(output: Location, name: str) -> Location:
    """Where a lease lies below the folder run.output."""
    return output / "leases" / f"{name}.json"


def require_leases(output: Location) -> None:
    """Raises ConfigError where leases cannot be held below run.output, which is otherwise told after hours of work."""
    if output.is_local:
        return
    try:
        conditional_file(lease_file(output, "probe")).read()
    except StorageError as error:
        raise ConfigError(
            f"Leases, which keep two runs at once apart, cannot be read below run.output={output}: {error} They take "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from the environment, or the machine's role, and not the "
            'profiles of ~/.aws: eval "$(aws configure export-credentials --format env)" sets them.'
        ) from error


class Lease:
    """One that this process holds, from `hold`."""

    def __init__(self, file: ConditionalFile, record: Record, seen: Seen, what: str, tell: Callable[[str], None]):
        self._file, self._record, self._seen, self._what, self._tell = file, record, seen, what, tell
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.lost: str | None = None
        """To whom, once it is lost."""

    def require(self) -> None:
        """Renew now: to be called just before what only the holder may do. Raises LeaseLost, and StorageError where the
        store does not answer."""
        with self._lock:
            self._renew()

    def _renew(self, *, held: bool = True) -> None:
        while self.lost is None:
            record = self._record.model_copy(update={"beat": self._record.beat + 1, "held": held})
            seen = self._file.swap(self._seen, _content(record))
            if seen is not None:
                self._record, self._seen = record, seen
                return
            now = self._file.read()
            other = _parsed(now)
            if now is not None and other is not None and other.holder == record.holder:
                self._seen = now  # a heartbeat that arrived though its reply did not
                continue
            self.lost = (
                f"{self._what} was taken over from this run, which gave no sign for {EXPIRY:g} s: by "
                f"{other or 'another run, which has removed the lease since'}. This run stops, and has published "
                "nothing of it; the other one goes on from its checkpoints. The same command takes over what it makes."
            )
        raise LeaseLost(self.lost)

    def _beat(self, on_lost: Callable[[], None]) -> None:
        told = False
        while not self._ended.wait(_RENEWAL):
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    self._renew()
                except LeaseLost:
                    on_lost()
                    return
                except OSError as error:  # StorageError too: the next beat may arrive, and `require` asks in the end
                    if not told:
                        self._tell(f"the lease of {self._what} could not be renewed, and is tried again: {error}")
                    told = True

    def _give_back(self) -> None:
        try:
            with self._lock, suppress(LeaseLost):  # the end of the block tells it
                self._renew(held=False)
        except OSError as error:
            self._tell(f"the lease of {self._what} could not be given back, and expires in {EXPIRY:g} s: {error}")


@contextmanager
def hold(
    output: Location,
    name: str,
    what: str,
    *,
    run_id: str,
    when_busy: WhenBusy = "wait",
    tell: Callable[[str], None],
    while_waiting: Callable[[], None] = lambda: None,
    on_lost: Callable[[], None] | None = None,
    clock: Clock | None = None,
) -> Iterator[Lease]:
    """Hold a lease for the length of the block, which takes as long as the run that holds it now.

    Args:
        name: of the lease, in this output folder.
        what: it is of, for messages: "The training of …".
        when_busy: wait until the other run has ended, or leave as soon as it is seen to be alive.
        tell: says a line.
        while_waiting: called every two seconds while another run holds it; what it raises ends the wait.
        on_lost: called by another thread when the lease was lost, to end the work of the block. Left out: the main
            thread is interrupted, as by Ctrl-C, where the block is run by it.

    Raises Busy where another run holds it and this one is to leave. Raises LeaseLost at the end of a block in which the
    lease was lost, whatever the block itself raised. Raises StorageError where the store does not answer.
    """
    file = conditional_file(lease_file(output, name))
    mine = _record(run_id)
    seen = _acquire(file, mine, what, when_busy, tell, while_waiting, clock or Clock())
    lease = Lease(file, mine, seen, what, tell)
    end_work = on_lost or _interrupting(threading.current_thread())
    threading.Thread(target=lease._beat, args=(end_work,), name=f"lease {name}", daemon=True).start()
    try:
        try:
            with _interruptible(lease):
                yield lease
        finally:
            lease._ended.set()
            lease._give_back()
    except BaseException as error:  # the interrupt may come as late as the giving back
        if lease.lost is None:
            raise
        raise LeaseLost(lease.lost) from error
    if lease.lost is not None:
        raise LeaseLost(lease.lost)


@contextmanager
def _interruptible(lease: Lease) -> Iterator[None]:
    """Where SIGINT is ignored, as by what a script starts with `&`: inside, it is still, until the lease is lost."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if lease.lost is not None:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupting(thread: threading.Thread) -> Callable[[], None]:
    """Interrupts what the thread does, as Ctrl-C would; nothing where it is not the main thread, which alone can be."""
    ident = thread.ident
    if thread is not threading.main_thread() or ident is None:
        return lambda: None
    return lambda: signal.pthread_kill(ident, signal.SIGINT)


def _acquire(
    file: ConditionalFile,
    mine: Record,
    what: str,
    when_busy: WhenBusy,
    tell: Callable[[str], None],
    while_waiting: Callable[[], None],
    clock: Clock,
) -> Seen:
    began = clock.now()
    same: Seen | None = None
    since, told = began, -_TOLD
    while True:
        found = file.read()
        record = _parsed(found)
        if record is not None and record.holder == mine.holder:
            assert found is not None
            return found  # this run's own, whose reply was lost
        moved = same is not None and found is not None and found.content != same.content
        if found is None or same is None or moved:
            same, since = found, clock.now()
        is_dead = record is not None and _has_ended(record)
        expired = clock.now() - since >= EXPIRY
        if found is None or (record is not None and not record.held) or is_dead or expired:
            if record is not None and record.held:
                why = "whose process has ended" if is_dead else f"which has given no sign for {EXPIRY:g} s"
                tell(f"{what} is taken over from {record}, {why}")
            taken = file.swap(found, _content(mine))
            if taken is not None:
                return taken
            continue
        holder = record or "another run"
        if when_busy == "leave" and (moved or (record is not None and _is_here(record))):
            raise Busy(
                f"{what} is the work of {holder}. This run leaves it to that one (run.when_busy=leave): the same "
                "command later takes over what it makes, and with -o run.when_busy=wait it waits for it."
            )
        if clock.now() - told >= _TOLD:
            waited = clock.now() - began
            after = f"; {waited / 60:.0f} min so far" if waited >= _TOLD else ""
            tell(f"{what} is the work of {holder}: waiting until it has ended{after}")
            told = clock.now()
        with waiting(f"{what} is the work of {holder}"):
            while_waiting()
            clock.pause(_LOOK)


def _record(run_id: str) -> Record:
    pid = os.getpid()
    return Record(
        holder=uuid.uuid4().hex,
        run_id=run_id,
        by=who(),
        pid=pid,
        process=started(pid),
        machine=this_machine(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _content(record: Record) -> bytes:
    return record.model_dump_json(indent=1).encode()


def _parsed(seen: Seen | None) -> Record | None:
    """None also of a file that was cut off by a power cut: it expires like any other that nobody renews."""
    try:
        return Record.model_validate_json(seen.content) if seen is not None else None
    except ValidationError:
        return None


def _is_here(record: Record) -> bool:
    """Whether the holder's process would be seen from here."""
    return record.machine is not None and record.machine == this_machine()


def _has_ended(record: Record) -> bool:
    """Whether the holder's process is known to have ended."""
    return has_ended(record.machine, record.pid, record.process)
