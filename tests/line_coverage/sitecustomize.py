"""Python runs this at the start of every process that has this folder in PYTHONPATH: coverage.py measures it.

What was seen is saved every second too: Ray ends its workers by SIGKILL, and coverage.py by itself saves at the end.
"""

import atexit
import os
import sys
import threading
import time

DATA = os.environ.get("DPO_RAY_COVERAGE")
CONFIG = os.path.join(os.path.dirname(__file__), "..", "..", "pyproject.toml")
_NEVER_OURS = ("/ray/dashboard/", "/ray/autoscaler/", "log_monitor.py", "/runtime_env/agent/")

measured = None
if DATA and not any(part in argument for argument in sys.orig_argv for part in _NEVER_OURS):
    import coverage

    measured = coverage.Coverage(data_file=DATA, data_suffix=True, config_file=os.path.abspath(CONFIG))
    measured.start()

    def _end() -> None:
        measured.stop()
        measured.save()

    def _keep() -> None:
        while True:
            time.sleep(1)
            measured.save()

    atexit.register(_end)
    threading.Thread(target=_keep, daemon=True).start()
