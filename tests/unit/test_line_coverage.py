"""Marks on lines tell what Python itself says of a program that is traced."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from tests.command_line import LONGEST
from tests.line_coverage.covered_lines import FOLDER, ROOT, lines_run, marking

PROGRAM = '''"""A docstring."""
from __future__ import annotations
import functools

@functools.cache
def kind(value: object) -> str:
    """Another."""
    match value:
        case int():
            return "number"
        case _:
            pass
    try:
        len(value)
    except TypeError:
        return "other"
    else:
        found = "sized"
    finally:
        value = None
    return found

class Empty:
    """Nothing else."""

class Pair:
    left: int = 1
    right = (
        2,
    )

for item in (1, "text", None):
    if kind(item) == "never":
        print("not run")
    elif item:
        continue
    else:
        with open(__file__): kind(3)
'''

DOCSTRINGS = {1, 24}  # Python sets them as attributes of the module and of the class


def traced(code: Any) -> set[int]:
    lines = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename == __file__ and event == "line":
            lines.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        exec(code, {"__name__": "traced", "__file__": __file__})
    finally:
        sys.settrace(before)
    return lines


def test_the_marked_lines_are_those_that_python_runs():
    expected = traced(compile(PROGRAM, __file__, "exec"))
    marks: dict[int, int] = defaultdict(int)
    program = compile(marking(ast.parse(PROGRAM)), __file__, "exec")
    exec(program, {"__name__": "marked", "__file__": __file__, "__marks__": marks})
    assert set(marks) == expected - DOCSTRINGS


SEND = """
import sys, cloudpickle
from dpo_ray import bins
cloudpickle.register_pickle_by_value(bins)
sys.stdout.buffer.write(cloudpickle.dumps(bins.batches))
"""
RECEIVE = """
import os, pickle, signal, sys
assert list(pickle.load(sys.stdin.buffer)([1, 2], lambda size: size, 2)) == [[1], [2]]
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_has_marked_the_lines_of_a_function_that_was_sent_to_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "line_coverage"), str(ROOT)]))
    source = ROOT / "dpo_ray" / "bins.py"
    inside = source.read_text().splitlines().index("        size = size_of(item)") + 1

    def run(program: str, received: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([sys.executable, "-c", program], input=received, capture_output=True, timeout=LONGEST)

    sent = run(SEND)
    assert sent.returncode == 0, sent.stderr
    assert lines_run(source) and inside not in lines_run(source)
    done = run(RECEIVE, sent.stdout)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert inside in lines_run(source)
