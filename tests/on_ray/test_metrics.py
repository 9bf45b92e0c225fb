"""What is told as metrics, without Ray: by whom, with which labels, and what becomes of it where nobody listens."""

from __future__ import annotations

import sys
import time
import types
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dpo_ray.on_ray import metrics
from dpo_ray.on_ray.metrics import (
    LOSS,
    MEASURES,
    PROGRESS,
    PUBLISHED,
    RUNS,
    Measure,
    Work,
    at_work,
    count,
    take_up,
    tell,
)
from dpo_ray.on_ray.pool import _tell_of
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect, disconnect
from dpo_ray.on_ray.shard_worker import ShardWorker
from dpo_ray.on_ray.train_metrics import StepMetrics
from dpo_ray.shards.deaths import Deaths
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location
from dpo_ray.training.parallel import Rank
from tests.command_line import LONGEST
from tests.whole_run import Job, number_rows, word_model


@dataclass
class Heard:
    """What Ray would have been told."""

    counted: dict[str, float] = field(default_factory=dict)
    """name{label=value,…} → sum, without the run."""
    gauges: dict[str, float] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)

    def instrument(self, measure: Measure) -> Any:
        def key(labels: dict[str, str]) -> str:
            assert set(labels) == {"run", "stage", *measure.labels}
            self.runs.add(labels["run"])
            told = ",".join(f"{k}={v}" for k, v in labels.items() if k != "run")
            return f"{measure.name.removeprefix('dpo_ray_')}{{{told}}}"

        def inc(value: float, labels: dict[str, str]) -> None:
            assert measure.kind == "counter" and value > 0
            self.counted[key(labels)] = self.counted.get(key(labels), 0) + value

        def set_(value: float, labels: dict[str, str]) -> None:
            assert measure.kind == "gauge"
            self.gauges[key(labels)] = value

        return types.SimpleNamespace(inc=inc, set=set_)


tell_again = metrics._tell_again


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_tell_again", lambda: None)  # by the thread of an earlier test
    monkeypatch.setattr(metrics, "_gauges", {})
    monkeypatch.setattr(metrics, "_instruments", {})
    monkeypatch.setattr(metrics, "_work", Work("nightly", "ingest"))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    monkeypatch.setattr(metrics, "_instrument", heard.instrument)
    return heard


def test_names_are_ours_and_say_what_they_are():
    names = [measure.name for measure in MEASURES]
    assert len(set(names)) == len(names) > 15
    for measure in MEASURES:
        assert measure.name.startswith("dpo_ray_") and measure.description
        assert not measure.name.endswith("_total")  # Ray appends it to counters
        # Of few values each: no ids of shards or of runs.
        assert set(measure.labels) <= {"artifact", "reason", "outcome", "trial", "pairs", "rank", "measure", "bound"}
    assert RUNS.exported == "ray_dpo_ray_runs_total" and LOSS.exported == "ray_dpo_ray_loss"


def test_without_ray_nothing_is_told_and_nothing_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    count(RUNS, outcome="ok")
    tell(PROGRESS, 1.0)
    tell_again()
    assert "ray" not in sys.modules


