"""Where an error came from, in few words."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from traceback import FrameSummary

import pytest

from dpo_ray.origin import innermost, own, places, short

HERE = str(Path(__file__))


def fails() -> None:
    json.loads("{")


def wrapped(direct: bool) -> None:
    try:
        fails()
    except ValueError as error:
        if direct:
            raise RuntimeError("said anew") from error
        raise RuntimeError("another one\nof two lines")  # noqa: B904


def text_of(direct: bool) -> str:
    try:
        wrapped(direct)
    except RuntimeError:
        return traceback.format_exc()
    raise AssertionError


def line_of(code: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(code))


def test_the_innermost_cause_is_told_with_the_last_line_of_own_code():
    told = innermost(text_of(direct=True))
    assert told.startswith("json.decoder.JSONDecodeError: Expecting property name")
    line = line_of('json.loads("{")')
    assert told.endswith(f", at {HERE}:{line} in fails")


def test_an_error_on_the_way_of_another_does_not_stand_for_it():
    told = innermost(text_of(direct=False))
    line = line_of('raise RuntimeError("another one\\nof two lines")')
    assert told == f"RuntimeError: another one of two lines, at {HERE}:{line} in wrapped"


def test_of_rays_text_the_colours_and_its_own_wrapping_are_left_out():
    text = (
        "\x1b[36mray::MapWorker(MapBatches(W)).submit()\x1b[39m (pid=1, ip=192.0.2.2, repr=MapWorker)\n"
        '  File "/home/a/rewards.py", line 5, in score\n'
        "    return helper(completion)\n"
        "           ^^^^^^^^^^^^^^^^^^\n"
        '  File "/home/a/venv/lib/python3.11/site-packages/numpy/core.py", line 3, in mean\n'
        "ValueError: bad.\n"
        "\n"
        "The above exception was the direct cause of the following exception:\n"
        "\n"
        "\x1b[36mray::MapWorker(MapBatches(W)).submit()\x1b[39m (pid=1, ip=192.0.2.2, repr=MapWorker)\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\n"
        "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
    )
    assert innermost(text) == "ValueError: bad, at /home/a/rewards.py:5 in score"


def test_a_text_that_is_no_traceback_is_put_on_one_line():
    assert innermost("The worker died.\n\tpid: 1\n\tout of memory") == "The worker died. pid: 1 out of memory"
    assert len(innermost("x " * 2000)) == 500


def test_where_no_own_code_is_the_last_frame_is_told():
    text = 'Traceback (most recent call last):\n  File "/usr/lib/python3.11/json/a.py", line 7, in f\nKeyError: 1\n'
    assert innermost(text) == "KeyError: 1, at /usr/lib/python3.11/json/a.py:7 in f"


@pytest.mark.parametrize(
    ("file", "is_own"),
    [
        ("/home/a/rewards.py", True),
        ("/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_0/rewards.py", True),
        ("/home/a/venv/lib/python3.12/site-packages/dpo_ray/rewards.py", True),
        ("/home/a/venv/lib/python3.12/site-packages/ray/data/a.py", False),
        ("/usr/lib/python3/dist-packages/numpy/a.py", False),
        ("/usr/lib/python3.11/json/decoder.py", False),
        ("<frozen importlib._bootstrap>", False),
    ],
)
def test_own_code_is_what_is_no_library(file: str, is_own: bool):
    frame = FrameSummary(file, 1, "f", lookup_line=False)
    assert bool(own([frame])) == is_own
    assert own([frame], file) == [frame]


def test_places_begin_where_it_happened():
    frames = [FrameSummary(f"{name}.py", n, name, lookup_line=False) for n, name in enumerate("abcd")]
    assert places(frames) == "d.py:3 in d, called at c.py:2 in c, called at b.py:1 in b"
    assert places([]) == ""


def test_short_messages_stay():
    assert short(" a\n b ") == "a b"
