"""Python runs this at the start of every process that has this folder in PYTHONPATH."""

import os

if os.environ.get("DPO_RAY_COVERAGE"):
    import covered_lines

    covered_lines.install()
