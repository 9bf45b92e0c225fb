"""The gate before the pass and after it, the choice of an engine, and the pairs drawn for them; no Ray is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayError, RayTaskError

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DataError, ReferenceMismatch
from dpo_ray.on_ray import calibrate, engine_choice
from dpo_ray.on_ray.calibrate import choose_engine
from dpo_ray.pairs import TOKENIZED
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard
from tests.unit.shards.test_score import FOUR

Settings = Callable[..., Config]


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A configuration with engine auto, of a model folder without a model in it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(engine_choice, "has_vllm", lambda: True)
    monkeypatch.setattr(engine_choice, "require_vllm", lambda _: "0.32.0")

    def config(**options: Any) -> Config:
        return Config.model_validate(
            {
                "run": {"name": "n", "output": str(tmp_path / "out")},
                "model": {"path": str(tmp_path / "model")},
                "data": {"train": "x"},
                "reference": {"engine": "auto", "calibration_pairs": 2, **options},
            }
        )

    return config


def tokenized_rows(folder: Path) -> Artifact:
    rows = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(FOUR)
    ]
    location = Location.of(folder) / "tokenized"
    files = [write_shard(location / "0.parquet", pa.Table.from_pylist(rows, schema=TOKENIZED), {})]
    return publish(location, "tokenized", identity={"tokenizer": "t"}, inputs={}, files=files)


def engines_that_say(monkeypatch: pytest.MonkeyPatch, vllm: Any, torch: Sequence[float]) -> list[str]:
    """Both engines answer with these log-probs of chosen and rejected, or fail; returns who was asked."""
    asked: list[str] = []

    def scored(pool: Any) -> Any:
        asked.append(pool.build.__name__)
        if pool.build.__name__ == "_score_by_trainer":
            return [[torch[0]]] * 2, [[torch[1]]] * 2
        if isinstance(vllm, Exception):
            raise vllm
        return [[vllm[0]]] * 2, [[vllm[1]]] * 2

    monkeypatch.setattr(calibrate, "alone", scored)
    monkeypatch.setattr(engine_choice, "alone", scored)
    return asked


BOTH = ["_score_by_vllm", "_score_by_trainer"]
TORCH = (-1.0, -2.0)
NEAR, FAR = (-1.0, -2.0005), (-1.0, -2.06)
FAILURES = [
    RayTaskError("score", "boom\nno such architecture", ValueError()),
    RayError("the node died"),
]


# What is drawn


def shards_of(folder: Path, sizes: Sequence[int], name: str = "rows") -> Artifact:
    """Rows that are numbered through."""
    location, files, first = Location.of(folder) / name, [], 0
    for n, size in enumerate(sizes):
        rows = [
            {"pair_id": f"{i}", "prompt_id": "p", "split": "train", "prompt_ids": [1], "chosen_ids": [2]}
            for i in range(first, first + size)
        ]
        files.append(write_shard(location / f"{n}.parquet", pa.Table.from_pylist(rows, schema=TOKENIZED), {}))
        first += size
    return publish(location, "tokenized", identity={"sizes": list(sizes), "name": name}, inputs={}, files=files)


def drawn(rows: Artifact, count: int) -> list[int]:
    return [int(pair.pair_id) for pair in calibrate._drawn(rows, count)]


def test_pairs_are_drawn_from_all_rows_of_all_shards_the_same_every_time(tmp_path):
    rows = shards_of(tmp_path, [3, 0, 500, 1, 96])
    found = drawn(rows, 60)
    assert found == drawn(rows, 60) == sorted(set(found)) and len(found) == 60
    # A shard has its share of them by its rows, and not its first: 50 ± 3 of 60 are of the one of 500.
    assert 40 <= sum(3 <= n < 503 for n in found) <= 58
    assert max(found) > 503 and len([n for n in found if 3 <= n < 63]) < 20
    assert drawn(rows, 600) == drawn(rows, 10_000) == list(range(600))
    assert drawn(shards_of(tmp_path, [3, 0, 500, 1, 96], name="others"), 60) != found


def test_at_most_as_many_shards_are_read_as_pairs_are_drawn(tmp_path, monkeypatch):
    rows, read = shards_of(tmp_path, [20] * 40), []

    def counted(location: Location) -> pa.Table:
        read.append(location.name)
        return read_whole_shard(location)

    monkeypatch.setattr(calibrate, "read_whole_shard", counted)
    assert len(drawn(rows, 6)) == 6
    assert len(read) == len(set(read)) <= 6


def test_without_rows_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(DataError, match="holds no pairs"):
        calibrate._drawn(shards_of(tmp_path, [0, 0]), 4)


# auto


def test_auto_takes_vllm_where_it_agrees_and_keeps_to_it(tmp_path, auto: Settings, monkeypatch, capfd):
    asked = engines_that_say(monkeypatch, NEAR, TORCH)
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    assert choose_engine(output, auto(), rows) == "vllm"
    assert asked == BOTH
    said = "".join(capfd.readouterr())
    assert "vllm, for on 2 pairs" in said and "|Δ| p99 5.0e-04" in said
    # Later it is not measured again, whatever would be found now. Other limits judge what was.
    asked = engines_that_say(monkeypatch, FAR, TORCH)
    assert choose_engine(output, auto(), rows) == "vllm"
    assert choose_engine(output, auto(tolerance={"p99_per_token": 1e-4}), rows) == "torch"
    assert choose_engine(output, auto(engine="vllm"), rows) == "vllm"
    assert asked == []


@pytest.mark.parametrize(
    ("vllm", "why"),
    [
        (FAR, "do not agree: the 99th percentile of |Δ| per token is 6.0e-02 (p99_per_token=0.01)"),
        ((-1.0, math.nan), "not finite"),
        (FAILURES[0], "cannot score this model: no such architecture"),
    ],
)
def test_auto_takes_torch_where_vllm_does_not_agree_or_fails(tmp_path, auto: Settings, monkeypatch, capfd, vllm, why):
    engines_that_say(monkeypatch, vllm, TORCH)
    assert choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path)) == "torch"
    said = "".join(capfd.readouterr())
    assert "reference.engine=auto: torch, for " in said and why in said


def test_auto_does_not_remember_what_a_lost_node_did(tmp_path, auto: Settings, monkeypatch, capfd):
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    engines_that_say(monkeypatch, RayError("the node died"), TORCH)
    assert choose_engine(output, auto(), rows) == "torch"
    assert "reference.engine=auto: torch for this run" in "".join(capfd.readouterr())
    engines_that_say(monkeypatch, TORCH, TORCH)
    assert choose_engine(output, auto(), rows) == "vllm"


def test_auto_takes_torch_where_vllm_is_not_installed(tmp_path, auto: Settings, monkeypatch):
    asked = engines_that_say(monkeypatch, TORCH, TORCH)
    monkeypatch.setattr(engine_choice, "has_vllm", lambda: False)
    assert choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path)) == "torch"
    assert asked == []


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_errors_of_its_own_are_not_hidden(tmp_path, auto: Settings, monkeypatch, engine: str):
    engines_that_say(monkeypatch, ConfigError("the cluster is too small"), TORCH)
    with pytest.raises(ConfigError, match="too small"):
        choose_engine(Location.of(tmp_path / "out"), auto(engine=engine), tokenized_rows(tmp_path))


# A named engine


def test_vllm_that_does_not_agree_is_refused_before_the_pass_and_is_not_measured_twice(
    tmp_path, auto: Settings, monkeypatch
):
    asked = engines_that_say(monkeypatch, FAR, TORCH)
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(ReferenceMismatch) as refused:
            choose_engine(output, auto(engine="vllm"), rows)
        for text in ("Nothing has been scored", "6.0e-02 (p99_per_token=0.01)", "reference.engine=torch", "remove "):
            assert text in str(refused.value)
    assert asked == BOTH
    # The same comparison is auto's; wider limits let it pass.
    assert choose_engine(output, auto(), rows) == "torch"
    wider = {"p99_per_token": 0.1, "worst_token": 0.1}
    assert choose_engine(output, auto(engine="vllm", tolerance=wider), rows) == "vllm"
    assert asked == BOTH


def test_log_probs_that_are_no_numbers_are_refused_before_the_pass(tmp_path, auto: Settings, monkeypatch):
    engines_that_say(monkeypatch, (-1.0, math.nan), TORCH)
    with pytest.raises(ReferenceMismatch, match="not finite"):
        choose_engine(Location.of(tmp_path / "out"), auto(engine="vllm"), tokenized_rows(tmp_path))


@pytest.mark.parametrize("failure", FAILURES, ids=["a task", "a node"])
def test_vllm_that_fails_on_the_sample_is_left_to_the_pass_and_is_not_remembered(
    tmp_path, auto: Settings, monkeypatch, capfd, failure
):
    # One of the rows may be at fault, which the pass finds and quarantines.
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    engines_that_say(monkeypatch, failure, TORCH)
    assert choose_engine(output, auto(engine="vllm"), rows) == "vllm"
    assert "not compared with the trainer's forward before the pass, for vLLM cannot" in "".join(capfd.readouterr())
    asked = engines_that_say(monkeypatch, TORCH, TORCH)
    assert choose_engine(output, auto(engine="vllm"), rows) == "vllm"
    assert asked == BOTH


def test_a_failure_that_auto_recorded_does_not_stop_who_names_vllm(tmp_path, auto: Settings, monkeypatch):
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    engines_that_say(monkeypatch, FAILURES[0], TORCH)
    assert choose_engine(output, auto(), rows) == "torch"
    assert choose_engine(output, auto(engine="vllm"), rows) == "vllm"


def test_torch_is_the_trainers_forward_and_is_not_compared(tmp_path, auto: Settings, monkeypatch):
    asked = engines_that_say(monkeypatch, FAR, TORCH)
    assert choose_engine(Location.of(tmp_path / "out"), auto(engine="torch"), tokenized_rows(tmp_path)) == "torch"
    assert asked == []


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"dtype": "bfloat16"}},
        {"vllm": {"gpus_per_actor": 1}},
        {"vllm": {"max_num_batched_tokens": 64}},
        {"reference": {"calibration_pairs": 3}},
        None,
    ],
    ids=["dtype", "device", "chunks", "more pairs", "version"],
)
def test_another_model_device_or_version_is_compared_anew(tmp_path, auto: Settings, monkeypatch, other):
    asked = engines_that_say(monkeypatch, TORCH, TORCH)
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    config = auto(engine="vllm")
    choose_engine(output, config, rows)
    choose_engine(output, config.model_copy(update={"run": config.run.model_copy(update={"name": "m"})}), rows)
    assert asked == BOTH
    if other is None:
        monkeypatch.setattr(engine_choice, "require_vllm", lambda _: "0.33.0")
    changed = {section: getattr(config, section).model_copy(update=values) for section, values in (other or {}).items()}
    choose_engine(output, config.model_copy(update=changed), rows)
    assert asked == 2 * BOTH


# After the pass


def scored_rows(folder: Path, logprobs: Sequence[float]) -> Artifact:
    """A reference artifact with these log-probs of chosen and of rejected, each of one token."""
    rows = [
        {"pair_id": str(n), "prompt_id": str(n), "split": "train", "prompt_ids": [1], "chosen_ids": [2],
         "rejected_ids": [3], "chosen_ref_logprobs": [logprobs[0]], "rejected_ref_logprobs": [logprobs[1]]}
        for n in range(2)
    ]  # fmt: skip
    location = Location.of(folder) / "reference"
    table = pa.Table.from_pylist(rows)
    files = [write_shard(location / "0.parquet", table, {})]
    return publish(location, "reference", identity={"engine": "vllm"}, inputs={}, files=files)


def test_finished_scores_are_held_against_the_trainers_and_wider_limits_judge_them_anew(
    tmp_path, auto: Settings, monkeypatch, capfd
):
    asked = engines_that_say(monkeypatch, None, TORCH)
    output, reference = Location.of(tmp_path / "out"), scored_rows(tmp_path, FAR)
    with pytest.raises(ReferenceMismatch, match=r"engine vllm, float32.*of 4 completions.*p99_per_token=0\.01"):
        calibrate.calibrate(output, auto(), reference)
    wider = {"p99_per_token": 0.1, "worst_token": 0.1}
    artifact, reused = calibrate.calibrate(output, auto(tolerance=wider), reference)
    assert reused and asked == ["_score_by_trainer"]
    assert artifact.manifest.metrics["sequence"]["max"] == pytest.approx(0.06, abs=1e-6)


def test_finished_scores_that_are_no_numbers_are_refused_and_nothing_is_recorded(tmp_path, auto, monkeypatch):
    engines_that_say(monkeypatch, None, TORCH)
    output, reference = Location.of(tmp_path / "out"), scored_rows(tmp_path, (-1.0, math.nan))
    with pytest.raises(ReferenceMismatch, match="not finite"):
        calibrate.calibrate(output, auto(), reference)
    assert not list((tmp_path / "out").rglob("manifest.json"))
