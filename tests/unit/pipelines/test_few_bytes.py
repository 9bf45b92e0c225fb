"""Options by which a training takes less memory, before it: in the plan, the checks at the start, the reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.config.load import overridden
from dpo_ray.errors import ConfigError, ReferenceMismatch
from dpo_ray.model import libraries
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.calibrate import choose_engine
from dpo_ray.shards.score import identity
from dpo_ray.storage.location import Location
from dpo_ray.training.memory import Shape
from pipelines.doctor.asked import extras, modules
from pipelines.plan.memory import of_training
from pipelines.preflight import require_consistent
from pipelines.reference import require_same_model

GIB = 2**30
BILLION = Shape(10**9, 16, 2048, 8192, 32000, 16, outside=10**8, tied=False, linear=9 * 10**8, sides=10**6)
PAIRS: Any = SimpleNamespace(longest=256, tokens_once=2560.0, pairs=10.0)


def of(folder: Path, model: dict[str, Any] | None = None, **train: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "r", "output": "out"},
            "model": {"path": str(folder), **(model or {})},
            "data": {"train": "t.parquet"},
            "reference": {"engine": "torch"},
            "train": train,
        }
    )


def test_the_plan_tells_weights_gradients_and_moments_by_themselves(small_model: Path):
    plain = of_training(of(small_model), BILLION, PAIRS, None, None, 0)
    few = of_training(of(small_model, optimizer="adamw_8bit"), BILLION, PAIRS, None, None, 0)
    assert "weights 3.73 + gradients 3.73 + moments 7.45 + " in plain.parts
    assert "weights 3.73 + gradients 3.73 + moments 1.89 + " in few.parts
    assert plain.bytes - few.bytes == pytest.approx(10**9 * (8 - 2.03125), rel=1e-6)
    host = of_training(of(small_model, offload=True, strategy="fsdp", use_gpu=True), BILLION, PAIRS, None, None, 0)
    assert "(on the host weights 3.73 + gradients 3.73 + moments 7.45)" in host.parts
    assert plain.bytes - host.bytes > 13 * GIB
    quantized = of_training(
        of(small_model, {"lora": {"rank": 1, "quantization": "nf4"}}), BILLION, PAIRS, None, None, 0
    )
    assert "weights 0.85 + gradients 0.00 + moments 0.01 + " in quantized.parts


@pytest.mark.parametrize(
    ("has", "model", "train", "knob"),
    [
        (18 * GIB, {}, {"activation_checkpointing": True}, "-o train.optimizer=adamw_8bit"),
        (
            13 * GIB,
            {"dtype": "bfloat16"},
            {"activation_checkpointing": True, "global_batch_size": 1},
            "-o train.optimizer=adamw_8bit_bf16",
        ),
        (
            9 * GIB,
            {},
            {"activation_checkpointing": True, "use_gpu": True, "global_batch_size": 1},
            "-o train.strategy=fsdp -o train.offload=true",
        ),
        (
            2.3 * GIB,
            {"dtype": "bfloat16", "lora": {"rank": 1}},
            {"activation_checkpointing": True, "global_batch_size": 1},
            "-o model.lora.quantization=nf4",
        ),
    ],
)
def test_the_plan_names_what_makes_a_model_fit(
    has: float, model: dict[str, Any], train: dict[str, Any], knob: str, small_model: Path
):
    config = of(small_model, model, **train)
    found = of_training(config, BILLION, PAIRS, None, int(has), 0)
    assert found.lacking is not None and found.knob == knob
    changed = overridden(config.model_dump(mode="json"), knob.replace("-o ", "").split(), "test")
    assert of_training(changed, BILLION, PAIRS, None, int(has), 0).lacking is None


def test_what_is_not_installed_is_known_before_work_begins(small_model: Path, monkeypatch: pytest.MonkeyPatch):
    quantized = of(small_model, {"lora": {"quantization": "nf4"}})
    eight = of(small_model, optimizer="adamw_8bit")
    assert extras(eight) == ["memory"] and "torchao" in modules(eight) and "bitsandbytes" not in modules(eight)
    assert extras(quantized) == ["memory"] and modules(quantized)[-1] == "bitsandbytes"
    assert extras(of(small_model)) == []
    monkeypatch.setattr(libraries, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        require_consistent(quantized, "reference")
    with pytest.raises(ConfigError, match="needs torchao"):
        require_consistent(eight, "train")
    require_consistent(eight, "reference")
    require_consistent(of(small_model), "publish")


def test_the_reference_of_quantized_weights_is_scored_by_torch(small_model: Path, tmp_path: Path):
    config = of(small_model, {"lora": {"quantization": "nf4"}})
    auto = config.model_copy(update={"reference": config.reference.model_copy(update={"engine": "auto"})})
    nothing: Any = None
    for one in (config, auto):
        assert choose_engine(Location.of(tmp_path), one, nothing) == "torch"


def test_a_reference_of_other_weights_is_refused(small_model: Path):
    folder = ModelFolder(str(small_model))
    known = {"weights": folder.weights_hash(), "tokenizer": folder.tokenizer_hash(), "dtype": "float32"}

    def made(**more: Any) -> Any:
        found = identity(**known, engine="torch", engine_version="1", **more)
        return SimpleNamespace(manifest=SimpleNamespace(identity=found), location="there")

    assert "quantization" not in made().manifest.identity, "scores of before would be computed anew"
    quantized = of(small_model, {"lora": {"quantization": "nf4"}})
    require_same_model(made(), of(small_model))
    require_same_model(made(quantization="nf4"), quantized)
    for artifact, config in ((made(), quantized), (made(quantization="nf4"), of(small_model))):
        with pytest.raises(ReferenceMismatch, match="quantization"):
            require_same_model(artifact, config)
