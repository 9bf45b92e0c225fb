"""How often a process died over a piece of work, noted where the next process that tries it can read it.

A process that is killed for its memory, or ends by a segmentation fault, cannot report it, and Ray Data starts it again
for ever. So each attempt is noted before it begins, and the note is removed when the attempt has ended.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import DpoRayError
from dpo_ray.storage.location import Location

MOST_DEATHS = 6
"""The work is given up when so many processes have died over it: one may be lost with its node, and another one."""


class _Note(BaseModel):
    model_config = ConfigDict(extra="forbid")

    run: str
    hosts: list[str]
    """Where each attempt began."""


@dataclass(frozen=True)
class Deaths:
    """Of the processes that tried one piece of work, one after the other."""

    note: Location
    """A file that is there only while the work is tried."""
    work: str
    """In a message, after "that tried"."""
    run: str
    """The attempts of another run do not count: who started it may have killed it."""

    @contextmanager
    def attempt(self) -> Iterator[int]:
        """Around the work; see `begin`."""
        died = self.begin()
        try:
            yield died
        finally:
            self.end()

    def begin(self) -> int:
        """Before the work. Returns how many have died over it, and raises DpoRayError where these are too many."""
        hosts = self._hosts()
        if len(hosts) >= MOST_DEATHS:
            self.end()
            where = ", ".join(f"{hosts.count(host)} times on {host}" for host in dict.fromkeys(hosts))
            raise DpoRayError(
                f"All of {len(hosts)} processes died that tried {self.work} ({where}), and could not say why. Too "
                "little memory is the common cause: give workers more of it, have fewer beside each other, or lower "
                "data.rows_per_shard. Look for their last words in the workers' logs there "
                "(/tmp/ray/session_latest/logs) and in the kernel's (dmesg). What is finished is kept: the same "
                "command tries the rest again."
            )
        self.note.write_bytes(_Note(run=self.run, hosts=[*hosts, socket.gethostname()]).model_dump_json().encode())
        return len(hosts)

    def end(self) -> None:
        """After the work, whether it succeeded or raised: the process is alive."""
        self.note.remove()

    def _hosts(self) -> list[str]:
        try:
            found = _Note.model_validate_json(self.note.read_bytes())
        except (FileNotFoundError, ValidationError):  # a damaged note counts for none: it is written anew
            return []
        return found.hosts if found.run == self.run else []
