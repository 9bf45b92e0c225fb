"""dpo-ray gc: what goes of a real output folder, what stays beside runs, sweeps and models, and what it says."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_ray.errors import ConfigError, DpoRayError
from dpo_ray.storage import claim as claims
from dpo_ray.storage.artifact import Artifact, Contents, load, make, read_shard
from dpo_ray.storage.location import Location
from pipelines import gc
from pipelines.cli import app
from pipelines.gc import collect, lines, seconds
from tests.object_store import BUCKET, object_store
from tests.shard_stages import KIND, Rows, age, stage


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "out")


def names(output: Location) -> set[str]:
    return set((output / "artifacts").names())


def is_whole(artifact: Artifact) -> bool:
    return load(artifact.location, artifact.manifest.kind, artifact.fingerprint) == artifact


def run_that_names(output: Location, run_id: str, *artifacts: Artifact, file: str = "summary.json") -> None:
    stages = {str(n): {"fingerprint": artifact.fingerprint} for n, artifact in enumerate(artifacts)}
    (output / "runs" / run_id / file).write_bytes(json.dumps({"stages": stages}).encode())


def test_only_what_nothing_of_late_names_is_removed_and_only_where_it_is_told_to(output: Location):
    old, _ = stage(output, [1, 2, 3])
    run_that_names(output, "old", old)
    age(Path(output.uri), 10)
    new, _ = stage(output, [2, 3, 4])
    run_that_names(output, "new", new)
    before = names(output)
    found = collect(output)
    assert names(output) == before and not found.deleted
    going = {f.name for removal in found.removals for f in removal.files}
    [only_old] = [f for f in old.manifest.files if f.rows == 1]
    folder = f"{KIND}/{old.fingerprint}"
    assert going == {f"{folder}/manifest.json", f"{folder}/claim.json", f"{KIND}/{only_old.name}"}
    assert collect(output, delete=True).removals == found.removals
    assert names(output) == before - going and is_whole(new)
    assert not Path(old.location.uri).exists()
    assert collect(output, delete=True).removals == []
    # What is made again costs what has gone, and no more.
    again, reused = stage(output, [1, 2, 3])
    assert not reused and again.manifest.files == old.manifest.files and is_whole(again)


def test_an_artifact_that_a_run_takes_up_again_is_as_new(output: Location):
    artifact, _ = stage(output, [1, 2])
    age(Path(output.uri), 10)
    assert stage(output, [1, 2])[1]
    assert collect(output, delete=True).removals == [] and is_whole(artifact)


@pytest.mark.parametrize("file", ["summary.json", "stages.json", "config.yaml"])
def test_a_run_of_late_keeps_what_it_names_and_what_that_was_made_from(output: Location, file: str):
    rows, _ = stage(output, [1, 2])
    made, _ = stage(output, [5], kind="made", inputs={"from": rows.fingerprint})
    age(Path(output.uri), 10)
    run_that_names(output, "r", made, file=file)
    assert collect(output, delete=True).removals == [] and is_whole(rows) and is_whole(made)
    age(Path(output.uri) / "runs", 10)
    assert {removal.what for removal in collect(output, delete=True).removals} == {"artifacts", "shards"}
    assert names(output) == set()
    assert (output / "runs" / "r" / file).exists()


def test_sweeps_and_adapters_that_were_published_keep_what_they_name_for_ever(output: Location):
    made = [stage(output, [n], kind="train")[0] for n in (1, 3, 5, 7)]
    trial = {"number": 0, "policy": made[0].fingerprint}
    (output / "sweeps" / ("f" * 16) / "trials" / "0000-seed0.json").write_bytes(json.dumps(trial).encode())
    adapter = {"base_model_name_or_path": (made[1].location / "model").uri}
    (output / "models" / "m" / "v1" / "adapter_config.json").write_bytes(json.dumps(adapter).encode())
    (output / "models" / "m" / "latest.json").write_bytes(
        json.dumps({"data": {"policy": made[2].fingerprint}}).encode()
    )
    age(Path(output.uri), 100)
    models = set((output / "models").names())
    collect(output, delete=True)
    assert is_whole(made[0]) and is_whole(made[1])
    left = {name.split("/")[1] for name in names(output)}
    assert left == {"shards", made[0].fingerprint, made[1].fingerprint}
    assert set((output / "models").names()) == models


def test_old_shards_that_a_stage_at_work_has_taken_up_are_spared(output: Location):
    stage(output, [1, 2, 3])
    age(Path(output.uri), 10)
    seen = []

    class Collects:
        """A worker that is at work while gc comes by."""

        def __call__(self, source: int):
            seen.extend(removal.what for removal in collect(output, delete=True).removals)
            return Rows()(source)

    taken_up, _ = stage(output, [1, 2, 3, 9], build=Collects)
    assert seen == ["artifacts"]  # the earlier manifest, and none of the shards
    assert is_whole(taken_up) and [read_shard(shard).num_rows for shard in taken_up.shards()] == [1, 2, 3, 9]


def test_a_stage_that_begins_while_files_are_removed_waits_and_makes_what_has_gone(output: Location, monkeypatch):
    monkeypatch.setattr(claims, "_POLL_S", 0.01)
    old, _ = stage(output, [1, 2, 3])
    age(Path(output.uri), 10)
    remove, begun, made = gc._remove, threading.Event(), []

    def slowly(*arguments) -> None:
        thread = threading.Thread(target=lambda: made.append(stage(output, [1, 2, 3])))
        thread.start()
        assert not begun.wait(0.3)
        remove(*arguments)
        made.append(thread)

    monkeypatch.setattr(gc, "_remove", slowly)
    assert collect(output, delete=True).removals
    made[0].join(60)
    artifact, reused = made[1]
    assert not reused and artifact.manifest.files == old.manifest.files and is_whole(artifact)
    assert (artifact.location / "claim.json").exists()


def test_files_beside_artifacts_and_of_input_files_are_let_be(output: Location):
    make(output, "train", {}, {}, lambda location: Contents())
    kept = ["artifacts/files/0123456789abcdef/part-0.parquet", "artifacts/notes.txt", "artifacts/mine/x/y", "z.txt"]
    for name in kept:
        (output / name).write_bytes(b"")
    age(Path(output.uri), 100)
    collect(output, delete=True)
    assert set(output.names()) == set(kept)


def test_a_manifest_that_cannot_be_read_keeps_all_of_its_kind(output: Location, capfd):
    artifact, _ = stage(output, [1])
    other, _ = stage(output, [3], kind="other")
    (artifact.location / "manifest.json").write_bytes(b"{")
    age(Path(output.uri), 100)
    found = collect(output, delete=True)
    assert found.unreadable == [f"{KIND}/{artifact.fingerprint}"]
    assert str(artifact.location) in capfd.readouterr().err
    assert artifact.shards()[0].exists() and not other.shards()[0].exists()


def test_it_says_what_goes_and_why_in_words_and_as_json(output: Location):
    stage(output, [1, 2])
    (output / "artifacts" / "train" / ("a" * 16) / "checkpoints" / "x").write_bytes(b"x" * 1500)
    age(Path(output.uri), 10)
    found = collect(output)
    said = list(lines(found))
    assert any(line.startswith(f"{KIND}: shards, 3 files") and "no manifest and no claim" in line for line in said)
    assert "train: unfinished artifacts, 1 files, 1.5 kB" in "\n".join(said)
    assert said[-1].endswith("would be removed; --delete does it") and said[-1].startswith("6 files")
    told = json.loads("".join(lines(found, as_json=True)))
    assert (told["files"], told["deleted"]) == (6, False)
    assert {(row["kind"], row["what"]): row["files"] for row in told["removals"]} == {
        (KIND, "artifacts"): 2,
        (KIND, "shards"): 3,
        ("train", "unfinished artifacts"): 1,
    }


def test_files_that_lie_about_are_no_hindrance(output: Location):
    made, _ = stage(output, [1, 2])
    for folder in ("models", "sweeps", "runs"):
        (output / folder / "README.md").write_bytes(b"notes")
    assert collect(output, delete=True).removals == [] and is_whole(made)


def test_one_that_was_held_up_removes_nothing_more(output: Location, monkeypatch: pytest.MonkeyPatch):
    stage(output, [1, 2, 3])
    age(Path(output.uri), 10)
    before = {name for name in names(output) if name.endswith(".parquet")}
    remove = Location.remove

    def slow(place: Location) -> None:
        remove(place)
        if place.name == "manifest.json":
            monkeypatch.setattr(claims, "LEASE_S", -1.0)

    monkeypatch.setattr(Location, "remove", slow)
    with pytest.raises(DpoRayError, match="gc was held up"):
        collect(output, delete=True)
    assert {name for name in names(output) if name.endswith(".parquet")} == before


def test_the_command_removes_only_with_delete(output: Location):
    stage(output, [1])
    age(Path(output.uri), 10)
    before = names(output)
    dry = CliRunner().invoke(app, ["gc", output.uri])
    assert dry.exit_code == 0 and "would be removed" in dry.output and names(output) == before
    kept = CliRunner().invoke(app, ["gc", output.uri, "--older-than", "2w", "--delete", "--json"])
    assert kept.exit_code == 0 and json.loads(kept.output)["files"] == 0 and names(output) == before
    done = CliRunner().invoke(app, ["gc", output.uri, "--delete"])
    assert done.exit_code == 0 and "removed" in done.output and names(output) == set()


@pytest.mark.parametrize("bound", ["", "7", "d", "-1d", "7 days", "1h", "0d", "1e9d"])
def test_a_bound_that_is_none_or_too_short_for_runs_at_work_is_refused(bound: str):
    with pytest.raises(ConfigError, match="--older-than"):
        seconds(bound)


def test_bounds_are_read():
    assert [seconds(text) for text in ("2h", "7d", "1.5d", "2w")] == [7200, 604800, 129600, 1209600]


def test_a_folder_without_artifacts_is_refused(output: Location):
    with pytest.raises(ConfigError, match="holds no artifacts"):
        collect(output)


def test_the_same_in_an_object_store(monkeypatch):
    with object_store():
        output = Location.of(f"s3://{BUCKET}/team/out")
        old, _ = stage(output, [1, 2, 3])
        assert collect(output, delete=True).removals == []
        # Nothing can be made older there, so it is later now; and the other one is what a late run names.
        later = claims.Lease._write
        monkeypatch.setattr(claims.Lease, "_write", lambda self: later(self) + 10 * 86400)
        new, _ = stage(output, [2, 3])
        monkeypatch.setattr(gc, "_records_that_name", lambda *_: [new.location / "manifest.json"])
        collect(output, delete=True)
        assert is_whole(new) and not (old.location / "manifest.json").exists()
        assert {f.rows for f in old.manifest.files if old.file(f.name).exists()} == {2, 3, None}
        assert (output / "artifacts" / "gc").names() == []
