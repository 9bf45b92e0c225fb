"""The folders of models that a node keeps between runs: each made once, used by any number of processes, and bounded.

<cache>/models/<name>/            a whole folder
<cache>/models/.<name>.lock       locked: shared by who uses the folder, exclusively by who makes or evicts it. The time
                                  of its last change is that of the folder's last use
<cache>/models/.making-<name>-*/  what is being made, or was when its maker was killed
<cache>/models/.evicted-*/        what is being removed, or was

The locks are the kernel's (flock), so a killed process holds none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from dpo_ray.errors import ConfigError
from dpo_ray.progress import say

_LIMIT = "DPO_RAY_CACHE_GB"
_held: dict[Path, IO[str]] = {}


def cache_folder() -> Path:
    """Where copied, converted and merged models are kept between runs: $DPO_RAY_CACHE, or dpo-ray below the user's
    cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dpo-ray"
    return Path(os.environ.get("DPO_RAY_CACHE", default)).expanduser()


def held(name: str, fill: Callable[[Path], None], *, num_bytes: int = 0) -> Path:
    """A folder of the cache, made where it is missing, and safe from eviction as long as this process lives.

    Several processes may ask at the same time: one makes it, the others wait. Folders that nobody uses are evicted, the
    longest unused first, where all together are larger than $DPO_RAY_CACHE_GB, or else half of the disk.

    Args:
        fill: writes the content into an empty folder.
        num_bytes: about what it will write, for which room is made before.

    Raises ConfigError where $DPO_RAY_CACHE_GB is no number.
    """
    target = cache_folder() / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target in _held:
        if target.is_dir():
            os.utime(_lock_of(target))
            return target
        _held.pop(target).close()  # somebody emptied the cache
    limit = _limit(target.parent)
    lock = _lock_of(target).open("a")
    made = False
    try:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if target.is_dir():
                break
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _evict(target.parent, limit - num_bytes)
                _make(target, fill)
                made = True
            # Between the two kinds of lock there is none: the folder may be gone again.
        os.utime(_lock_of(target))
    except BaseException:
        lock.close()
        raise
    _held[target] = lock
    if made:
        _evict(target.parent, limit)
    return target


def _make(target: Path, fill: Callable[[Path], None]) -> None:
    for left in target.parent.glob(".making-*"):
        if _target_of(left) == target:  # who made it was killed, for the lock is ours
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".making-{target.name}-"))
    try:
        fill(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _evict(models: Path, limit: int) -> None:
    """Remove what killed processes left, and unused folders until all together have at most `limit` bytes."""
    with (models / ".evicting.lock").open("a") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        for left in models.glob(".evicted-*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in models.glob(".making-*"):
            _remove(left, _target_of(left))
        folders = [folder for folder in models.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        sizes = {folder: _num_bytes(folder) for folder in folders}
        total = sum(sizes.values())
        for folder in sorted(folders, key=_last_use):
            if total <= limit:
                break
            if _remove(folder, folder):
                total -= sizes[folder]
                say("model", f"{folder.name} was longest unused, and is removed from {models} ({_LIMIT})")


def _remove(folder: Path, target: Path) -> bool:
    """Remove a folder if nobody uses or makes the target."""
    with _lock_of(target).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        gone = folder.with_name(f".evicted-{uuid.uuid4().hex}")
        folder.rename(gone)  # it is there as a whole, or not at all
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _target_of(partial: Path) -> Path:
    return partial.with_name(partial.name.removeprefix(".making-").rpartition("-")[0])


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _last_use(folder: Path) -> float:
    lock = _lock_of(folder)
    return lock.stat().st_mtime if lock.exists() else 0.0


def _num_bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def _limit(models: Path) -> int:
    """Bytes that all folders together may have."""
    asked = os.environ.get(_LIMIT)
    if asked is None:
        return shutil.disk_usage(models).total // 2
    try:
        return int(float(asked) * 1e9)
    except ValueError:
        raise ConfigError(
            f"{_LIMIT} is {asked!r}, which is no number: set it to the gigabytes that {models} may hold, or leave it "
            "out for half of the disk."
        ) from None
