"""What a person gets to read of an error of a worker."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.errors import ConfigError, DataError, DpoRayError, RewardError
from dpo_ray.on_ray.failures import WorkerError, raise_ours
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect, disconnect
from dpo_ray.on_ray.shard_worker import ShardWorker
from dpo_ray.pairs import CANDIDATES
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
from pipelines.cli import main
from tests.command_line import CONFIGS, Finished, overrides, summary_of

HERE = str(Path(__file__))


def refuse(source: dict[str, Any]) -> Any:
    raise DataError(f"{source['file']} is damaged.")


def break_down(source: dict[str, Any]) -> Any:
    return json.loads(source["file"])


def build_refusal() -> Any:
    raise ConfigError("model.path is nothing.")


def line_of(code: str) -> int:
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip() == code)


REFUSES = line_of("""raise DataError(f"{source['file']} is damaged.")""")
BREAKS = line_of('return json.loads(source["file"])')


def failure_of(worker: ShardWorker) -> Exception:
    batch = pa.table({"task": [pickle.dumps(("x.parquet", {"file": "{"}))]})
    [row] = [row for table in worker(batch) for row in table.to_pylist()]
    assert row["name"] == "x.parquet"
    return pickle.loads(row["failure"])


def told(error: BaseException) -> DpoRayError:
    with pytest.raises(DpoRayError) as caught:
        raise_ours(error, "pairs")
    return caught.value


def test_an_error_of_ours_arrives_as_it_is_with_the_workers_traceback(tmp_path: Path):
    error = failure_of(ShardWorker(Location.of(tmp_path), lambda: refuse, {}))
    assert (type(error), str(error)) == (DataError, "{ is damaged.")
    [note] = error.__notes__
    assert "On the worker" in note and f'"{HERE}", line {REFUSES}, in refuse' in note
    assert told(error) is error


def test_an_error_of_building_the_worker_arrives_with_its_first_task(tmp_path: Path):
    error = failure_of(ShardWorker(Location.of(tmp_path), build_refusal, {}))
    assert (type(error), str(error)) == (ConfigError, "model.path is nothing.")


def test_any_other_error_is_told_with_its_cause_and_its_line(tmp_path: Path):
    error = failure_of(ShardWorker(Location.of(tmp_path), lambda: break_down, {}))
    assert isinstance(error, WorkerError)
    ours = told(error)
    assert type(ours) is DpoRayError and ours.__cause__ is error
    assert str(ours).startswith("The stage pairs failed on Ray: json.decoder.JSONDecodeError: Expecting property name")
    assert f", at {HERE}:{BREAKS} in break_down. What" in str(ours)
    assert "\n" not in str(ours)


def test_an_error_that_is_no_workers_is_told_with_its_line():
    try:
        break_down({"file": "{"})
    except ValueError as error:
        assert f"{HERE}:{BREAKS} in break_down" in str(told(error))


@pytest.mark.ray
def test_errors_of_a_task_and_of_rays_own_are_told(no_ray, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect(Need("this test"))
    try:
        with pytest.raises(DataError) as caught:
            ray.get(ray.remote(refuse).remote({"file": "a.parquet"}))
        # Ray's class is ours too, and its text is a traceback.
        assert "\n" in str(caught.value)
        ours = told(caught.value)
        assert (type(ours), str(ours)) == (DataError, "a.parquet is damaged.")
        assert ours.__cause__ is caught.value
        with pytest.raises(ValueError) as other:
            ray.get(ray.remote(break_down).remote({"file": "{"}))
        assert f"{HERE}:{BREAKS} in break_down" in str(told(other.value))
    finally:
        disconnect()


REWARD = '''"""A person's own reward."""


def score(prompt, completion, finished):
    return share(completion)


def share(completion):
    if "zero" in completion:
        raise ValueError("no share\\nof zero")
    return 1.0 / len(completion)
'''


@pytest.fixture
def pairing(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Runs `dpo-ray generate` with a person's own reward on given completions, in place of those that vLLM draws."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("DPO_RAY_TRACEBACK", raising=False)
    (tmp_path / "own_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")  # of Ray's workers
    monkeypatch.setattr("dpo_ray.on_ray.vllm_version.require_vllm", lambda why: "none")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Name a number."}\n')

    def run(*completions: str) -> Finished:
        def drawn(context: Any, model: Any, sampling: Any, asks: Any, prompts: Artifact) -> tuple[Artifact, bool]:
            row = {
                "prompt_id": "00ff",
                "split": "train",
                "prompt": [{"role": "user", "content": "Name a number."}],
                "completions": [{"text": text, "finished": True, "num_tokens": 3} for text in completions],
            }
            location = Location.of(tmp_path / "drawn")
            entry = write_shard(location / "0.parquet", pa.Table.from_pylist([row], schema=CANDIDATES), {})
            return publish(location, "candidates", identity={}, inputs={}, files=[entry]), False

        monkeypatch.setattr("pipelines.generate.sample", drawn)
        settings = {
            "run__output": str(tmp_path / "out"),
            "model__path": str(tiny_model),
            "generate__prompts": str(tmp_path / "prompts.jsonl"),
            "generate__reward": "own_reward:score",
        }
        arguments = ["generate", str(CONFIGS / "demo_cpu.yaml"), *overrides(**settings)]
        monkeypatch.setattr(sys, "argv", ["dpo-ray", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return Finished(int(ended.value.code or 0), said.out + said.err)

    yield run
    sys.modules.pop("own_reward", None)


@pytest.mark.ray
@pytest.mark.parametrize("whole", [False, True], ids=["one paragraph", "whole traceback"])
def test_a_reward_that_fails_on_a_worker_is_told_with_its_file_and_line(pairing, tmp_path, monkeypatch, whole: bool):
    if whole:
        monkeypatch.setenv("DPO_RAY_TRACEBACK", "1")
    done = pairing("One is.", "It is zero.")
    assert done.code == RewardError.exit_code == 2, done.log
    paragraph, where = done.log.strip().splitlines()[-1].split(" The log with all that was said is ")
    assert where.endswith("log.txt.")
    file = tmp_path / "own_reward.py"
    for text in (
        "RewardError: The reward own_reward:score failed on completion 2 of the prompt 00ff ('Name a number.' → ",
        "'It is zero.'): ValueError: no share of zero",
        f", at {file}:10 in share, called at {file}:5 in score.",
        "Mend it",
        "DPO_RAY_TRACEBACK=1",
    ):
        assert text in paragraph, done.log
    assert summary_of(tmp_path / "out")["reasons"] == [paragraph.removeprefix("RewardError: ")]
    traceback = f'File "{file}", line 10, in share'
    assert ("Traceback (most recent call last)" in done.log, traceback in done.log) == (whole, whole), done.log
    assert ("in raise_ours" in done.log) == whole  # the driver's side of it
