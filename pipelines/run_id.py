"""The name of a run: that of its folder."""

from __future__ import annotations

import re

from dpo_ray.errors import ConfigError


def require_run_id(run_id: str) -> None:
    """Raises ConfigError where it is no plain name of a folder."""
    if not re.fullmatch(r"\w[\w.:+=@ -]*", run_id):
        raise ConfigError(
            f"{run_id!r} is no name of a run. --run-id names one folder below runs/: letters, digits, spaces and "
            "any of . _ - : + = @, beginning with a letter or a digit."
        )
