"""Options by which a training takes less memory: what they are known by, and which combinations are refused."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import LoRA, Train, backend, parse_config
from tests.unit.config.test_tree import message, tree

BFLOAT16 = {"path": "m", "dtype": "bfloat16"}
QUANTIZED = {"path": "m", "lora": {"quantization": "nf4"}}


def sections(train: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return tree(**({"train": train} if train is not None else {}), **more)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (sections({"offload": True, "use_gpu": True}), ["train.offload is true", "strategy is ddp", "strategy=fsdp"]),
        (sections({"offload": True, "strategy": "fsdp"}), ["train.offload is true", "use_gpu is false", "Leave"]),
        (
            sections({"activation_offload": True, "activation_checkpointing": True}),
            ["train.activation_offload is true", "use_gpu is false", "Leave"],
        ),
        (
            sections({"activation_offload": True, "use_gpu": True}),
            ["train.activation_offload is true", "activation_checkpointing is false", "activation_checkpointing=true"],
        ),
        (sections({"activation_checkpointing": -2}), ["activation_checkpointing"]),
        (
            sections({"optimizer": "adamw_bf16", "ema_decay": 0.9}, model=BFLOAT16),
            ["train.optimizer is adamw_bf16", "ema_decay=0.9", "adamw_8bit"],
        ),
        (
            sections({"optimizer": "adamw_8bit", "strategy": "fsdp", "num_workers": 4, "min_workers": 2}),
            ["train.optimizer is adamw_8bit", "min_workers=2", "strategy=ddp"],
        ),
        (sections({"optimizer": "adamw_bf16"}), ["train.optimizer=adamw_bf16", "dtype=float32", "dtype=bfloat16"]),
        (
            sections({"optimizer": "adamw_8bit_bf16"}, model={**BFLOAT16, "lora": {}}),
            ["train.optimizer=adamw_8bit_bf16", "model.lora", "adamw_8bit"],
        ),
        (
            sections(model=QUANTIZED),
            ["model.lora.quantization=nf4", "reference.engine=vllm", "reference.engine=torch"],
        ),
        (sections(model={"path": "m", "quantization": "nf4"}), ["quantization"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_with_value_limit_and_way_out(broken: dict[str, Any], said: list[str]):
    told = message(broken)
    assert all(part in told for part in said), told


@pytest.mark.parametrize(
    "good",
    [
        sections({"offload": True, "use_gpu": True, "strategy": "fsdp", "optimizer": "adamw_8bit"}),
        sections({"activation_checkpointing": 3, "activation_offload": True, "use_gpu": True}),
        sections({"optimizer": "adamw_8bit", "ema_decay": 0.9, "num_workers": 2, "min_workers": 1}),
        sections({"optimizer": "adamw_8bit_bf16"}, model=BFLOAT16),
        sections(model=QUANTIZED, reference={"engine": "torch"}),
        sections(model=QUANTIZED, reference={"engine": "auto"}),
        sections({"loss": {"type": "orpo"}}, model=QUANTIZED),
    ],
)
def test_what_can_work_loads(good: dict[str, Any]):
    assert parse_config(good)


def test_what_changes_a_result_is_in_what_it_is_known_by_and_nothing_else():
    plain = Train().identity()
    assert "optimizer" not in plain, "trainings of before would be trained anew"
    assert Train(optimizer="adamw_8bit").identity() == {**plain, "optimizer": "adamw_8bit"}
    assert Train(activation_checkpointing=2, use_gpu=True, activation_offload=True).identity() == plain
    assert Train(offload=True, use_gpu=True, strategy="fsdp").identity() == plain
    assert Train.changes_result("optimizer") and not Train.changes_result("offload")
    assert "quantization" not in LoRA().identity()
    assert LoRA(quantization="nf4").identity() == {**LoRA().identity(), "quantization": "nf4"}


def test_every_nth_layer_is_a_number_and_true_is_all_of_them():
    assert [Train(activation_checkpointing=value).recomputes_every for value in (False, True, 1, 2)] == [0, 1, 1, 2]


def test_what_lies_on_the_host_is_not_sent_by_nccl():
    assert backend(on_gpu=False, offload=False) == "gloo"
    assert backend(on_gpu=True, offload=False) == "nccl"
    assert backend(on_gpu=True, offload=True) == "cpu:gloo,cuda:nccl"
