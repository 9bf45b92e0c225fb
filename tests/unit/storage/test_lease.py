"""One holder at a time, whoever dies: with a clock of the test's own, and by processes that race and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import Busy, ConfigError, LeaseLost, StorageError
from dpo_ray.storage import lease
from dpo_ray.storage.conditional import conditional_file
from dpo_ray.storage.lease import EXPIRY, Clock, Record, hold, lease_file, require_leases
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import started, this_machine
from tests.command_line import LONGEST
from tests.object_store import BUCKET, object_store


@pytest.fixture(scope="module", params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path_factory.mktemp("leases"))
        return
    with object_store():
        yield f"s3://{BUCKET}/leases"


@pytest.fixture
def output(place: str, request: pytest.FixtureRequest) -> Location:
    """A folder run.output of the test's own."""
    return Location.of(f"{place}/{request.node.name.split('[')[0]}")


class Time:
    """A clock that only waiting moves; `events` are called at their seconds."""

    def __init__(self, **events: Any) -> None:
        self.seconds = 0.0
        self.events = {float(at.removeprefix("at_")): event for at, event in events.items()}
        self.clock = Clock(lambda: self.seconds, self.pause)

    def pause(self, seconds: float) -> None:
        self.seconds += seconds
        for at in [at for at in self.events if at <= self.seconds]:
            self.events.pop(at)()


def another(output: Location, **changes: Any) -> Record:
    """Write the lease of a run on another machine."""
    record = Record(
        holder="other",
        run_id="nightly-1",
        by="ann@far",
        pid=7,
        process="1",
        machine="far",
        since="2026-01-01T00:00:00+00:00",
    ).model_copy(update=changes)
    file = conditional_file(lease_file(output, "x"))
    while file.swap(file.read(), record.model_dump_json().encode()) is None:
        pass  # a heartbeat came between
    return record


def held(output: Location, told: list[str] | None = None, time: Time | None = None, **options: Any) -> Any:
    tell = (told if told is not None else []).append
    return hold(output, "x", "The training", run_id="mine", tell=tell, clock=time and time.clock, **options)


def on_file(output: Location) -> Record:
    return Record.model_validate_json(lease_file(output, "x").read_bytes())


def test_a_lease_that_is_free_is_held_for_the_block_and_given_back(output: Location):
    told: list[str] = []
    for _ in range(2):
        with held(output, told) as mine:
            record = on_file(output)
            assert (record.held, record.run_id, record.pid) == (True, "mine", os.getpid())
            mine.require()
            assert on_file(output).beat == record.beat + 1
        assert not on_file(output).held
    assert told == []


def test_who_waits_names_the_other_run_once_a_minute_and_goes_on_when_it_ends(output: Location):
    beats = {f"at_{at}": lambda at=at: another(output, beat=at) for at in range(10, 150, 10)}
    time, told = Time(**beats, at_150=lambda: another(output, held=False)), []
    another(output)
    with held(output, told, time):
        assert time.seconds == 150
    assert told[0] == (
        "The training is the work of run nightly-1 by ann@far (process 7), since 2026-01-01T00:00:00+00:00: waiting "
        "until it has ended"
    )
    assert [line.rpartition("; ")[2] for line in told[1:]] == ["1 min so far", "2 min so far"]


def test_a_holder_that_gives_no_sign_for_the_length_of_a_lease_by_the_waiting_ones_clock_is_followed(output: Location):
    time, told = Time(at_30=lambda: another(output, beat=1)), []
    another(output)
    with held(output, told, time):
        assert time.seconds == 30 + EXPIRY
    assert "is taken over from run nightly-1 by ann@far" in told[-1] and "no sign for 60 s" in told[-1]


def test_a_record_that_was_cut_off_expires_like_any_other(output: Location):
    file = conditional_file(lease_file(output, "x"))
    assert file.swap(None, b'{"holder": "a')
    time = Time()
    with held(output, time=time):
        assert time.seconds == EXPIRY


@pytest.mark.parametrize("dead", [True, False])
def test_who_is_to_leave_leaves_when_the_other_is_alive_and_follows_one_that_is_dead(output: Location, dead: bool):
    time = Time(**({} if dead else {"at_10": lambda: another(output, beat=1)}))
    another(output)
    if dead:
        with held(output, time=time, when_busy="leave"):
            assert time.seconds == EXPIRY
        return
    named = pytest.raises(Busy, match=r"the work of run nightly-1 by ann@far .*run\.when_busy=wait")
    with named as error, held(output, time=time, when_busy="leave"):
        pass
    assert time.seconds == 10 and error.value.exit_code == 75


def test_of_one_process_of_this_machine_it_is_known_whether_it_runs(output: Location):
    machine, process = this_machine(), started(os.getpid())
    assert machine and process
    another(output, machine=machine, pid=os.getpid(), process=process)
    with pytest.raises(Busy), held(output, time=Time(), when_busy="leave"):
        pass
    another(output, machine=machine, pid=os.getpid(), process="an earlier one of the same number")
    time = Time()
    with held(output, time=time):
        assert time.seconds == 0


