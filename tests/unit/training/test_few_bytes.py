"""Trainings in fewer bytes: each is the training that it stands for, learns as that does, and takes what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.memory_tier import held_bytes
from dpo_ray.config import LoRA, Model, Train
from dpo_ray.errors import ConfigError
from dpo_ray.model.pair_scorer import TorchScorer
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training import start
from dpo_ray.training.batch import Share
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.memory import shape_of, state_of
from dpo_ray.training.optim import make_optimizer
from dpo_ray.training.parallel import Rank
from dpo_ray.training.start import start_policy
from dpo_ray.training.step import Learner
from tests.training import Gang, Trained, random_pairs, run, small_model, with_reference

CPU = torch.device("cpu")
ME = Rank(0, 1, CPU)
BATCH, STEPS = 8, 4
ON_GPU = {"use_gpu": True, "strategy": "fsdp"}
"""What is for GPUs is tried here on the CPU, where torch does the same, and nothing is moved."""

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
]

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw_8bit": ({}, {"optimizer": "adamw_8bit"}),
    "adamw_bf16": ({"dtype": "bfloat16"}, {"optimizer": "adamw_bf16"}),
    "adamw_8bit_bf16": ({"dtype": "bfloat16"}, {"optimizer": "adamw_8bit_bf16"}),
    "adapters on bfloat16": ({"dtype": "bfloat16", "lora": {"rank": 4}}, {}),
    "nf4": ({"lora": {"rank": 4, "quantization": "nf4"}}, {}),
    "int8 in bfloat16, 8-bit moments": (
        {"dtype": "bfloat16", "lora": {"rank": 4, "quantization": "int8"}},
        {"optimizer": "adamw_8bit"},
    ),
}
"""What is changed of `model` and of `train`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that moments of its weights have blocks, on two workers too."""
    return small_model(tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=256, num_hidden_layers=4)


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    made = Gang(2, tmp_path_factory.mktemp("gang") / "store")
    yield made
    made.end()


def of(folder: Path, **more: Any) -> Model:
    return Model.model_validate({"path": str(folder), **more})


def scored(model: Model, count: int = BATCH * STEPS) -> list[TokenizedPair]:
    """As the reference stage scores them, with the trainer's own forward."""
    return with_reference(random_pairs(count), TorchScorer(model))


def exported(folder: Path, model: Model) -> dict[str, Tensor]:
    alone = model.lora is not None and model.lora.export == "adapter"
    return load_file(folder / "model" / ("adapter_model.safetensors" if alone else "model.safetensors"))


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", WAYS)
def test_it_starts_as_the_reference_and_resumes_to_the_same_bytes(
    way: str, strategy: str, folder: Path, tmp_path: Path
):
    of_model, of_train = WAYS[way]
    model = of(folder, **of_model)
    pairs = scored(model)
    options: dict[str, Any] = {**of_train, "strategy": strategy, "checkpoint_every_steps": 2}
    run(model, pairs, tmp_path / "whole", **options)  # the first step is refused where policy and reference differ
    whole = Trained(tmp_path / "whole")
    assert whole.losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert len(set(whole.losses)) == STEPS
    torch.manual_seed(1)
    run(model, pairs, tmp_path / "resumed", resume=tmp_path / "whole" / "step-2", **options)
    assert Trained(tmp_path / "resumed").losses == whole.losses
    assert same(exported(tmp_path / "resumed", model), exported(tmp_path / "whole", model))


@pytest.mark.parametrize("way", ["adamw_8bit", "adamw_bf16", "adapters on bfloat16", "nf4"])
def test_workers_learn_what_one_does_and_resume(way: str, folder: Path, tmp_path: Path, gang: Gang):
    of_model, of_train = WAYS[way]
    model = of(folder, **of_model)
    pairs = scored(model)
    run(model, pairs, tmp_path / "alone", **of_train)
    alone = Trained(tmp_path / "alone")
    for strategy in ("ddp", "fsdp"):
        options: dict[str, Any] = {**of_train, "strategy": strategy, "checkpoint_every_steps": 2}
        gang.run(model, pairs, tmp_path / strategy, **options)
        together = Trained(tmp_path / strategy)
        # A few steps of 1e-3; in bfloat16 a log-prob of a completion is rounded by some hundredths of a nat.
        assert together.losses == pytest.approx(alone.losses, abs=1e-3)
        gang.run(model, pairs, tmp_path / f"{strategy}, on", resume=tmp_path / strategy / "step-2", **options)
        assert Trained(tmp_path / f"{strategy}, on").losses == together.losses
        assert same(exported(tmp_path / f"{strategy}, on", model), exported(tmp_path / strategy, model))


