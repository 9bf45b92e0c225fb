"""The choice of an engine, and the pairs that it is made on; no Ray is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayError, RayTaskError

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import calibrate, engine_choice
from dpo_ray.on_ray.calibrate import choose_engine
from dpo_ray.pairs import TOKENIZED
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
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


def test_the_calibrated_pairs_are_of_shards_from_the_first_to_the_last(tmp_path):
    location = Location.of(tmp_path) / "tokenized"
    files = []
    for n in range(40):
        rows = [{"pair_id": f"{n}", "prompt_id": "p", "split": "train", "prompt_ids": [1], "chosen_ids": [2]}]
        table = pa.Table.from_pylist(rows if n != 26 else [], schema=TOKENIZED)
        files.append(write_shard(location / f"{n}.parquet", table, {}))
    rows = publish(location, "tokenized", identity={}, inputs={}, files=files)
    assert [pair.pair_id for pair in calibrate._sample(rows, 4)] == ["0", "12", "25", "39"]
    assert len(calibrate._sample(rows, 39)) == len(calibrate._sample(rows, 100)) == 39
    assert [pair.pair_id for pair in calibrate._sample(rows, 1)] == ["0"]


def test_auto_takes_vllm_where_it_agrees_and_keeps_to_it(tmp_path, auto: Settings, monkeypatch, capfd):
    asked = engines_that_say(monkeypatch, (-1.0, -2.0), (-1.0, -2.04))
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    assert choose_engine(output, auto(), rows) == "vllm"
    assert asked == ["_score_by_vllm", "_score_by_trainer"]
    said = "".join(capfd.readouterr())
    assert "vllm, for on 2 pairs" in said and "4.0e-02" in said
    # Later it is not measured again, whatever would be found now; with another tolerance it is.
    engines_that_say(monkeypatch, (-9.0, -9.0), (-1.0, -2.0))
    assert choose_engine(output, auto(), rows) == "vllm"
    assert choose_engine(output, auto(tolerance=0.01), rows) == "torch"
    assert choose_engine(output, auto(engine="vllm"), rows) == "vllm"


@pytest.mark.parametrize(
    ("vllm", "why"),
    [
        ((-1.0, -2.06), "differ by up to 6.0e-02"),
        ((-1.0, math.nan), "not finite"),
        (
            RayTaskError("score", "boom\nno such architecture", ValueError()),
            "cannot score this model: no such architecture",
        ),
    ],
)
def test_auto_takes_torch_where_vllm_does_not_agree_or_fails(tmp_path, auto: Settings, monkeypatch, capfd, vllm, why):
    engines_that_say(monkeypatch, vllm, (-1.0, -2.0))
    assert choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path)) == "torch"
    said = "".join(capfd.readouterr())
    assert "reference.engine=auto: torch, for " in said and why in said


def test_auto_does_not_remember_what_a_lost_node_did(tmp_path, auto: Settings, monkeypatch, capfd):
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    engines_that_say(monkeypatch, RayError("the node died"), (-1.0, -2.0))
    assert choose_engine(output, auto(), rows) == "torch"
    assert "reference.engine=auto: torch for this run" in "".join(capfd.readouterr())
    engines_that_say(monkeypatch, (-1.0, -2.0), (-1.0, -2.0))
    assert choose_engine(output, auto(), rows) == "vllm"


def test_auto_takes_torch_where_vllm_is_not_installed(tmp_path, auto: Settings, monkeypatch):
    asked = engines_that_say(monkeypatch, (-1.0, -2.0), (-1.0, -2.0))
    monkeypatch.setattr(engine_choice, "has_vllm", lambda: False)
    assert choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path)) == "torch"
    assert asked == []


def test_auto_does_not_hide_errors_of_its_own(tmp_path, auto: Settings, monkeypatch):
    engines_that_say(monkeypatch, ConfigError("the cluster is too small"), (-1.0, -2.0))
    with pytest.raises(ConfigError, match="too small"):
        choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path))
