"""What benchmark tasks are known by: the version of lm-evaluation-harness, their names, and the files of one's own.

It needs no torch, and lm_eval itself, which takes seconds, only to look names up.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_ray.config import Tasks
from dpo_ray.errors import ConfigError
from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location

_SUGGESTED = 5


def require_harness() -> str:
    """The version of the installed lm-evaluation-harness. Raises ConfigError where there is none."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.tasks needs lm-evaluation-harness, which is not installed. Install it on every node (pip install "
            "'dpo-ray[tasks]'), or leave evaluate.tasks out."
        )
    return importlib.metadata.version("lm_eval")


def tasks_folder(options: Tasks) -> Path | None:
    """The folder of one's own task files, absolute; None: the library's tasks alone. Raises ConfigError."""
    if options.include_path is None:
        return None
    folder = Path(options.include_path).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"evaluate.tasks.include_path is {options.include_path}, and there is no such folder. Name a local folder "
            "of task files (*.yaml), or leave it out for the library's tasks alone."
        )
    return folder


def task_files_hash(folder: Path | None) -> str | None:
    """Digest over all that lies in a folder of task files and below, by place and content.

    So the Python functions that the tasks use and data sets beside them count; what lies elsewhere does not.
    """
    if folder is None:
        return None
    # Python writes its own there as soon as a task's function is imported.
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return digest([(file.relative_to(folder).as_posix(), file_hash(Location.of(file))) for file in files])


def require_same_files(folder: Path | None, known: str | None) -> None:
    """Raises ConfigError where the task files here are not those that the driver knows by their hash."""
    if folder is not None and (not folder.is_dir() or task_files_hash(folder) != known):
        raise ConfigError(
            f"The task files in {folder} are not the same on every node, or changed while the run went on. Put them "
            "where all nodes see the same ones, and run again."
        )


def require_tasks(options: Tasks) -> None:
    """Tasks that lm-evaluation-harness knows, by its own files or by those of include_path.

    Raises ConfigError where it is not installed, include_path is no folder, a name is unknown, or a task would run code
    that the model writes.
    """
    version = require_harness()
    folder = tasks_folder(options)
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=folder).task_index
    for name in options.names:
        if name not in index:
            raise ConfigError(_unknown(name, index, version, folder))
        for member, entry in _with_members(name, index):
            if (entry.cfg or {}).get("unsafe_code"):
                among = "" if member == name else f" (of {name})"
                raise ConfigError(
                    f"The task {member}{among} in evaluate.tasks.names runs code that the model writes, on the machine "
                    "that measures it, which dpo-ray does not do: leave it out, and run lm-eval by hand on the "
                    "published model, on a machine that may come to harm."
                )


def _unknown(name: str, index: Mapping[str, Any], version: str, folder: Path | None) -> str:
    close = difflib.get_close_matches(name, index, n=_SUGGESTED)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    own = f" or in {folder} (a file there that is no valid task is passed over)" if folder else ""
    return (
        f"evaluate.tasks.names has {name}, and there is no such task in lm_eval {version}{own}.{meant} `lm-eval ls "
        "tasks` lists all; tasks of your own need evaluate.tasks.include_path, the folder of their files."
    )


def _with_members(name: str, index: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A task, tag or group by name with its entry of the index, and those that it stands for."""
    found: dict[str, Any] = {}
    left = [name]
    while left:
        one = left.pop()
        if one in found or one not in index:  # a group may define tasks in its own file
            continue
        found[one] = entry = index[one]
        left += entry.tags if entry.kind.name == "TAG" else []
        if entry.kind.name == "GROUP":
            children = entry.cfg["task"]
            for child in children if isinstance(children, list) else [children]:
                left.append(child if isinstance(child, str) else child.get("task") or child.get("group"))
    yield from found.items()
