"""Where an error came from, in few words: for messages of one paragraph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from traceback import FrameSummary

_SHOWN = 3  # frames
_MESSAGE_BOUND = 500  # characters of a foreign message that are kept
# Installed libraries and Python's own, but for dpo-ray where it is installed.
_LIBRARY = re.compile(
    r"/(?:site|dist)-packages/(?!(?:dpo_ray|pipelines|tuning|cluster)/)"
    r"|/lib/python3[^/]*/(?!(?:site|dist)-packages/)"
    r"|^<"
)
_FRAME = re.compile(r'^  File "([^"\n]+)", line (\d+), in (.+)$', re.M)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINKS = re.compile(
    r"\n+(The above exception was the direct cause of the following exception"
    r"|During handling of the above exception, another exception occurred):\n+"
)


def own(frames: Sequence[FrameSummary], file: str | None = None) -> list[FrameSummary]:
    """The frames in the user's code or in ours, and those in `file`."""
    return [frame for frame in frames if frame.filename == file or not _LIBRARY.search(frame.filename)]


def places(frames: Sequence[FrameSummary]) -> str:
    """The last frames as text, the innermost first; empty where there is none."""
    shown = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames[: -_SHOWN - 1 : -1]]
    return ", called at ".join(shown)


def short(text: str) -> str:
    """A foreign message on one line, and not too long."""
    line = " ".join(_COLOUR.sub("", text).split())
    return line if len(line) <= _MESSAGE_BOUND else f"{line[: _MESSAGE_BOUND - 1]}…"


def innermost(text: str) -> str:
    """Type, message and place of the exception at the bottom of a traceback's text; any other text shortened.

    The bottom is reached along direct causes (raise … from …), for these are what the others say anew.
    """
    parts = _LINKS.split(_COLOUR.sub("", text).strip())
    last = len(parts) - 1
    while last and parts[last - 1].startswith("The above exception was the direct cause"):
        last -= 2
    found = list(_FRAME.finditer(parts[last]))
    if not found:
        return short(text)
    frames = [
        FrameSummary(file, int(line), name, lookup_line=False) for file, line, name in (f.groups() for f in found)
    ]
    lines = parts[last][found[-1].end() :].splitlines()
    # Below a frame its source line and a line of carets may stand.
    while lines and (not lines[0] or lines[0].startswith("    ")):
        lines.pop(0)
    place = places((own(frames) or frames)[-1:])
    return f"{short(' '.join(lines)).rstrip('.')}, at {place}"