def learned(folder: Path, place: Path, **options: Any) -> tuple[float, float]:
    """Mean loss of the first and of the last pass over the same few pairs."""
    model = of(folder, **options.pop("model", {}))
    pairs = scored(model, BATCH) * 16
    run(model, pairs, place, schedule="constant", warmup_fraction=0.0, **{"learning_rate": 2e-4, **options})
    losses = Trained(place).losses
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw_8bit", "float32"), ("adamw_bf16", "bfloat16"), ("adamw_8bit_bf16", "bfloat16")],
)
def test_moments_in_fewer_bytes_learn_about_what_float32_does(optimizer: str, dtype: str, folder: Path, tmp_path: Path):
    first, last = learned(folder, tmp_path / "float32", model={"dtype": dtype})
    begun, ended = learned(folder, tmp_path / "few", model={"dtype": dtype}, optimizer=optimizer)
    assert begun == first
    assert first - last > 0.2, "nothing was learned"
    assert begun - ended == pytest.approx(first - last, rel=0.2)


def test_a_base_in_bfloat16_trains_as_one_in_float32_that_is_computed_in_bfloat16(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = of(folder, dtype="bfloat16", lora={"rank": 4})
    pairs = scored(model)
    for strategy in ("ddp", "fsdp"):
        run(model, pairs, tmp_path / f"{strategy}-few", strategy=strategy)
        with monkeypatch.context() as patched:
            patched.setattr(start, "held_dtype", lambda *_: torch.float32)
            run(model, pairs, tmp_path / f"{strategy}-float32", strategy=strategy)
        found, expected = (Trained(tmp_path / f"{strategy}-{name}") for name in ("few", "float32"))
        assert found.losses == expected.losses
        assert same(exported(found.folder, model), exported(expected.folder, model))


@pytest.mark.parametrize(
    "more",
    [
        {"activation_checkpointing": 2},
        {"activation_checkpointing": 3, "activation_offload": True, "use_gpu": True},
        {"activation_checkpointing": True, "activation_offload": True, "use_gpu": True},
        {**ON_GPU, "offload": True},
        {**ON_GPU, "offload": True, "optimizer": "adamw_8bit"},
        {**ON_GPU, "offload": True, "activation_checkpointing": 2, "activation_offload": True},
    ],
    ids=str,
)
def test_where_and_when_things_are_computed_changes_nothing(more: dict[str, Any], folder: Path, tmp_path: Path):
    model, pairs = of(folder), scored(of(folder))
    plain = {name: more[name] for name in ("strategy", "optimizer") if name in more}
    run(model, pairs, tmp_path / "plain", **plain)
    run(model, pairs, tmp_path / "other", checkpoint_every_steps=2, **more)
    assert Trained(tmp_path / "other").losses == Trained(tmp_path / "plain").losses
    assert same(exported(tmp_path / "other", model), exported(tmp_path / "plain", model))
    run(model, pairs, tmp_path / "on", resume=tmp_path / "other" / "step-2", **more)
    assert same(exported(tmp_path / "on", model), exported(tmp_path / "plain", model))


def test_offloaded_workers_learn_what_others_do(folder: Path, tmp_path: Path, gang: Gang):
    model = of(folder, lora={"rank": 4, "quantization": "nf4", "export": "merged"})
    pairs = scored(model)
    gang.run(model, pairs, tmp_path / "plain", strategy="fsdp")
    gang.run(model, pairs, tmp_path / "host", **ON_GPU, offload=True)
    assert Trained(tmp_path / "host").losses == Trained(tmp_path / "plain").losses
    assert same(exported(tmp_path / "host", model), exported(tmp_path / "plain", model))


def test_layers_are_recomputed_by_choice(folder: Path):
    scorer, _ = start_policy(ModelFolder(str(folder)), of(folder), Train(activation_checkpointing=3), ME, seed=0)
    layers = scorer.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, False, True]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merged_the_adapter_is_added_to_what_was_trained_with(quantization: str, folder: Path, tmp_path: Path):
    model = of(folder, lora={"rank": 4, "quantization": quantization, "export": "merged"})
    held_out = scored(model, 5)
    run(model, scored(model), tmp_path / "out", held_out=held_out, eval_every_steps=STEPS)
    margin = Trained(tmp_path / "out").metrics[-1]["eval_rewards/margins"]
    merged = of(tmp_path / "out" / "model")  # an ordinary folder
    chosen, rejected = TorchScorer(merged).score(held_out)
    found = [
        sum(a) - sum(p.chosen_ref_logprobs or ()) - sum(b) + sum(p.rejected_ref_logprobs or ())
        for p, a, b in zip(held_out, chosen, rejected, strict=True)
    ]
    assert abs(margin) > 1e-3
    assert 0.1 * sum(found) / len(found) == pytest.approx(margin, abs=1e-4)


