"""dpo-ray from Python: what is promised, and whole runs by it without Ray."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import api, rewards
from dpo_ray.errors import ConfigError, DataError, DpoRayError, GateFailed, Interrupted, Terminated
from pipelines.context import RunContext
from tests.whole_run import Job, no_cluster, number_rows, word_model

ONE = "(config: 'Config', *, run_id: 'str | None' = None) -> 'Run'"
PROMISED = {
    "evaluate": ONE,
    "generate": ONE,
    "ingest": ONE,
    "iterate": ONE,
    "load_config": (
        "(source: 'str | Path | Mapping[str, Any]', overrides: 'Mapping[str, Any] | None' = None) -> 'Config'"
    ),
    "plan": "(config: 'Config', *, rows: 'int' = 2000) -> 'Mapping[str, Any]'",
    "publish": ONE,
    "reference": ONE,
    "rule": (
        "(function: 'Callable[..., Any]', *, weight: 'float' = 1.0, batch: 'bool' = False, **arguments: 'Any') "
        "-> 'dict[str, Any]'"
    ),
    "run": ONE,
    "sweep": ONE.replace("'Run'", "'Sweep'"),
    "tokenize": ONE,
    "train": "(config: 'Config', *, reference: 'str | None' = None, run_id: 'str | None' = None) -> 'Run'",
}
RUN = ["run_id", "folder", "outcome", "stages", "published", "accuracy", "win_rate", "summary"]
RETURNED = {
    "Estimate": ["value", "low", "high", "n"],
    "Run": RUN,
    "Stage": ["fingerprint", "uri", "rows", "reused", "seconds"],
    "Sweep": [*RUN, "best", "best_config", "trials"],
}


def test_what_is_promised_stands():
    """A change here breaks programs of others: see the docstring of dpo_ray.api for how a name goes."""
    functions = {name: str(inspect.signature(found)) for name, found in vars(api).items() if name in PROMISED}
    assert functions == PROMISED
    assert {name: [field.name for field in fields(getattr(api, name))] for name in RETURNED} == RETURNED
    assert api.__all__ == sorted([*PROMISED, *RETURNED, "Config", "DpoRayError"], key=lambda n: (n.lower() == n, n))


@pytest.fixture
def job(tmp_path: Path, small_model: Path) -> Iterator[Job]:
    job = Job(tmp_path, word_model(tmp_path / "model", small_model))
    job.write("one.jsonl", number_rows(0, 40))
    with no_cluster():
        yield job


def test_a_run_gives_what_came_of_it_and_then_nothing_new(job: Job, capfd: pytest.CaptureFixture[str]):
    config = api.load_config(job.path)
    first = api.run(config, run_id="first")
    said = capfd.readouterr()
    assert said.out == "" and "[publish] published" in said.err and "\x1e" not in said.err
    assert (first.run_id, first.outcome) == ("first", "published")
    assert first.folder == str(job.output / "runs/first")
    assert first.published == str(job.output / "models/numbers" / job.published())
    assert {"ingest", "duplicates", "tokenize", "reference", "calibrate", "train", "evaluate"} <= first.stages.keys()
    made = first.stages["ingest"]
    assert (made.rows, made.reused, (Path(made.uri) / "manifest.json").exists()) == (40, False, True)
    assert made.uri.endswith(made.fingerprint)
    assert first.accuracy is not None and first.accuracy.low <= first.accuracy.value <= first.accuracy.high
    assert first.win_rate is None
    assert json.loads((Path(first.folder) / "summary.json").read_text()) == first.summary
    assert (Path(first.folder) / "report.html").exists()
    with pytest.raises(FrozenInstanceError):
        first.run_id = "x"  # type: ignore[misc]
    again = api.run(config)
    assert again.outcome == "nothing new" and again.published == first.published
    assert again.run_id != "first" and all(stage.reused for stage in again.stages.values())
    assert again.stages.keys() == first.stages.keys()


def test_stages_one_by_one_take_over_what_is_finished(job: Job):
    config = api.load_config(job.path)
    runs = [api.ingest(config), api.tokenize(config), api.reference(config), api.train(config), api.evaluate(config)]
    assert [run.outcome for run in runs] == ["done"] * 5
    made = [[name for name, stage in run.stages.items() if not stage.reused] for run in runs]
    assert [names[0] for names in made] == ["ingest", "tokenize", "reference", "train", made[-1][0]]
    assert [names.count("ingest") for names in made] == [1, 0, 0, 0, 0] and "evaluate" in made[-1]
    assert runs[-1].accuracy is not None and runs[0].accuracy is None
    given = api.train(config, reference=runs[2].stages["reference"].uri)
    assert given.stages["train"].fingerprint == runs[3].stages["train"].fingerprint
    assert api.publish(config).outcome == "published"


def test_it_runs_while_an_event_loop_does_and_in_a_thread(job: Job):
    config = api.load_config(job.path)

    async def cell() -> api.Run:
        return api.ingest(config)

    before = signal.getsignal(signal.SIGTERM)
    assert asyncio.run(cell()).outcome == "done"
    found: list[api.Run] = []
    thread = threading.Thread(target=lambda: found.append(api.tokenize(config)))
    thread.start()
    thread.join()
    assert found[0].stages["ingest"].reused and signal.getsignal(signal.SIGTERM) is before


def test_a_failure_is_raised_and_recorded(job: Job):
    with pytest.raises(GateFailed) as failed:
        api.run(api.load_config(job.path, {"publish.gate.accuracy_above": 0.99}), run_id="gated")
    folder = job.output / "runs/gated"
    assert failed.value.__notes__ == [f"The run's folder is {folder}."]
    assert json.loads((folder / "summary.json").read_text())["exit_code"] == 4
    with pytest.raises(DataError) as missing:
        api.run(api.load_config(job.path, {"data.train": "nowhere/*.jsonl"}))
    assert not hasattr(missing.value, "__notes__")


@pytest.mark.parametrize(("raised", "expected"), [(KeyboardInterrupt(), Interrupted), (SystemExit(15), Terminated)])
def test_an_interrupt_is_recorded_too(job: Job, monkeypatch, raised: BaseException, expected: type[Exception]):
    def interrupted(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("pipelines.align.align", interrupted)
    with pytest.raises(expected):
        api.train(api.load_config(job.path), run_id="ended")
    summary = json.loads((job.output / "runs/ended/summary.json").read_text())
    assert summary["exit_code"] == expected.exit_code


def test_hooks_are_called_whoever_runs_it(job: Job, tmp_path: Path):
    kept = tmp_path / "kept"
    api.ingest(api.load_config(job.path, {"run.hooks.on_success.command": ["cp", "/dev/stdin", str(kept)]}))
    assert json.loads(kept.read_text())["event"] == "success"


def test_a_configuration_is_a_file_or_a_mapping_with_overrides(job: Job):
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "x"}}
    found = api.load_config(tree, {"train.learning_rate": 1e-6, "train.loss": {"type": "ipo", "beta": 0.3}})
    assert (found.train.learning_rate, found.train.loss.beta) == (1e-6, 0.3)
    assert "train" not in tree
    assert api.load_config(str(job.path), {"run.seed": 7}).run.seed == 7
    with pytest.raises(ConfigError, match=r"the mapping with overrides: train\.lr is not a known key"):
        api.load_config(tree, {"train.lr": 1})
    with pytest.raises(ConfigError, match=r"the override run\.name\.x: name is a value"):
        api.load_config(tree, {"run.name.x": 1})


def test_a_run_whose_record_cannot_be_written_says_that_its_work_is_done(job: Job, monkeypatch: pytest.MonkeyPatch):
    closed: list[str] = []

    def full(context: RunContext, code: int, reasons: list[str]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunContext, "write_summary", full)
    monkeypatch.setattr("pipelines.tracking.end_tracking", lambda context, state: closed.append(state))
    with pytest.raises(DpoRayError, match=r"has done its work, .* could not be written .*No space left on device"):
        api.run(api.load_config(job.path))
    assert closed == ["finished"] and job.published()


def test_of_two_calls_at_once_the_second_begins_when_the_first_has_ended(monkeypatch: pytest.MonkeyPatch):
    first_is_in, may_end, order = threading.Event(), threading.Event(), []

    def record_run(work: str, run_id: str | None, looking: Any) -> str:
        order.append(f"{work} begins")
        if work == "first":
            first_is_in.set()
            assert may_end.wait(60)
        order.append(f"{work} ends")
        return work

    monkeypatch.setattr("pipelines.record_run.record_run", record_run)
    threads = [threading.Thread(target=api._recorded, args=(work, None)) for work in ("first", "second")]
    threads[0].start()
    assert first_is_in.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert order == ["first begins", "first ends", "second begins", "second ends"]


def test_values_that_are_set_stay_the_callers(job: Job):
    loss = {"type": "sigmoid"}
    config = api.load_config(job.path, {"train.loss": loss, "train.loss.beta": 0.5})
    assert config.train.loss.beta == 0.5 and loss == {"type": "sigmoid"}


def test_sweep_and_rounds_say_what_they_lack(job: Job):
    config = api.load_config(job.path)
    with pytest.raises(ConfigError, match="no section iterate"):
        api.iterate(config)
    with pytest.raises(ConfigError, match="tune"):
        api.sweep(config)


def test_a_plan_is_told_without_computing(job: Job):
    told = api.plan(api.load_config(job.path))
    assert [stage["stage"] for stage in told["stages"]][:2] == ["ingest", "tokenize"]
    assert not (job.output / "runs").exists()


def test_a_function_is_named_as_a_reward():
    found = api.rule(rewards.length_window, weight=0.5, at_most=40)
    tree = {
        "run": {"name": "n", "output": "o"},
        "model": {"path": "m"},
        "generate": {"prompts": "p.jsonl", "reward": [found]},
    }
    [source] = api.load_config(tree).generate.reward
    assert source.function == "dpo_ray.rewards:length_window" and source.arguments == {"at_most": 40}
    assert math.isclose(source.weight, 0.5)


def test_a_function_that_workers_cannot_import_is_refused():
    def inner(prompt: str, completion: str, finished: bool) -> float:
        return 0.0

    alone = type(inner)(inner.__code__, {"__name__": "__main__"}, "score")
    for function in (inner, alone, lambda *_: 0.0, partial(rewards.length_window, at_most=3)):
        with pytest.raises(ConfigError, match="workers can import"):
            api.rule(function)


def test_a_ray_of_the_process_is_one_to_work_on_and_ours_is_not(monkeypatch):
    import sys
    from types import SimpleNamespace

    from dpo_ray.on_ray import session

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "_session", session._Session())
    stands = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", stands)
    session.look_for_ray()
    assert not session.is_embedded()
    session.disconnect()  # which would fail: this Ray has no shutdown
    stands.is_initialized = lambda: False
    session.look_for_ray()
    assert session.is_embedded()
    stands.is_initialized, session._session.is_open = (lambda: True), True
    session.look_for_ray()
    assert session.is_embedded()
