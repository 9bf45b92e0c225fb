"""The main job with its model, its data and its output in an object store, killed in its training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.storage.artifact import open_artifact
from dpo_ray.storage.location import Location
from dpo_ray.tracking.tensorboard import events
from tests.command_line import CONFIGS, Finished, dpo_ray, in_process, killed_at, overrides
from tests.object_store import BUCKET, ObjectStore, object_store, upload
from tests.rounding import of_sum

pytestmark = [pytest.mark.faults, pytest.mark.ray]

NEAR = 0.1 * of_sum(100, 49152)  # the loss moves by at most β of a pair's log-probs, of which there are fewer than 100
OUT = Location.of(f"s3://{BUCKET}/team/out")


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture(scope="module")
def job(store: ObjectStore, tmp_path_factory, tiny_model: Path, write_preferences):
    """A function that runs the job with nothing but s3:// paths, and a cache of its own."""
    folder = tmp_path_factory.mktemp("job")
    rows = [
        {"prompt": f"Name the number after {n}.", "chosen": f"It is {n + 1}.", "rejected": f"I will not say, {n}."}
        for n in range(40)
    ]
    write_preferences(folder / "data", rows)
    values = {
        "run__name": "numbers",
        "run__output": OUT.uri,
        "model__path": upload(tiny_model, "models/tiny"),
        "data__train": upload(folder / "data", "data") + "/*.parquet",
        "data__held_out_fraction": 0.25,
        "data__rows_per_shard": 20,
        "reference__engine": "torch",
        "reference__calibration_pairs": 4,
        "train__global_batch_size": 8,
        "train__learning_rate": 1e-3,
        "train__checkpoint_every_steps": 2,
        "train__epochs": 6,
        "train__num_workers": 1,
        "train__cpus_per_worker": 1,
        "train__tokens_per_microbatch": 1024,
        "model__lora": {"rank": 4},
        "publish__gate__accuracy_above": None,
    }

    def run(run_id: str, by: Callable[..., Finished] = dpo_ray, **more: Any) -> Finished:
        return by("run", str(CONFIGS / "align_cpu.yaml"), "--run-id", run_id, *overrides(**{**values, **more}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_RAY_CACHE", str(folder / "cache"))
        yield run


def summary_of(run_id: str) -> dict[str, Any]:
    return json.loads((OUT / "runs" / run_id / "summary.json").read_bytes())


@pytest.fixture(scope="module")
def killed_run(job, store: ObjectStore) -> tuple[Finished, list[str]]:
    """The log of a run that was killed in its training, and the objects that it left."""
    killed = job("killed", partial(killed_at, "checkpoint at step 12/"))
    return killed, store.names()


@pytest.fixture(scope="module")
def first_run(killed_run, job) -> tuple[Finished, dict[str, Any]]:
    """The run that went on from there to the end."""
    done = job("first")
    assert done.code == 0, done.log
    return done, summary_of("first")


def test_a_run_publishes_a_model_and_its_record(first_run, store: ObjectStore):
    done, summary = first_run
    published = Location.of(summary["published"])
    assert published.uri.startswith(f"{OUT}/models/numbers/") and published.uri in done.log
    names = {f.name for f in published.children()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
    adapter = json.loads((published / "adapter_config.json").read_bytes())
    assert adapter["base_model_name_or_path"] == f"s3://{BUCKET}/models/tiny"
    assert json.loads((OUT / "models" / "numbers" / "latest.json").read_bytes())["path"] == published.uri
    records = {f.name for f in (OUT / "runs" / "first").children()}
    assert records == {
        "config.yaml", "metrics.jsonl", "summary.json", "report.html", "report.md",
        "progress.json", "training.json", "trackers.json",
    }  # fmt: skip
    # It is the same run to TensorBoard as the one that was killed, and each of the two processes wrote a file.
    assert summary["trackers"]["tensorboard"]["runs"] == {"": f"{OUT.uri}/runs/killed/tensorboard"}
    assert summary["trackers"]["tensorboard"]["failures"] == 0
    written = [event.step for event in events(OUT / "runs" / "killed" / "tensorboard") if event.step]
    assert sorted(set(written)) == list(range(1, summary["train"]["num_steps"] + 1))
    assert summary["eval"]["accuracy"]["n"] == summary["stages"]["score"]["rows"]["kept"] > 0
    assert summary["train"]["first_step_loss"] == pytest.approx(summary["train"]["zero_margin_loss"], abs=NEAR)


def test_a_killed_training_goes_on_from_its_checkpoint_there(killed_run, first_run):
    assert any(name.startswith("team/out/artifacts/train/") and "checkpoint_" in name for name in killed_run[1])
    done, summary = first_run
    assert done.lines("[train] going on from checkpoint_")
    history = (OUT / "runs" / "first" / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, summary["train"]["num_steps"] + 1))


def test_nothing_unfinished_and_no_checkpoint_is_left(first_run, store: ObjectStore):
    assert not [key for key in store.names() if "checkpoint" in key or "probe" in key or ".partial" in key]
    assert "Uploads" not in store.client().list_multipart_uploads(Bucket=BUCKET)


def test_the_secret_is_neither_logged_nor_written(killed_run, first_run, store: ObjectStore):
    secret = store.env["AWS_SECRET_ACCESS_KEY"]
    assert secret not in killed_run[0].log + first_run[0].log
    records = [key for key in store.names("team/") if key.endswith((".json", ".yaml", ".html", ".md", ".jsonl"))]
    assert any(key.endswith("manifest.json") for key in records)
    for key in records:
        assert secret.encode() not in (Location.of(f"s3://{BUCKET}") / key).read_bytes(), key


def test_a_second_run_reuses_every_stage(first_run, job):
    again = job("second")
    assert again.code == 0, again.log
    summary = summary_of("second")
    assert all(stage["reused"] for stage in summary["stages"].values())
    assert summary["published"] == first_run[1]["published"]
    assert "starting Ray" not in again.log


def test_show_lists_the_run_and_the_published_model(first_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = in_process("show", OUT.uri)
    assert done.code == 0, done.log
    assert "first" in done.log
    assert done.lines("numbers: latest is " + Location.of(first_run[1]["published"]).name)


def test_a_lost_shard_alone_is_computed_again(first_run, job, one_ray):
    reference = OUT / "artifacts" / "reference" / first_run[1]["stages"]["reference"]["fingerprint"]
    open_artifact(reference).shards()[0].remove()
    done = job("third", one_ray)
    assert done.code == 0, done.log
    assert done.lines("[reference] 1 of 2 shards are finished already, 1 to compute")
    assert summary_of("third")["stages"]["train"]["reused"]


def test_a_bucket_that_is_not_there_ends_as_one_paragraph(store: ObjectStore, job):
    done = job("none", in_process, run__output="s3://no-such-bucket/out")
    assert done.code == 2
    paragraph = done.log.strip().splitlines()[-1]
    assert paragraph.startswith("ConfigError: run.output is s3://no-such-bucket/out") and "Traceback" not in done.log
