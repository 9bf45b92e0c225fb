"""Files that installed Python packages carry: package://<importable package>/<path inside it>."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dpo_ray.errors import ConfigError

PACKAGE = "package://"


def package_file(uri: str) -> Path:
    """The file behind package://<importable package>/<path inside it>. Raises ConfigError."""
    package, _, inside = uri.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{uri}: the Python package {package} is not installed. Install it, or name another path.")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file():
        raise ConfigError(f"{uri}: the installed package {package} has no file {inside}. Check the path in it.")
    return path
