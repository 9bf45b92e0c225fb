"""A command that runs, whose lines are read as they come."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from tests.command_line import LONGEST


class Running:
    """dpo-ray as a process of its own."""

    started: ClassVar[list[Running]] = []
    """All of this process."""

    def __init__(self, command: Sequence[str], env: dict[str, str]):
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self.started.append(self)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def until(self, pattern: str) -> str:
        """The line that a pattern matches, once it is said."""
        deadline = time.monotonic() + LONGEST
        while True:
            ended = self.has_ended() and not self._reader.is_alive()
            for line in list(self._lines):
                if re.search(pattern, line):
                    return line
            assert not ended and time.monotonic() < deadline, f"{pattern!r} was not said:\n{self.log[-4000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.code()

    def code(self) -> int:
        """Its exit status, once it has ended."""
        code = self.process.wait(LONGEST)
        self._reader.join(60)
        return code

    def require_success(self) -> None:
        code = self.code()
        assert code == 0, f"exit status {code}:\n{self.log[-6000:]}"
