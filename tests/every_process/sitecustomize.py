"""Python runs this at the start of every process that has this folder in PYTHONPATH, Ray's and vLLM's too.

With DPO_RAY_COVERAGE coverage.py measures the process, from the first import of a package of ours on: it slows every
line that a process runs, and most of Ray's processes run none of ours. What was seen is saved now and then too, for Ray
ends its workers by SIGKILL, and coverage.py by itself saves at the end.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType

DATA = os.environ.get("DPO_RAY_COVERAGE")
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
PACKAGES = ("dpo_ray", "pipelines", "tuning", "cluster")
FOLDERS = [os.path.join(ROOT, package) for package in PACKAGES]

# Seconds between two saves. Each looks up the paths of all our files, so they grow rarer the longer a process lives.
SOONEST, RAREST = 1, 32

measured = None
"""The process's Coverage, once it has begun."""


class _First:
    """Stands before the finders of modules until the first of ours is looked for; finds nothing itself."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in PACKAGES:
            sys.meta_path.remove(_First)
            _begin()
        return None


def _begin() -> None:
    global measured
    import coverage
    import coverage.inorout

    # Whenever sys.path has changed, as Ray changes it, coverage.py looks for packages to measure, of which it has none,
    # and takes out of sys.modules whatever another thread imports meanwhile.
    coverage.inorout.sys_modules_saved = nullcontext
    measured = coverage.Coverage(
        data_file=DATA, data_suffix=True, config_file=os.path.join(ROOT, "pyproject.toml"), source_dirs=FOLDERS
    )
    measured.start()
    _leave_out_imports_of_others()
    ends = threading.Event()

    def keep() -> None:
        seconds = SOONEST
        while not ends.wait(seconds):
            measured.save()
            seconds = min(2 * seconds, RAREST)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()

    @atexit.register
    def end() -> None:
        ends.set()
        keeper.join()  # what still runs when Python takes itself apart can crash the process
        measured.stop()
        measured.save()


def _leave_out_imports_of_others() -> None:
    """None of our lines runs while another's module is executed, and following those is a third of an import's time."""
    execute = SourceFileLoader.exec_module

    def untraced(loader: SourceFileLoader, module: ModuleType) -> None:
        tracer = None if module.__name__.partition(".")[0] in PACKAGES else sys.gettrace()
        if tracer is None:
            execute(loader, module)
            return
        sys.settrace(None)
        try:
            execute(loader, module)
        finally:
            sys.settrace(tracer)
            _call()

    SourceFileLoader.exec_module = untraced


def _call() -> None:
    """At the call of a function coverage.py's tracer takes up its work again."""


# The libraries that a process imports are most of the tests' work, and millions of objects that stay: to look through
# them for garbage at every 700th is a fifth of it.
gc.set_threshold(100_000)
if DATA:
    sys.meta_path.insert(0, _First)
