"""The main job on own data: runs, reuse, new shards, sweep."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, Finished, dpo_ray, in_process, overrides, summary_of
from tests.rounding import of_sum

pytestmark = pytest.mark.ray

SMALL_TRAINING = {"train__num_workers": 1, "train__cpus_per_worker": 1, "train__tokens_per_microbatch": 1024}
"""For tests that are not about the workers: one of them, and nobody who looks for its memory."""

NEAR = 0.1 * of_sum(100, 49152)  # the loss moves by at most β of a pair's log-probs, of which there are fewer than 100


def preference_rows(first: int, count: int) -> list[dict]:
    """Distinct pairs; each prompt is its own."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Name the number after {n}."}],
            "chosen": [{"role": "assistant", "content": f"It is {n + 1}."}],
            "rejected": [{"role": "assistant", "content": f"I will not say, but {n} is not it."}],
        }
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model, write_preferences):
    """A folder of data and a function that runs a command on it with the torch scorer, as a process unless told."""
    folder = tmp_path_factory.mktemp("job")
    write_preferences(folder / "data", preference_rows(0, 40), name="train-00000.parquet")

    def run(
        command: str = "run", by: Callable[..., Finished] = dpo_ray, env: dict[str, str] | None = None, **more
    ) -> Finished:
        values = {
            "run__name": "numbers",
            "run__output": str(folder / "out"),
            "model__path": str(tiny_model),
            "data__train": str(folder / "data" / "*.parquet"),
            "data__held_out_fraction": 0.25,
            "data__rows_per_shard": 5,
            "reference__engine": "torch",
            "reference__calibration_pairs": 4,
            "train__global_batch_size": 8,
            "train__learning_rate": 1e-3,
            "train__num_workers": 2,
            "train__cpus_per_worker": 1,
            "publish__gate__accuracy_above": None,
            **more,
        }
        return by(command, str(CONFIGS / "align_cpu.yaml"), *overrides(**values), **({"env": env} if env else {}))

    return folder, run


@pytest.fixture(scope="module")
def first_run(job):
    folder, run = job
    done = run()
    assert done.code == 0, done.log
    return folder, done, summary_of(folder / "out")


def test_a_run_publishes_a_model_and_its_record(first_run):
    folder, done, summary = first_run
    published = Path(summary["published"])
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {f.name for f in published.iterdir()}
    latest = json.loads((folder / "out" / "models" / "numbers" / "latest.json").read_text())
    assert latest["path"] == str(published)
    assert summary["exit_code"] == 0
    assert summary["eval"]["accuracy"]["n"] == summary["stages"]["score"]["rows"]["kept"] > 0
    run_folder = folder / "out" / "runs" / summary["run_id"]
    names = {f.name for f in run_folder.iterdir()}
    assert names == {
        "config.yaml", "log.txt", "log.jsonl", "metrics.jsonl", "summary.json", "report.html", "report.md",
        "progress.json", "training.json", "trackers.json", "tensorboard",
    }  # fmt: skip
    training = json.loads((run_folder / "training.json").read_text())
    assert training["step"] == training["num_steps"] == summary["train"]["num_steps"]
    assert training["trained"]["loss"]["last"] == pytest.approx(summary["train"]["final"]["loss"])
    assert str(published) in done.log


def test_training_starts_at_the_losss_zero_margin_value(first_run):
    train = first_run[2]["train"]
    assert train["first_step_loss"] == pytest.approx(train["zero_margin_loss"], abs=NEAR)


def test_every_read_row_is_kept_dropped_or_on_the_other_side(first_run):
    stages = first_run[2]["stages"]
    assert stages["ingest"]["rows"] == {"in": 40, "kept": 40, "dropped": {}}
    assert stages["train"]["rows"]["kept"] + stages["score"]["rows"]["kept"] == 40


def test_metrics_bear_the_fields_names_and_one_line_a_step(first_run):
    folder, _, summary = first_run
    lines = (folder / "out" / "runs" / summary["run_id"] / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["step"] for m in metrics] == list(range(1, summary["train"]["num_steps"] + 1))
    expected = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    assert expected | {"logps/rejected", "grad_norm", "learning_rate", "num_tokens", "epoch"} <= set(metrics[0])