def test_a_wait_can_be_ended(output: Location):
    another(output)

    def ends() -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), held(output, time=Time(), while_waiting=ends):
        pass


def test_a_holder_whose_lease_was_taken_learns_who_took_it_and_does_not_give_it_back(output: Location):
    named = pytest.raises(LeaseLost, match=r"The training was taken over .* by run nightly-1 by ann@far")
    with named, held(output) as mine:
        other = another(output)
        mine.require()
    assert on_file(output) == other


@pytest.fixture
def sigint_ignored() -> Iterator[None]:
    """As in what a script starts with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def test_in_the_background_too_the_work_of_a_lost_lease_is_interrupted_and_no_other(
    output: Location, monkeypatch: pytest.MonkeyPatch, sigint_ignored: None
):
    monkeypatch.setattr(lease, "_RENEWAL", 0.05)
    with pytest.raises(LeaseLost, match="ann@far"), held(output):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        another(output)
        time.sleep(LONGEST)


def test_the_work_of_a_lost_lease_is_interrupted(output: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "_RENEWAL", 0.05)
    with pytest.raises(LeaseLost, match="ann@far"), held(output):
        another(output)
        time.sleep(LONGEST)
    another(output, held=False)
    ended = threading.Event()
    with pytest.raises(LeaseLost, match="ann@far"), held(output, on_lost=ended.set):
        another(output)
        assert ended.wait(LONGEST)


def test_a_store_that_does_not_answer_for_a_while_costs_no_lease(output: Location, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    with held(output, told) as mine:
        swap, failed = mine._file.swap, []

        def fails(*arguments: Any) -> Any:
            failed.append(1)
            if len(failed) < 3:
                raise StorageError("no route")
            return swap(*arguments)

        monkeypatch.setattr(lease, "_RENEWAL", 0.05)
        monkeypatch.setattr(type(mine._file), "swap", lambda _, *arguments: fails(*arguments))
        beating = threading.Thread(target=mine._beat, args=(lambda: None,), daemon=True)
        beating.start()
        while len(failed) < 5:
            time.sleep(0.05)
        mine.require()
    assert [line for line in told if "could not be renewed" in line] == told and len(told) == 1


def test_a_heartbeat_whose_reply_was_lost_is_the_holders_own(output: Location, monkeypatch: pytest.MonkeyPatch):
    with held(output) as mine:
        file, seen = mine._file, mine._seen
        assert file.swap(seen, seen.content + b" ")
        mine.require()
        mine.require()
    assert not on_file(output).held


def test_a_storage_without_conditional_writes_is_named():
    with pytest.raises(ConfigError, match="hdfs:// storage"):
        conditional_file(Location("hdfs://host/out/leases/x.json"))


WORKER = textwrap.dedent(
    """
    import os, sys, time
    from dpo_ray.storage import lease as module
    from dpo_ray.storage.lease import hold
    from dpo_ray.storage.location import Location
    output, marker, times, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    module._LOOK = 0.005
    for _ in range(times):
        with hold(Location.of(output), "race", "The race", run_id="racer", tell=print) as lease:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))  # fails beside another holder
            print("holds", flush=True)
            time.sleep(seconds)
            lease.require()
            os.unlink(marker)
    """
)


def racer(output: Location, marker: Path, times: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, output.uri, str(marker), str(times), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_of_two_processes_that_race_one_holds_at_any_time(output: Location, tmp_path: Path, monkeypatch):
    racing = [racer(output, tmp_path / "marker", 20, 0.01) for _ in range(2)]
    said = [process.communicate(timeout=LONGEST)[0] for process in racing]
    assert [process.returncode for process in racing] == [0, 0], said
    assert [text.count("holds") for text in said] == [20, 20]


def test_after_a_kill_the_other_goes_on_at_once(output: Location, tmp_path: Path):
    first = racer(output, tmp_path / "marker", 1, LONGEST)
    assert first.stdout is not None and first.stdout.readline() == "holds\n"
    second = racer(output, tmp_path / "other", 1, 0)
    assert second.stdout is not None and f"(process {first.pid})" in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = second.communicate(timeout=LONGEST)[0]  # while the first one is a zombie yet
    took = time.monotonic() - began
    first.wait()
    assert second.returncode == 0 and "whose process has ended" in said and took < EXPIRY / 2, said


def test_leases_of_paths_that_look_like_urls_lie_where_their_files_lie(output: Location):
    for name in ("a#b", "100%", "a%20b"):
        folder = output / name
        with hold(folder, "n", "The work", run_id="one", tell=print):
            assert [place.uri for place in (folder / "leases").children()] == [lease_file(folder, "n").uri]


def test_where_leases_cannot_be_read_a_run_is_told_before_its_work(output: Location, monkeypatch: pytest.MonkeyPatch):
    require_leases(output)
    if output.is_local:
        return

    def fails(_: object) -> None:
        raise StorageError("no credentials")

    monkeypatch.setattr(type(conditional_file(output / "x")), "read", fails)
    with pytest.raises(ConfigError, match=r"cannot be read below run\.output=s3://.*no credentials.*not the profiles"):
        require_leases(output)
