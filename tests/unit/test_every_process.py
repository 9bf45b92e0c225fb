"""The measuring of every process that the tests start must not change what the process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORTED_MEANWHILE = """
import sys
import types
import dpo_ray
import sitecustomize

class Packages(list):
    def __iter__(self):  # between coverage.py's two looks at sys.modules another thread begins an import
        sys.modules["meanwhile"] = types.ModuleType("meanwhile")
        return iter(())

sitecustomize.measured._inorout.source_pkgs = Packages()
sys.path.append("/as/ray/does")
import dpo_ray.bins  # at a new file coverage.py sees that sys.path has changed
print("meanwhile" in sys.modules)
"""


def test_what_another_thread_imports_meanwhile_stays(tmp_path):
    environment = {
        **os.environ,
        "DPO_RAY_COVERAGE": str(tmp_path / ".coverage"),
        "PYTHONPATH": f"{ROOT / 'tests' / 'every_process'}:{ROOT}",
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_MEANWHILE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "True\n", done.stderr