def test_a_second_run_reuses_every_stage_and_starts_no_ray(first_run, job):
    folder, run = job
    again = run(env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert again.code == 0, again.log
    log = (folder / "out" / "runs" / summary_of(folder / "out")["run_id"] / "log.txt").read_text()
    imported = {line.split("|")[-1].strip() for line in f"{again.log}\n{log}".splitlines() if "import time:" in line}
    assert "pipelines.align" in imported and not imported & {"ray", "torch", "transformers", "vllm"}
    assert all(stage["reused"] for stage in summary_of(folder / "out")["stages"].values())
    assert "starting Ray" not in again.log
    assert again.lines(f"[publish] nothing new: these data and this configuration have made {published_name(folder)}")


def published_name(folder: Path) -> str:
    """The version that stands."""
    return json.loads((folder / "out" / "models" / "numbers" / "latest.json").read_text())["version"]


def test_what_the_model_was_trained_on_is_known_of_each_file(first_run):
    folder, _, summary = first_run
    told = json.loads(in_process("lineage", str(folder / "out"), "train-00000.parquet", "--json").log)
    [one] = told["models"]
    stages = summary["stages"]
    assert one["read"] == 40 == stages["ingest"]["rows"]["in"]
    assert one["trained"] == stages["train"]["rows"]["kept"] and one["held_out"] == 40 - one["trained"]
    assert stages["train"]["workers"] == 2 and summary["cost"]["worker_hours"] > 0


def test_show_lists_the_run_and_the_published_model(first_run, monkeypatch):
    folder, _, summary = first_run
    monkeypatch.setenv("COLUMNS", "200")
    done = in_process("show", str(folder / "out"))
    assert done.code == 0
    assert summary["run_id"] in done.log
    assert done.lines("numbers: latest is " + Path(summary["published"]).name)


def test_a_gate_that_does_not_hold_publishes_nothing_and_exits_4(first_run, job, one_ray):
    folder, run = job
    done = run(by=one_ray, publish__gate__accuracy_above=0.999, run__name="never")
    assert done.code == 4
    paragraph = done.log.strip().splitlines()[-1]
    assert paragraph.startswith("GateFailed") and "publish.gate.accuracy_above asks for above 0.999" in paragraph
    assert summary_of(folder / "out")["published"] is None
    assert not (folder / "out" / "models" / "never").exists()


def test_training_stops_early_and_takes_the_best_weights_from_its_checkpoint(first_run, job, one_ray):
    folder, run = job
    at_ctrl_c = signal.getsignal(signal.SIGINT)
    done = run(
        "train",
        partial(one_ray, until="were best by"),
        train__tokens_per_microbatch=1024,
        train__loss={"type": "ipo", "log_ratio": "sum"},  # it wants one margin, and steps of this size go far beyond
        train__learning_rate=0.3,
        train__schedule="constant",
        train__warmup_fraction=0,
        train__epochs=5,
        train__eval_every_steps=1,
        train__keep_best="eval_loss",
        train__early_stopping={"metric": "eval_loss", "patience": 3},
        train__strategy="fsdp",
    )
    assert done.code == 0, done.log
    train = summary_of(folder / "out")["train"]
    assert train["num_steps"] == train["published_step"] + 3 < train["planned_steps"]
    assert done.lines(f"the weights of step {train['published_step']} were best by eval_loss")
    assert signal.getsignal(signal.SIGINT) is at_ctrl_c  # Ray Train has one of its own


def test_new_shards_cost_only_themselves(first_run, job, one_ray, write_preferences):
    folder, run = job
    write_preferences(folder / "data", preference_rows(40, 10), name="train-00001.parquet")
    done = run("reference", one_ray)
    assert done.code == 0, done.log
    for stage in ("pairs", "tokenized", "reference"):
        assert done.lines(f"[{stage}] 8 of 10 shards are finished already, 2 to compute"), done.log


def test_a_night_goes_on_from_the_published_model_against_the_same_reference(
    first_run, job, one_ray, write_preferences
):
    folder, run = job
    first = published_name(folder)
    write_preferences(folder / "data", preference_rows(40, 10), name="train-00001.parquet")
    done = run(by=one_ray, train__start="published", **SMALL_TRAINING)
    assert done.code == 0, done.log
    summary = summary_of(folder / "out")
    assert summary["train"]["started_from"].endswith(f"/models/numbers/{first}") and published_name(folder) != first
    loss, zero = summary["train"]["first_step_loss"], summary["train"]["zero_margin_loss"]
    assert abs(loss - zero) > NEAR / 100  # the policy is not the reference any more
    weights = first_run[2]["stages"]["reference"]["fingerprint"], summary["stages"]["reference"]["fingerprint"]
    manifests = [json.loads((folder / f"out/artifacts/reference/{one}/manifest.json").read_text()) for one in weights]
    assert manifests[0]["identity"] == manifests[1]["identity"]
    told = json.loads(in_process("lineage", str(folder / "out"), "numbers", "--json").log)
    assert [one["policy"] for one in told["policies"]] == [published_name(folder), first]
    assert run(by=one_ray, train__start="published", **SMALL_TRAINING).lines("nothing new")


def test_a_lost_file_is_made_again_and_no_other(first_run, job, one_ray):
    folder, run = job
    manifests = (folder / "out" / "artifacts" / "reference").glob("*/manifest.json")
    [manifest] = [path for path in manifests if len(json.loads(path.read_text())["files"]) == 10]
    before = manifest.read_text()
    shard = manifest.parents[1] / json.loads(before)["files"][-1]["name"]  # no other artifact has it
    content = shard.read_bytes()
    shard.unlink()
    done = run("reference", one_ray)
    assert done.code == 0, done.log
    assert done.lines("[reference] 9 of 10 shards are finished already, 1 to compute"), done.log
    for stage in ("pairs", "tokenized"):
        assert done.lines(f"[{stage}] reused")
    assert shard.read_bytes() == content
    assert json.loads(manifest.read_text())["files"] == json.loads(before)["files"]


def test_beta_and_learning_rate_leave_the_reference_as_it_is(first_run, job, one_ray):
    _, run = job
    done = run("reference", one_ray, train__loss={"type": "ipo", "beta": 0.3}, train__learning_rate=1e-5)
    assert done.code == 0, done.log
    assert done.lines("[reference] reused")


def test_a_reference_artifact_of_another_tokenizer_is_refused(first_run, job, tiny_model, tmp_path):
    folder, _ = job
    reference = folder / "out" / "artifacts" / "reference" / first_run[2]["stages"]["reference"]["fingerprint"]
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    done = in_process(
        "train",
        str(CONFIGS / "align_cpu.yaml"),
        "--reference",
        str(reference),
        *overrides(run__output=str(tmp_path / "out"), model__path=str(other)),
    )
    assert done.code == 3
    assert "tokenizer" in done.log and "Traceback" not in done.log
