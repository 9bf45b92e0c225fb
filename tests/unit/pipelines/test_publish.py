"""A whole model on its way to where it is published: a folder and an object store, and cut off on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from dpo_ray.config import Config
from dpo_ray.errors import Busy, DpoRayError, GateFailed
from dpo_ray.model.folders import HASHES
from dpo_ray.model.resolve import resolve
from dpo_ray.pairs import PAIRS, TOKENIZED, PreferencePair, pair_row, tokenized_row
from dpo_ray.storage import artifact
from dpo_ray.storage.artifact import Artifact, describe_file, write_shard
from dpo_ray.storage.lineage import read_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import CARD, LATEST, latest, move, rollback
from dpo_ray.training.files import KIND, MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.publish import name_lease, publish
from tests.object_store import BUCKET, object_store


@pytest.fixture(scope="module", params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path_factory.mktemp("published"))
        return
    with object_store():
        yield f"s3://{BUCKET}/published"


@pytest.fixture
def context(place: str, request: pytest.FixtureRequest) -> RunContext:
    """A run of the test's own, with a gate at an accuracy of 0.5."""
    output = f"{place}/{request.node.name.split('[')[0]}"
    config = Config.model_validate(
        {
            "run": {"name": "n", "output": output},
            "model": {"path": "m"},
            "data": {"train": "x"},
            "publish": {"gate": {"accuracy_above": 0.5}},
        }
    )
    return RunContext(config, "first", Location.of(output))


def policy(context: RunContext, model: Path) -> Artifact:
    """A finished training whose model is this folder."""
    location = context.output / "artifacts" / KIND / "trained"
    Location.of(model).copy_folder_to(location / MODEL_FOLDER)
    (location / MODEL_FOLDER / HASHES).write_bytes(b"hashes of the others")
    (location / MODEL_FOLDER / "left-by-an-attempt.safetensors").write_bytes(b"in no manifest")
    names = [*(f.name for f in model.iterdir()), HASHES]
    files = [
        describe_file(location / MODEL_FOLDER / n).model_copy(update={"name": f"{MODEL_FOLDER}/{n}"}) for n in names
    ]
    metrics = {"first_step_loss": 0.693, "num_steps": 3, "published_step": 3, "final": {"loss": 0.6}}
    identity, inputs = {"weights": "w"}, {"pairs": rows(context).fingerprint}
    return artifact.publish(location, KIND, identity=identity, inputs=inputs, files=files, metrics=metrics)


def rows(context: RunContext) -> Artifact:
    """A tokenized pair, made from a pair: what the policy was trained on."""
    pair = PreferencePair(({"role": "user", "content": "Why?"},), "so", "no")
    tokenized = tokenized_row(pair.pair_id, pair.prompt_id, "train", [1], [2], [3])
    tables = {
        "pairs": pa.Table.from_pylist([pair_row(pair, "train")], schema=PAIRS),
        "tokenized": pa.Table.from_pylist([tokenized], schema=TOKENIZED),
    }
    inputs: dict[str, str] = {}
    for kind, table in tables.items():
        location = artifact.place(context.output, kind, {}, inputs)
        files = [write_shard(location / f"{kind}.parquet", table, {"read": 1})]
        made = artifact.publish(location, kind, identity={}, inputs=inputs, files=files)
        inputs = {kind: made.fingerprint}
    return made


def evaluation(context: RunContext, low: float) -> Artifact:
    accuracy = {"value": 0.8, "low": low, "high": 0.9, "n": 40}
    location = context.output / "artifacts" / "eval" / "measured"
    return artifact.publish(location, "eval", identity={}, inputs={}, files=[], metrics={"accuracy": accuracy})


def test_every_file_of_the_model_arrives_with_its_card_and_the_pointer(context: RunContext, small_model: Path):
    trained = policy(context, small_model)
    version = publish(context, trained, measured := evaluation(context, low=0.7), lambda: measured)
    names = {f.name for f in small_model.iterdir()}
    assert "model.safetensors" in names
    assert {f.name for f in version.children()} == names | {HASHES, "README.md"}
    times = {info.base_name: info.mtime_ns for info in version.files()}
    assert all(times[HASHES] >= times[name] for name in names)
    for name in names:
        assert (version / name).read_bytes() == (small_model / name).read_bytes(), name
    assert load_file(resolve(version.uri) / "model.safetensors").keys()
    assert "first" in (version / "README.md").read_bytes().decode()
    latest = json.loads((context.output / "models" / "n" / LATEST).read_bytes())
    assert (latest["path"], latest["version"]) == (version.uri, trained.fingerprint)
    assert {f.name for f in (context.output / "models" / "n").children()} == {LATEST, "history", trained.fingerprint}
    kept = read_policy(context.output, trained.fingerprint)
    assert kept is not None and [(shard.read, shard.trained) for shard in kept.shards] == [(1, 1)]


