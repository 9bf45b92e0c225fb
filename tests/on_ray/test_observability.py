"""A real run on a real Ray, scraped by a real Prometheus: what the dashboard shows of it, and what the alerts say."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.on_ray.metrics import GPU_MEMORY, RETRIES, STEPS_SKIPPED
from tests.command_line import Finished, dpo_ray
from tests.prometheus import Prometheus, program, prometheus, rules, selectors, shown
from tests.ray_head import ray_head
from tests.whole_run import Job, number_rows, word_model

pytestmark = pytest.mark.ray

UNTOLD = {
    f"{RETRIES.exported}": "no process dies",
    f"{STEPS_SKIPPED.exported}": "every loss is finite",
    'ray_dpo_ray_runs_total{outcome="error"}': "no run fails",
    'ray_dpo_ray_runs_total{outcome="gate_failed"}': "every model passes",
    "ray_memory_manager_worker_eviction_total": "there is memory enough",
    "ray_node_failure_total": "no node is lost",
    f"{GPU_MEMORY.exported}": "there is no GPU",
    "ray_node_gram_used": "there is no GPU",
    "ray_node_gpus_utilization": "there is no GPU",
}
"""What a healthy run on CPUs does not tell, and why."""


@dataclass(frozen=True)
class Watched:
    """A run that has ended, and the Prometheus that looked on."""

    prometheus: Prometheus
    job: Job
    env: dict[str, str]
    done: Finished
    began: float
    ended: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Watched]:
    program("prometheus")  # before anything is started
    folder = tmp_path_factory.mktemp("observability")
    job = Job(
        folder,
        word_model(folder / "words", small_model),
        run={"name": "numbers", "output": str(folder / "out"), "log_format": "json"},
        data={"max_prompt_tokens": 4},
        train={"global_batch_size": 4, "epochs": 20, "eval_every_steps": 20},  # some seconds
    )
    too_long = {"prompt": "10 11 12 13 14 15", "chosen": "16", "rejected": "17"}
    job.write("a.jsonl", [*number_rows(0, 40), too_long])
    with pytest.MonkeyPatch.context() as patch:
        # What a process tells last is there for twice as long.
        patch.setenv("RAY_metrics_report_interval_ms", "2000")
        with ray_head() as head, prometheus(Path(head.folder) / "prom_metrics_service_discovery.json") as server:
            server.wait_for('up{job="ray"} == 1')
            began = time.time()
            done = dpo_ray("run", str(job.path), env=head.env)
            assert done.code == 0, done.log
            server.wait_for('ray_dpo_ray_runs_total{outcome="ok"}')
            yield Watched(server, job, head.env, done, began, time.time())


def is_told(selector: str) -> bool:
    name = selector.replace('{run=~".*"}', "").replace('run=~".*", ', "")
    return name not in UNTOLD


@pytest.mark.parametrize("panel", shown())
def test_a_panel_shows_what_a_healthy_run_tells(watched: Watched, panel: str):
    expression = shown()[panel]
    found = watched.prometheus.over(expression, watched.began, watched.ended)
    assert bool(found) == all(is_told(selector) for selector in selectors(expression)), expression
    for series in found:
        assert all(float(value) == float(value) for _, value in series["values"]), series  # none is NaN


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_looks_at_what_there_is_and_is_silent_on_a_healthy_run(watched: Watched, rule: dict[str, Any]):
    firing = f'ALERTS{{alertname="{rule["alert"]}", alertstate="firing"}}'
    assert watched.prometheus.over(firing, watched.began, watched.ended) == []
    for selector in selectors(rule["expr"]):
        assert bool(watched.prometheus.over(selector, watched.began, watched.ended)) == is_told(selector), selector


def test_prometheus_evaluates_every_rule_and_none_fires(watched: Watched):
    [group] = watched.prometheus.ask("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in rules()]
    assert {(rule["health"], rule["state"]) for rule in group["rules"]} == {("ok", "inactive")}


def last(watched: Watched, expression: str) -> float:
    """The last value in the run's time; over all series the sum."""
    found = watched.prometheus.over(expression, watched.began, watched.ended)
    return sum(float(series["values"][-1][1]) for series in found)


def test_what_is_told_is_what_the_run_has_recorded(watched: Watched):
    [folder] = (watched.job.output / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert last(watched, 'ray_dpo_ray_rows_total{stage="tokenize", artifact="tokenized"}') == 41
    dropped = summary["stages"]["tokenize"]["rows"]["dropped"]
    assert dropped == {"prompt_too_long": 1}
    assert last(watched, 'ray_dpo_ray_rows_dropped_total{stage="tokenize", reason="prompt_too_long"}') == 1
    assert last(watched, "ray_dpo_ray_shards_left") == last(watched, "ray_dpo_ray_steps_left") == 0
    assert last(watched, 'ray_dpo_ray_tokens_total{artifact="train"}') == metrics[-1]["num_tokens"]
    assert last(watched, 'ray_dpo_ray_loss{pairs="train"}') == pytest.approx(metrics[-1]["loss"])
    assert last(watched, 'ray_dpo_ray_reward_margin{pairs="held_out"}') == pytest.approx(
        metrics[-1]["eval_rewards/margins"]
    )
    accuracy = 'ray_dpo_ray_gate_measure{measure="accuracy", bound="value"}'
    assert last(watched, accuracy) == pytest.approx(summary["eval"]["accuracy"]["value"])
    runs = watched.prometheus.ask("label/run/values")
    assert runs == ["numbers"]


def test_lines_of_a_run_come_as_objects_from_wherever_they_are_written(watched: Watched):
    records = [json.loads(line) for line in watched.done.log.splitlines()]
    stages = {record["stage"] for record in records}
    assert {"start", "ray", "tokenized", "train", "publish"} <= stages
    assert any(record["shard"] for record in records if record["stage"] == "tokenized")
    checkpoints = [record for record in records if record["message"].startswith("checkpoint at step")]  # of a worker
    assert checkpoints and {record["node"] for record in checkpoints} == {socket.gethostname()}
    [folder] = (watched.job.output / "runs").iterdir()
    kept = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert kept == [{**record, "run": folder.name} for record in records]
    [joined] = [record for record in records if record["stage"] == "ray"]
    assert f"on the cluster {watched.env['RAY_ADDRESS']}, whose dashboard is at http://" in joined["message"]


def test_a_gate_that_fails_is_an_alert_though_the_run_is_over_in_seconds(watched: Watched):
    config = yaml.safe_load(watched.job.path.read_text())
    watched.job.configure(**config | {"publish": {"gate": {"accuracy_above": 0.999}}})
    refused = dpo_ray("run", str(watched.job.path), env=watched.env)
    assert refused.code == 4, refused.log
    [alert] = watched.prometheus.wait_for('ALERTS{alertname="DpoRayGateFailed", alertstate="firing"}')
    assert alert["metric"]["run"] == "numbers"
