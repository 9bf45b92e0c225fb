"""Stages and gc beside each other: who waits for whom, and who gives up."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from dpo_ray.errors import DpoRayError
from dpo_ray.storage import claim as claims
from dpo_ray.storage.artifact import Contents, make, place
from dpo_ray.storage.claim import CLAIM, Claim, claim, collecting, kept_fresh
from dpo_ray.storage.location import Location


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(claims, "_POLL_S", 0.01)
    return Location.of(tmp_path)


def test_making_an_artifact_and_taking_it_up_claim_what_it_refers_to(output: Location):
    inputs, tasks = {"rows": "f" * 16}, ["b", "a", "b"]
    location = place(output, "pairs", {}, inputs)
    seen = []

    def compute(folder: Location) -> Contents:
        seen.append(Claim.model_validate_json((folder / CLAIM).read_bytes()))
        return Contents()

    make(output, "pairs", {}, inputs, compute, tasks=tasks)
    assert seen == [Claim(inputs=inputs, tasks=["a", "b"])]
    os.utime((location / CLAIM).uri, (1, 1))
    assert make(output, "pairs", {}, inputs, compute, tasks=tasks)[1]
    assert (location / CLAIM).written() > time.time() - 60


def test_a_stage_that_begins_while_gc_removes_files_waits_for_its_end_and_claims_anew(output: Location, capfd):
    folder = output / "artifacts" / "pairs" / "a"
    entered = threading.Event()

    def stage() -> None:
        with claim(output, folder, {}, ["x"]):
            entered.set()

    with collecting(output) as lease:
        thread = threading.Thread(target=stage)
        thread.start()
        assert not entered.wait(0.3)
        lease.hold()
        folder.remove_folder()  # as gc does with an artifact that nobody needed
    thread.join(30)
    assert entered.is_set() and Claim.model_validate_json((folder / CLAIM).read_bytes()).tasks == ["x"]
    assert "waiting until it has ended" in capfd.readouterr().err
    assert (output / "artifacts" / "gc").children() == []


def test_the_marker_of_a_killed_gc_is_waited_for_no_longer_than_its_lease(output: Location, monkeypatch):
    marker = output / "artifacts" / "gc" / "killed.json"
    marker.write_bytes(b"{}")
    monkeypatch.setattr(claims, "LEASE_S", 0.5)
    began = time.monotonic()
    with claim(output, output / "artifacts" / "pairs" / "a", {}, []):
        assert 0.2 < time.monotonic() - began < 30
    os.utime(marker.uri, (1, 1))
    monkeypatch.setattr(claims, "LEASE_S", 300.0)
    began = time.monotonic()
    with claim(output, output / "artifacts" / "pairs" / "b", {}, []):
        assert time.monotonic() - began < 100


def test_a_gc_that_was_held_up_removes_nothing_more(output: Location):
    with collecting(output) as lease:
        lease.hold()
        lease.now -= claims.LEASE_S * 0.6
        with pytest.raises(DpoRayError, match=r"held up for 18\d s"):
            lease.hold()


def test_a_gc_that_looks_around_for_long_keeps_its_lease(output: Location, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_S", 2.0)
    with collecting(output) as lease:
        with lease.renewed():
            time.sleep(2.5)
        lease.require()
        lease.hold()


def test_a_renewal_that_came_too_late_is_told(output: Location, monkeypatch):
    with collecting(output) as lease:
        lease.now -= claims.LEASE_S * 0.6
        monkeypatch.setattr(claims, "LEASE_S", 0.1)
        with lease.renewed():
            time.sleep(0.2)
        with pytest.raises(DpoRayError, match=r"held up for 18\d s"):
            lease.hold()


def test_a_claim_is_renewed_while_the_work_goes_on_and_no_longer(output: Location, monkeypatch):
    monkeypatch.setattr(claims, "RENEWED_S", 0.02)
    file = output / "x.json"
    with kept_fresh(file, b"1"):
        os.utime(file.uri, (1, 1))
        deadline = time.monotonic() + 60
        while file.written() == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.written() > 1
    os.utime(file.uri, (1, 1))
    time.sleep(0.1)
    assert file.written() == 1


def test_a_renewal_that_fails_is_told_and_tried_again(output: Location, monkeypatch, capfd):
    monkeypatch.setattr(claims, "RENEWED_S", 0.02)
    file, failed = output / "x.json", threading.Event()
    write = Location.write_bytes

    def fail_once(self: Location, data: bytes) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError("no room")
        write(self, data)

    with kept_fresh(file, b"1"):
        monkeypatch.setattr(Location, "write_bytes", fail_once)
        assert failed.wait(60)
        os.utime(file.uri, (1, 1))
        deadline = time.monotonic() + 60
        while file.written() == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert file.written() > 1
    assert "could not be renewed (no room)" in capfd.readouterr().err