def test_an_average_of_weights_goes_with_8_bit_moments(folder: Path, tmp_path: Path):
    model, pairs = of(folder), scored(of(folder))
    options: dict[str, Any] = {"optimizer": "adamw_8bit", "checkpoint_every_steps": 2}
    run(model, pairs, tmp_path / "plain", **options)
    run(model, pairs, tmp_path / "whole", ema_decay=0.5, **options)
    run(model, pairs, tmp_path / "on", ema_decay=0.5, resume=tmp_path / "whole" / "step-2", **options)
    assert same(exported(tmp_path / "on", model), exported(tmp_path / "whole", model))
    assert not same(exported(tmp_path / "plain", model), exported(tmp_path / "whole", model))


def test_moments_of_8_bits_that_cannot_be_divided_anew_are_refused(tmp_path: Path, gang: Gang):
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 3, "num_key_value_heads": 3}
    folder = small_model(tmp_path / "odd", **sizes)
    pairs = scored(of(folder))
    options: dict[str, Any] = {"optimizer": "adamw_8bit", "checkpoint_every_steps": 2, "strategy": "fsdp"}
    run(of(folder), pairs, tmp_path / "one", **options)
    with pytest.raises(ConfigError, match=r"moments of 8 bits in blocks that cannot be divided .* as many workers"):
        gang.run(of(folder), pairs, tmp_path / "two", resume=tmp_path / "one" / "step-2", **options)


def stepped(seed: int, drawn_before: int) -> tuple[Tensor, Tensor]:
    """A weight in bfloat16 after 64 steps, and what is drawn next."""
    torch.manual_seed(drawn_before)
    model = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = make_optimizer(model, Train(optimizer="adamw_bf16", learning_rate=1e-4), seed=seed)
    for _ in range(64):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    return model.weight.detach(), torch.rand(1)


def test_weights_in_bfloat16_are_rounded_at_random_and_alike_where_they_are_alike():
    found, after = stepped(seed=3, drawn_before=0)
    # A step of 1e-4 is a fortieth of what bfloat16 tells apart below 1: to the nearest, none would have been taken.
    assert float(found.float().mean()) == pytest.approx(1 - 64e-4, abs=2e-4)
    assert len(found.unique()) > 2
    other, later = stepped(seed=3, drawn_before=1)
    assert torch.equal(found, other), "two replicas that have drawn differently would part"
    assert not torch.equal(found, stepped(seed=4, drawn_before=0)[0])
    torch.manual_seed(0)
    nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    assert torch.equal(after, torch.rand(1)) and not torch.equal(after, later)


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit_bf16"])
@pytest.mark.parametrize("size", [8, 256])  # of few values no moment is in 8 bits
def test_the_second_moment_falls_when_gradients_do(optimizer: Any, size: int):
    model = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    made = make_optimizer(model, Train(optimizer=optimizer, learning_rate=1e-6))
    for step in range(400):
        model.weight.grad = torch.full_like(model.weight, 1.0 if step < 20 else 1e-3)
        made.step()
    moment = made.state[model.weight]["exp_avg_sq"]
    moment = moment.dequantize() if hasattr(moment, "dequantize") else moment
    expected = (1 - 0.999**20) * 0.999**380
    assert float(moment.float().mean()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["adamw", *WAYS])
def test_what_is_counted_is_what_is_held(way: str, strategy: str, tmp_path: Path):
    of_model, of_train = WAYS.get(way, ({}, {}))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    folder = small_model(tmp_path / "model", **sizes)
    model = of(folder, **of_model)
    options = Train.model_validate({**of_train, "strategy": strategy, "global_batch_size": 2})
    scorer, forward = start_policy(ModelFolder.of(model), model, options, ME, seed=0)
    optimizer = make_optimizer(scorer.model, options)
    learner = Learner(forward, scorer, optimizer, None, options, ME, TrainState())
    gradients: list[Tensor] = []
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad for p in trained if p.grad is not None))
    pairs = scored(model, 2)
    learner.step(Share([[pair] for pair in pairs], pairs[0]), 1e-4, None)
    counted = state_of(shape_of(ModelFolder.of(model)), model, options, 1)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    for name, held in (("weights", list(scorer.parameters())), ("gradients", gradients), ("moments", moments)):
        assert getattr(counted, name) == pytest.approx(held_bytes(held), rel=0.1), name
    if strategy == "fsdp" and dist.is_initialized():
        dist.destroy_process_group()


def test_adapters_are_counted(folder: Path):
    shape = shape_of(ModelFolder(str(folder)))
    # q and o, k and v, gate, up and down of a layer.
    assert shape.linear == 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert shape.sides == 4 * (2 * 256 + 2 * 192 + 3 * 384)
    held = state_of(shape, of(folder, lora={"rank": 8}), Train(), 1)
    assert held.gradients == 4 * 8 * shape.sides and held.moments == 8 * 8 * shape.sides
    assert held.weights == 4 * (shape.parameters + 8 * shape.sides)
    assert LoRA(rank=8).identity() == {"rank": 8, "alpha": 32.0, "target_modules": "all-linear", "export": "adapter"}
