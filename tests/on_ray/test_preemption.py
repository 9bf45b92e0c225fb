"""When a checkpoint is due before a node goes: at the warning, and again just before its deadline."""

from __future__ import annotations

import pytest
import ray.train
import torch
from ray.train import PreemptionInfo

from dpo_ray.on_ray import preemption
from dpo_ray.on_ray.preemption import Forewarning, preemption_is_watched, watch_for_preemption
from dpo_ray.training.parallel import Rank

NODE, OTHER = "a" * 56, "b" * 56


class Clock:
    """Seconds that pass only when a test lets them: both of the monotonic clock and of the day."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(preemption, "time", made)
    return made


def due_at(clock: Clock, seconds: float, step: float = 0.5, checkpoint: float = 2.0) -> list[float]:
    """Seconds from now of the checkpoints in a training that goes on for so long."""
    forewarning = Forewarning(Rank(0, 1, torch.device("cpu")))
    begin, found = clock.now, []
    while clock.now - begin < seconds:
        clock.now += step
        if forewarning.is_due():
            found.append(clock.now - begin)
            clock.now += checkpoint
    return found


def warned(monkeypatch: pytest.MonkeyPatch, clock: Clock, *warnings: tuple[float, PreemptionInfo]) -> list[float]:
    """Have Ray Train tell of each from its second on. Returns when it was asked."""
    asked: list[float] = []

    def latest() -> PreemptionInfo | None:
        asked.append(clock.now)
        return next((info for at, info in reversed(warnings) if clock.now >= at), None)

    monkeypatch.setattr(ray.train, "get_preemption_info", latest)
    return asked


def test_without_a_warning_there_is_none_and_ray_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch, clock: Clock):
    asked = warned(monkeypatch, clock)
    assert due_at(clock, 100, step=0.1) == []
    assert 80 <= len(asked) <= 100


def test_at_the_warning_and_just_before_the_deadline(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capfd: pytest.CaptureFixture[str]
):
    warned(monkeypatch, clock, (1010, PreemptionInfo(1_130_000, {NODE: [0, 1]})))
    first, last = due_at(clock, 200)
    assert 10 <= first <= 11.5
    # A checkpoint takes 2 s and a step half of one; there is time for two of both.
    assert 130 - 7 <= last <= 130 - 5
    assert capfd.readouterr().err.count("node aaaaaaaa with rank 0, 1 will be taken away in 1") == 1


@pytest.mark.parametrize("deadline", [None, 1_015_000])
def test_only_one_where_there_is_no_deadline_or_no_time(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, deadline: int | None
):
    warned(monkeypatch, clock, (1010, PreemptionInfo(deadline, {NODE: [0]})))
    assert len(due_at(clock, 200)) == 1


def test_another_node_is_another_warning(monkeypatch: pytest.MonkeyPatch, clock: Clock):
    one, both = {NODE: [0]}, {NODE: [0], OTHER: [1]}
    warned(monkeypatch, clock, (1010, PreemptionInfo(None, one)), (1050, PreemptionInfo(None, both)))
    first, second = due_at(clock, 200)
    assert first < 12 and 50 <= second < 54


def test_clusters_are_watched_and_an_embedded_ray_is_not(monkeypatch: pytest.MonkeyPatch):
    for embedded in (True, False):
        for name in (preemption._WATCHER, preemption._POLL):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        watch_for_preemption(embedded)
        assert preemption_is_watched() is not embedded
    monkeypatch.setenv(preemption._WATCHER, "0")
    watch_for_preemption(False)
    assert not preemption_is_watched()
