"""The bounded folder of models: what is used stays, what is longest unused goes, whoever is killed when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.model import cache
from dpo_ray.model.cache import held
from tests.command_line import LONGEST

LIMIT = 1000


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path))
    monkeypatch.setenv("DPO_RAY_CACHE_GB", str(LIMIT / 1e9))
    monkeypatch.setattr(cache, "_held", {})
    return tmp_path / "models"


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x" * 400)


def make(name: str) -> Path:
    """In a process that ends at once, so that nobody uses the folder."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(held, (name, fill))


def there(models: Path) -> set[str]:
    return {folder.name for folder in models.iterdir() if not folder.name.endswith(".lock")}


class Process:
    """Runs lines of Python beside this process; it is waited for until it says `ready`."""

    def __init__(self, source: str):
        head = "import sys, time, os\nfrom pathlib import Path\nfrom dpo_ray.model.cache import held\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(LONGEST)


USER = """
def fill(folder):
    (folder / "weights").write_bytes(b"x" * 400)

held({name!r}, fill)
print("ready", flush=True)
sys.stdin.read()
"""

MAKER = """
def fill(folder):
    (folder / "half").write_bytes(b"x" * 400)
    print("ready", flush=True)
    time.sleep(600)

held({name!r}, fill)
"""


def test_a_folder_is_made_once_and_leaves_nothing_else(models: Path):
    folder = held("a", fill)
    assert folder == models / "a" and (folder / "weights").stat().st_size == 400
    before = folder.stat().st_mtime_ns
    assert held("a", fill) == folder == make("a") and folder.stat().st_mtime_ns == before
    assert there(models) == {"a"}


def test_what_was_longest_unused_goes_first(models: Path):
    for name in ("a", "b"):
        make(name)
    os.utime(models / ".a.lock", (1, 1))
    os.utime(models / ".b.lock", (2, 2))
    make("a")  # it is used again
    make("c")
    assert there(models) == {"a", "c"}


def test_room_is_made_before_where_the_size_is_known(models: Path):
    make("a")
    make("b")
    seen: list[set[str]] = []

    def watch(folder: Path) -> None:
        seen.append({name for name in there(models) if not name.startswith(".making-")})
        fill(folder)

    os.utime(models / ".a.lock", (1, 1))
    held("c", watch, num_bytes=400)
    assert seen == [{"b"}]


def test_what_another_process_uses_stays_until_it_ends_or_is_killed(models: Path):
    user = Process(USER.format(name="a"))
    user.says("ready")
    os.utime(models / ".a.lock", (1, 1))
    make("b")
    make("c")
    assert there(models) == {"a", "c"}
    user.kill()
    make("d")
    assert there(models) == {"c", "d"}


def test_what_this_process_uses_stays_even_where_all_is_too_large(models: Path):
    folders = [held(name, fill) for name in "abcd"]
    assert all((folder / "weights").is_file() for folder in folders)


def test_a_maker_that_is_killed_leaves_no_half_folder_and_blocks_nobody(models: Path):
    maker = Process(MAKER.format(name="a"))
    maker.says("ready")
    make("b")
    assert any(name.startswith(".making-a-") for name in there(models))  # it is at work, and is left alone
    maker.kill()
    assert not (models / "a").exists()
    assert make("a") == models / "a" and not (models / "a" / "half").exists()
    assert there(models) == {"a", "b"}


def test_what_is_left_of_an_eviction_that_was_killed_is_removed(models: Path):
    make("a")
    (models / "a").rename(models / ".evicted-0")
    make("b")
    assert there(models) == {"b"}
    assert make("a") == models / "a"


def test_two_that_ask_at_once_get_what_one_makes(models: Path):
    slow = USER.replace('b"x" * 400)', 'b"x" * 400)\n    print("made", flush=True)\n    time.sleep(1)')
    first = Process(slow.format(name="a"))
    first.says("made")
    began = time.monotonic()
    second = Process(USER.format(name="a").replace('b"x" * 400', 'b"by the second"'))
    second.says("ready")
    first.says("ready")
    assert (models / "a" / "weights").read_bytes() == b"x" * 400
    assert time.monotonic() - began < LONGEST
    first.kill()
    second.kill()


def test_users_and_makers_at_once_always_have_their_folder(models: Path):
    """Three processes make, use and evict four folders, of which two fit."""
    source = """
import random
from dpo_ray.model import cache

def fill(folder):
    (folder / "weights").write_bytes(b"x" * 400)

random.seed({seed})
for _ in range(60):
    for lock in cache._held.values():
        lock.close()
    cache._held.clear()
    folder = held(random.choice("abcd"), fill)
    assert (folder / "weights").stat().st_size == 400
    time.sleep(random.random() / 500)
    assert (folder / "weights").stat().st_size == 400
print("ready", flush=True)
"""
    processes = [Process(source.format(seed=seed)) for seed in range(3)]
    for one in processes:
        one.says("ready")
        one.process.wait(LONGEST)
    assert there(models) <= set("abcd")


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPO_RAY_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="DPO_RAY_CACHE_GB is 'much'"):
        held("a", fill)


def test_an_emptied_cache_is_filled_again(models: Path):
    for file in (held("a", fill) / "weights", models / "a"):
        file.unlink() if file.is_file() else file.rmdir()
    assert (held("a", fill) / "weights").is_file()
