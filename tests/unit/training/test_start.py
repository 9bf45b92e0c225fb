"""A sharded policy trains as one that is whole, however many workers hold it together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from benchmarks.attention import FAMILIES, saved
from dpo_ray.config import LoRA, Model, Sharding, Train
from dpo_ray.errors import ConfigError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training import start
from dpo_ray.training.parallel import Rank, accumulating, part_of
from dpo_ray.training.start import fetch, start_policy
from tests.training import VOCABULARY, Gang, Trained, add_tokenizer, random_pairs, run, scored
from tests.training import small_model as make_model

CPU = torch.device("cpu")
NEAR = 1e-6  # float32, sums in another order, over three steps of AdamW
ALWAYS: dict[str, Any] = {"tokens_per_microbatch": 20, "learning_rate": 1e-4}  # several micro-batches on each worker


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(small_model: Path) -> list[TokenizedPair]:
    return scored(random_pairs(24), small_model)


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(4, tmp_path_factory.mktemp("gang") / "store")
    yield gang
    gang.end()


@pytest.mark.parametrize("sharding", [{}, {"workers": 2}], ids=["4", "2x2"])
def test_embedding_and_head_may_be_two(gang: Gang, tmp_path: Path, sharding: dict[str, Any]):
    model = make_model(tmp_path / "model", tie_word_embeddings=False)
    pairs = scored(random_pairs(24), model)
    run(model, pairs, tmp_path / "one", **ALWAYS)
    gang.run(model, pairs, tmp_path / "four", strategy="fsdp", num_workers=4, sharding=sharding, **ALWAYS)
    one, four = Trained(tmp_path / "one"), Trained(tmp_path / "four")
    assert max(abs(a - b) for a, b in zip(one.losses, four.losses, strict=True)) < NEAR
    expected, found = trained_weights(one), trained_weights(four)
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < 1e-5


def trained_weights(done: Trained) -> dict[str, torch.Tensor]:
    [file] = done.model.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("lora", [None, LoRA(rank=3)], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "sharding",
    [{}, {"workers": 2}, {"workers": 2, "keep_gathered": True}],
    ids=["4", "2x2", "2x2 kept"],
)
def test_four_workers_make_what_one_makes(
    small_model: Path, pairs: list[TokenizedPair], gang: Gang, tmp_path: Path, sharding: dict[str, Any], lora: Any
):
    model = Model(path=str(small_model), lora=lora)
    run(model, pairs, tmp_path / "one", held_out=pairs[:4], eval_every_steps=1, **ALWAYS)
    options = {"strategy": "fsdp", "num_workers": 4, "sharding": sharding}
    gang.run(model, pairs, tmp_path / "four", held_out=pairs[:4], eval_every_steps=1, **ALWAYS, **options)
    one, four = Trained(tmp_path / "one"), Trained(tmp_path / "four")
    assert max(abs(a - b) for a, b in zip(one.losses, four.losses, strict=True)) < NEAR
    assert max(abs(a - b) for a, b in zip(one.of("eval_loss"), four.of("eval_loss"), strict=True)) < NEAR
    expected, found = trained_weights(one), trained_weights(four)
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < 1e-5  # a tenth of a step


def test_layers_that_carry_state_are_found_in_a_sharded_model(gang: Gang, tmp_path: Path):
    family = next(family for family in FAMILIES if family.name == "LFM2, convolutions")
    (tmp_path / "model").mkdir()
    model = saved(family, tmp_path / "model", vocab_size=VOCABULARY)
    add_tokenizer(model)
    pairs = scored(random_pairs(16), model)
    run(model, pairs, tmp_path / "one", **ALWAYS)
    gang.run(model, pairs, tmp_path / "four", strategy="fsdp", num_workers=4, **ALWAYS)
    one, four = Trained(tmp_path / "one"), Trained(tmp_path / "four")
    assert max(abs(a - b) for a, b in zip(one.losses, four.losses, strict=True)) < 1e-5
    options = Train(strategy="fsdp")
    scorer, _ = start_policy(
        ModelFolder.of(Model(path=str(model))), Model(path=str(model)), options, Rank(0, 1, torch.device("cpu")), seed=0
    )
    assert scorer.layout == family.layout


def test_what_one_mesh_has_saved_another_one_goes_on_with(
    small_model: Path, pairs: list[TokenizedPair], gang: Gang, tmp_path: Path
):
    run(small_model, pairs, tmp_path / "one", **ALWAYS)
    run(small_model, pairs, tmp_path / "begun", checkpoint_every_steps=1, **ALWAYS)
    gang.run(
        small_model, pairs, tmp_path / "on", resume=tmp_path / "begun" / "step-1", strategy="fsdp", num_workers=4,
        sharding={"workers": 2}, **ALWAYS,
    )  # fmt: skip
    one, on = Trained(tmp_path / "one"), Trained(tmp_path / "on")
    assert max(abs(a - b) for a, b in zip(one.losses, on.losses, strict=True)) < NEAR


@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "fsdp", "sharding": {"keep_gathered": True}}],
    ids=["ddp", "fsdp kept"],
)
def test_what_was_gathered_for_an_evaluation_is_not_trained_with(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, options: dict[str, Any]
):
    # Averages are put in the weights' place for an evaluation, and taken out again.
    model = Model(path=str(small_model), dtype="bfloat16")
    always = {"ema_decay": 0.9, "learning_rate": 1e-2, "reference_tolerance": None, **options}
    run(model, pairs, tmp_path / "alone", **always)
    run(model, pairs, tmp_path / "evaluated", held_out=pairs[:4], eval_every_steps=1, **always)
    assert Trained(tmp_path / "evaluated").losses == Trained(tmp_path / "alone").losses


def test_gradients_of_each_micro_batch_go_where_they_belong_at_once(small_model: Path, pairs: list[TokenizedPair]):
    model, options, me = Model(path=str(small_model)), Train(strategy="fsdp"), Rank(0, 1, torch.device("cpu"))
    scorer, forward = start_policy(ModelFolder.of(model), model, options, me, seed=0)
    scorer.adds_gradients_up_at_once = True  # as with more than one worker
    with accumulating(forward, last=False):
        forward(scorer.collate(pairs[:1])).logprobs.sum().backward()
    for parameter in scorer.parameters():
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)


def test_workers_of_a_group_come_one_after_the_other():
    device = torch.device("cpu")
    assert [part_of(Rank(n, 6, device), Sharding(workers=3)).number for n in range(6)] == [0, 1, 2, 0, 1, 2]
    assert part_of(Rank(4, 6, device), Sharding()).of == 6


@pytest.mark.parametrize("rank", [0, 1])
def test_files_that_one_rank_cannot_have_end_all_of_them(rank: int, monkeypatch: pytest.MonkeyPatch, small_model: Path):
    told: list[str] = []

    def gathered(mine: str, me: Rank) -> list[str]:
        told.append(mine)
        return [mine, "model.path is not there"] if me.rank == 0 else ["", mine]

    monkeypatch.setattr(start, "gathered_objects", gathered)
    folder = ModelFolder(str(small_model if rank == 0 else small_model / "nothing"))
    with pytest.raises(ConfigError) as caught:
        fetch(folder, Rank(rank, 2, CPU))
    assert told == ["" if rank == 0 else str(caught.value)]
    assert str(caught.value).startswith(
        "A worker cannot have the model's files, and others wait for it: model.path is"
    ) is (rank == 0)


def test_alone_a_rank_has_its_files_or_says_why(small_model: Path):
    fetch(ModelFolder(str(small_model)), Rank(0, 1, CPU))
    with pytest.raises(ConfigError, match="nothing"):
        fetch(ModelFolder(str(small_model / "nothing")), Rank(0, 1, CPU))