def test_cut_off_before_its_end_it_is_copied_again(
    context: RunContext, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    trained, measured = policy(context, small_model), evaluation(context, low=0.7)

    copy = Location.copy_to

    def breaks(file: Location, target: Location) -> None:
        if file.name == "model.safetensors":
            raise KeyboardInterrupt
        copy(file, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Location, "copy_to", breaks)
        publish(context, trained, measured, lambda: measured)
    assert not (context.output / "models" / "n" / LATEST).exists()
    version = publish(context, trained, measured, lambda: measured)
    assert {f.name for f in version.children()} == {f.name for f in small_model.iterdir()} | {HASHES, "README.md"}


def test_the_same_model_made_again_does_not_undo_a_rollback(context: RunContext, small_model: Path):
    name = context.output / "models" / "n"
    (name / "earlier" / CARD).write_bytes(b"card")
    move(name, "earlier", action="publish", why="")
    trained, measured = policy(context, small_model), evaluation(context, low=0.7)
    publish(context, trained, measured, lambda: measured)
    rollback(context.output, "n", "it swears")
    assert publish(context, trained, measured, lambda: measured).name == trained.fingerprint
    standing = latest(name)
    assert standing is not None and (standing.version, standing.why) == ("earlier", "it swears")


def test_inside_of_an_object_store_nothing_comes_by_the_machine_that_publishes(
    context: RunContext, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    trained, measured = policy(context, small_model), evaluation(context, low=0.7)
    if context.output.is_local:
        pytest.skip("a folder is copied by the machine that publishes")

    def comes(location: Location, *_: object) -> None:
        raise AssertionError(f"{location} is fetched")

    monkeypatch.setattr(Location, "_download", comes)
    monkeypatch.setattr(Location, "read_chunks", comes)
    assert (publish(context, trained, measured, lambda: measured) / "model.safetensors").size()


def test_below_the_gate_nothing_is_there(context: RunContext, small_model: Path):
    with pytest.raises(GateFailed, match=r"accuracy is 0\.800 with a 95% interval from 0\.400"):
        publish(context, policy(context, small_model), measured := evaluation(context, low=0.4), lambda: measured)
    assert not (context.output / "models").exists()


def test_a_gate_that_compares_is_measured_anew_where_another_model_was_published_meanwhile(
    context: RunContext, small_model: Path, capfd: pytest.CaptureFixture[str]
):
    gate = {"accuracy_above": 0.5, "no_regression": {"held_out": 0.1}}
    config = context.config.model_validate({**context.config.model_dump(), "publish": {"gate": gate}})
    context = RunContext(config, "second", context.output)
    name = context.output / "models" / "n"
    (name / "rival" / CARD).write_bytes(b"card")
    move(name, "rival", action="publish", why="")

    def compared_with(version: str | None, low: float) -> Artifact:
        accuracy = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 40}
        change = {"value": 0.0, "low": low, "high": 0.2, "n": 40}
        sets = {"held_out": {"accuracy": accuracy, "version": version, "change": change}}
        metrics = {"accuracy": accuracy, "sets": sets}
        location = context.output / "artifacts" / "eval" / f"with-{version}"
        return artifact.publish(location, "eval", identity={}, inputs={}, files=[], metrics=metrics)

    trained, before, again = policy(context, small_model), compared_with(None, 0.0), compared_with("rival", -0.5)
    with pytest.raises(GateFailed, match=r"published version rival is 0\.000 with a 95% interval from -0\.500"):
        publish(context, trained, before, lambda: again)
    assert "rival was published meanwhile" in capfd.readouterr().err
    standing = latest(name)
    assert standing is not None and standing.version == "rival"


def test_a_run_that_fails_before_the_pointer_moves_has_published_nothing(
    context: RunContext, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> None:
        raise DpoRayError("the store is away")

    monkeypatch.setattr("pipelines.publish.move", fails)
    measured = evaluation(context, low=0.7)
    with pytest.raises(DpoRayError, match="the store is away"):
        publish(context, policy(context, small_model), measured, lambda: measured)
    assert "published" not in context.results


def test_two_runs_do_not_publish_under_a_name_at_once(context: RunContext, small_model: Path):
    run = context.config.run.model_copy(update={"when_busy": "leave"})
    second = RunContext(context.config.model_copy(update={"run": run}), "second", context.output)
    trained, measured = policy(context, small_model), evaluation(context, low=0.7)
    with name_lease(context.output, "n", "first"):
        with pytest.raises(Busy, match="Publishing under the name n is the work of run first"):
            publish(second, trained, measured, lambda: measured)
        assert not (context.output / "models").exists()
    publish(second, trained, measured, lambda: measured)