def fake_ray(monkeypatch: pytest.MonkeyPatch) -> tuple[types.ModuleType, list[tuple[Any, ...]]]:
    """A module in the place of Ray, and what its metrics are made of and told."""
    told: list[tuple[Any, ...]] = []

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            told.append((type(self).__name__, name, tag_keys))

        def inc(self, value: float, tags: dict[str, str]) -> None:
            told.append((value, tags))

        set = inc

    modules = {name: types.ModuleType(name) for name in ("ray", "ray.util", "ray.util.metrics")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    of_metrics: Any = modules["ray.util.metrics"]
    of_metrics.Counter, of_metrics.Gauge = type("Counter", (Metric,), {}), type("Gauge", (Metric,), {})
    ray: Any = modules["ray"]
    ray.is_initialized = lambda: False
    return ray, told


def test_a_gauge_stands_from_when_ray_is_there_until_it_is_set_anew(monkeypatch: pytest.MonkeyPatch):
    ray, told = fake_ray(monkeypatch)
    tell(PROGRESS, 1.0)
    count(RUNS, outcome="ok")
    assert told == []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    labels = {"run": "nightly", "stage": "ingest"}
    tell_again()
    assert told == [("Gauge", "dpo_ray_progress_timestamp_seconds", ("run", "stage")), (1.0, labels)]
    tell_again()
    tell(PROGRESS, 2.0)
    tell_again()
    assert told[2:] == [(1.0, labels), (2.0, labels), (2.0, labels)]
    count(RUNS, 0, outcome="ok")  # Ray refuses it
    count(RUNS, outcome="ok")
    assert told[5:] == [
        ("Counter", "dpo_ray_runs", ("run", "stage", "outcome")),
        (1, {**labels, "outcome": "ok"}),
    ]


def test_a_label_that_is_missing_or_unknown_is_our_mistake():
    with pytest.raises(AssertionError, match="dpo_ray_runs"):
        count(RUNS)
    with pytest.raises(AssertionError, match="shard"):
        tell(PROGRESS, 1.0, shard="3fa9c1d2")


def test_a_finished_shard_tells_its_rows_and_what_became_of_them(heard: Heard):
    _tell_of("pairs", 10, {"read": 10, "kept": 7, "tie": 2, "bad_row": 1, "tokens": 99, "truncated_prompt": 3}, left=4)
    assert heard.counted == {
        "rows{stage=ingest,artifact=pairs}": 10,
        "tokens{stage=ingest,artifact=pairs}": 99,
        "rows_dropped{stage=ingest,artifact=pairs,reason=tie}": 2,
        "rows_dropped{stage=ingest,artifact=pairs,reason=bad_row}": 1,
    }
    assert heard.gauges["shards_left{stage=ingest,artifact=pairs}"] == 4
    assert "progress_timestamp_seconds{stage=ingest}" in heard.gauges


def one_row(*_: Any) -> ShardOutput:
    return ShardOutput(pa.table({"x": [1]}), {"read": 1})


def make_one_row() -> Callable[..., ShardOutput]:
    return one_row


def worker(folder: Path, **options: Any) -> ShardWorker:
    location = Location.of(folder / "artifacts" / "reference" / "0123")
    return ShardWorker(location, make_one_row, {}, run="this", at=Work("nightly", "reference"), **options)


@pytest.mark.parametrize("options", [{}, {"isolates": True}], ids=["shard", "isolating"])
def test_work_that_a_process_died_over_counts_when_it_is_begun_again(
    heard: Heard, tmp_path: Path, options: dict[str, Any]
):
    first = worker(tmp_path, **options)
    assert at_work() == Work("nightly", "reference") and heard.runs == {"nightly"}
    [(name, seconds)] = heard.gauges.items()
    assert name == "engine_start_seconds{stage=reference,artifact=reference}" and seconds >= 0
    first.do("a", None)
    assert heard.counted == {}
    if options:  # the note of rows in flight that the process left
        first._note("b").write_bytes(b"{}")
    else:
        first._deaths("b").begin()
    worker(tmp_path, **options).do("b", None)
    assert heard.counted == {"retries{stage=reference,artifact=reference}": 1}


def test_an_engine_whose_start_kills_counts_too(heard: Heard, tmp_path: Path):
    note = Location.of(tmp_path / "artifacts" / "reference" / "0123" / "attempts" / "this-worker-local.json")
    Deaths(note, "to start it", "this").begin()
    worker(tmp_path)
    assert heard.counted == {"retries{stage=reference,artifact=reference}": 1}


STEP = {
    "step": 3, "loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 0.75, "grad_norm": 1.5,
    "tokens_per_second": 100.0, "num_tokens": 3000, "learning_rate": 1e-6,
}  # fmt: skip


def test_a_step_is_told_by_the_first_worker(heard: Heard):
    take_up(Work("nightly", "train"))
    StepMetrics(Rank(0, 2, torch.device("cpu")), 10, "")(STEP | {"eval_loss": 0.65, "eval_rewards/margins": 0.1}, 1000)
    StepMetrics(Rank(1, 2, torch.device("cpu")), 10, "")(STEP, 1000)
    del heard.gauges["progress_timestamp_seconds{stage=train}"]
    assert heard.gauges == {
        "steps_left{stage=train,trial=}": 7,
        "loss{stage=train,trial=,pairs=train}": 0.6,
        "reward_margin{stage=train,trial=,pairs=train}": 0.2,
        "reward_accuracy{stage=train,trial=,pairs=train}": 0.75,
        "grad_norm{stage=train,trial=}": 1.5,
        "tokens_per_second{stage=train,trial=}": 100.0,
        "loss{stage=train,trial=,pairs=held_out}": 0.65,
        "reward_margin{stage=train,trial=,pairs=held_out}": 0.1,
    }
    assert heard.counted == {"tokens{stage=train,artifact=train}": 1000}


def test_a_step_that_was_left_out_counts_and_its_loss_stays_what_it_was(heard: Heard):
    take_up(Work("nightly", "train"))
    of_trial = StepMetrics(Rank(0, 1, torch.device("cpu")), 10, "trial 2")
    of_trial(STEP, 1000)
    of_trial({"step": 4, "skipped_pairs": ["a", "b"], "tokens_per_second": 90.0}, 1000)
    assert heard.counted["steps_skipped{stage=train,trial=trial 2}"] == 1
    assert heard.gauges["loss{stage=train,trial=trial 2,pairs=train}"] == 0.6
    assert heard.gauges["steps_left{stage=train,trial=trial 2}"] == 6


def test_each_gpu_tells_what_is_taken_of_it(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)
    StepMetrics(Rank(1, 2, torch.device("cuda", 1)), 10, "")(STEP, 1000)
    assert heard.gauges == {"gpu_memory_bytes{stage=ingest,trial=,rank=1}": 5 << 30}


def test_a_run_tells_its_stages_its_gate_and_how_it_ended(heard: Heard, tmp_path: Path, small_model: Path):
    job = Job(tmp_path, word_model(tmp_path / "words", small_model))
    job.write("a.jsonl", number_rows(0, 40))
    assert job.run().code == 0
    assert heard.runs == {"numbers"}
    assert heard.counted == {"runs{stage=publish,outcome=ok}": 1}  # rows are counted by the pool
    assert {f"stage_seconds{{stage={stage}}}" for stage in ("ingest", "tokenize", "train", "evaluate")} <= set(
        heard.gauges
    )
    assert heard.gauges["gate_passed{stage=publish}"] == 1
    low, value, high = (
        heard.gauges[f"gate_measure{{stage=publish,measure=accuracy,bound={bound}}}"]
        for bound in ("low", "value", "high")
    )
    assert 0 <= low <= value <= high <= 1
    published = heard.gauges["published_timestamp_seconds{stage=publish}"]
    heard.gauges.clear()
    heard.counted.clear()
    refused = job.run("-o", "publish.gate.accuracy_above=0.999")
    assert refused.code == 4
    assert heard.counted == {"runs{stage=publish,outcome=gate_failed}": 1}
    assert heard.gauges["gate_passed{stage=publish}"] == 0
    # From the start on, for whoever asks how long ago it was.
    assert heard.gauges["published_timestamp_seconds{stage=}"] == published


def exported(text: str) -> list[str]:
    """The lines of this Ray's metrics that hold a text, as soon as there are any."""
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            found = [line for line in answer.read().decode().splitlines() if text in line and line[0] != "#"]
            if found:
                return found
        time.sleep(0.5)
    raise AssertionError(f"{text} was not told within {LONGEST:g} seconds")


@pytest.mark.ray
def test_an_embedded_ray_has_the_metrics_too_also_one_that_is_started_later(
    no_ray: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.setattr(metrics, "_tell_again", tell_again)
    tell(PUBLISHED, 1.0)
    try:
        for _ in range(2):
            connect(Need("a small stage"))
            count(RUNS, outcome="ok")
            [line] = exported("ray_dpo_ray_runs_total")
            assert 'run="nightly"' in line and 'outcome="ok"' in line and line.endswith(" 1.0")
            time.sleep(5)  # after two of Ray's reports it would have forgotten a gauge that nobody sets anew
            [line] = exported("ray_dpo_ray_published_timestamp_seconds")
            assert 'stage="ingest"' in line and line.endswith(" 1.0")
            disconnect()
    finally:
        disconnect()
