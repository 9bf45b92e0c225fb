"""Progress lines: few, and right."""

from __future__ import annotations

import pytest

from dpo_ray import progress
from dpo_ray.progress import Progress, say


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_names_its_stage_and_goes_to_standard_error(capsys: pytest.CaptureFixture[str]):
    say("train", "step 1")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "[train] step 1\n")


def test_a_line_holds_count_rate_note_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]):
    bar = Progress("train", 10, "steps")
    clock.now += 4
    bar.advance(2, "loss 0.5")
    # 2 steps in 4 s; the 8 left take 16 s.
    assert capsys.readouterr().err == "[train] 2/10 steps · 0.5 steps/s · loss 0.5 · 0:00:16 left\n"


def test_lines_are_at_least_the_interval_apart_but_the_last_always_comes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
):
    bar = Progress("train", 6, "steps", interval=5)
    for _ in range(6):
        clock.now += 2
        bar.advance(1)
    # At 2 s, then at 8 s (4 s and 6 s are within 5 s of it), and the last step at 12 s.
    counts = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["1/6", "4/6", "6/6"]


def test_what_an_earlier_run_did_does_not_count_towards_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]):
    bar = Progress("train", 10, "steps", done=6)
    clock.now += 2
    bar.advance(1)
    # 1 step in 2 s; 3 left.
    assert "7/10 steps · 0.5 steps/s · 0:00:06 left" in capsys.readouterr().err


def test_nothing_done_yet_is_no_rate(clock: Clock, capsys: pytest.CaptureFixture[str]):
    bar = Progress("train", 10, "steps")
    clock.now += 2
    bar.advance(0)
    assert capsys.readouterr().err.endswith("· ? left\n")
