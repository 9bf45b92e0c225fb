"""The main job with its model, its data and its output in an object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.storage import Location
from tests.command_line import CONFIGS, Finished, dpo_ray, killed_at, overrides
from tests.object_store import BUCKET, ObjectStore, object_store, upload
from tests.rounding import of_sum

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

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
        "publish__gate__accuracy_above": None,
    }

    def run(run_id: str, kill_at: str | None = None, **more: Any) -> Finished:
        arguments = (str(CONFIGS / "align_cpu.yaml"), "--run-id", run_id, *overrides(**{**values, **more}))
        if kill_at is not None:
            return killed_at(kill_at, "run", *arguments, timeout=1500)
        return dpo_ray("run", *arguments, timeout=1500)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_RAY_CACHE", str(folder / "cache"))
        yield run


def summary_of(run_id: str) -> dict[str, Any]:
    return json.loads((OUT / "runs" / run_id / "summary.json").read_bytes())


@pytest.fixture(scope="module")
def first_run(job) -> tuple[Finished, dict[str, Any]]:
    done = job("first")
    assert done.code == 0, done.log
    return done, summary_of("first")


def test_a_run_publishes_a_model_and_its_record(first_run, store: ObjectStore):
    done, summary = first_run
    published = Location.of(summary["published"])
    assert published.uri.startswith(f"{OUT}/models/numbers/") and published.uri in done.log
    names = {f.name for f in published.list()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert json.loads((OUT / "models" / "numbers" / "latest.json").read_bytes())["path"] == published.uri
    records = {f.name for f in (OUT / "runs" / "first").list()}
    assert records == {"config.yaml", "metrics.jsonl", "summary.json", "report.html"}
    assert summary["eval"]["accuracy"]["n"] == summary["stages"]["score"]["rows"]["kept"] > 0
    assert summary["train"]["first_step_loss"] == pytest.approx(summary["train"]["zero_margin_loss"], abs=NEAR)


def test_nothing_unfinished_and_no_checkpoint_is_left(first_run, store: ObjectStore):
    assert not [key for key in store.names() if "checkpoint" in key or "probe" in key or ".partial" in key]
    assert "Uploads" not in store.client().list_multipart_uploads(Bucket=BUCKET)


def test_the_secret_is_neither_logged_nor_written(first_run, store: ObjectStore):
    secret = store.env["AWS_SECRET_ACCESS_KEY"]
    assert secret not in first_run[0].log
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


def test_show_lists_the_run_and_the_published_model(first_run):
    done = dpo_ray("show", OUT.uri, env={"COLUMNS": "200"})
    assert done.code == 0, done.log
    assert "first" in done.log
    assert done.lines("numbers: latest is " + Location.of(first_run[1]["published"]).name)


def test_a_lost_shard_alone_is_computed_again(first_run, job):
    reference = OUT / "artifacts" / "reference" / first_run[1]["stages"]["reference"]["fingerprint"]
    shard = next(f for f in reference.list() if f.name.endswith(".parquet"))
    shard.remove()
    done = job("third")
    assert done.code == 0, done.log
    assert done.lines("[reference] 1 of 2 shards are finished already, 1 to compute")
    assert summary_of("third")["stages"]["train"]["reused"]


@pytest.mark.faults
def test_a_killed_training_goes_on_from_its_checkpoint_there(first_run, job, store: ObjectStore):
    lora = {"model__lora": {"rank": 4}, "train__epochs": 6}
    job("killed", kill_at="checkpoint at step 12/", **lora)
    assert any("checkpoint_" in key for key in store.names("team/out/artifacts/train/"))
    done = job("resumed", **lora)
    assert done.code == 0, done.log
    assert done.lines("[train] going on from checkpoint_")
    summary = summary_of("resumed")
    steps = [
        json.loads(line)["step"] for line in (OUT / "runs" / "resumed" / "metrics.jsonl").read_bytes().splitlines()
    ]
    assert steps == list(range(1, summary["train"]["num_steps"] + 1))
    adapter = json.loads((Location.of(summary["published"]) / "adapter_config.json").read_bytes())
    assert adapter["base_model_name_or_path"] == f"s3://{BUCKET}/models/tiny"
    assert not [key for key in store.names() if "checkpoint" in key]


def test_a_bucket_that_is_not_there_ends_as_one_paragraph(store: ObjectStore, job):
    done = job("none", run__output="s3://no-such-bucket/out")
    assert done.code == 2
    paragraph = done.log.strip().splitlines()[-1]
    assert paragraph.startswith("ConfigError: run.output is s3://no-such-bucket/out") and "Traceback" not in done.log
