"""A checkpoint restores everything that the next step depends on, bit for bit."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from dpo_ray.config import Train
from dpo_ray.errors import DamagedCheckpoint
from dpo_ray.storage.location import Location
from dpo_ray.training.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from dpo_ray.training.checkpoint_reader import Reader
from dpo_ray.training.files import HISTORY, STATE, is_whole, read_history
from dpo_ray.training.optim import WeightAverage, make_optimizer
from dpo_ray.training.parallel import Rank
from tests.object_store import BUCKET, ObjectStore, object_store

ME = Rank(0, 1, torch.device("cpu"))
METRICS: list[dict[str, Any]] = [{"step": 1, "loss": 0.6931471805599453}, {"step": 2, "loss": 1e-300}]


class Tied(nn.Module):
    """Two names for one weight, as in models whose head is their embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def trained(steps: int, seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = make_optimizer(model, Train(learning_rate=0.1, weight_decay=0.1))
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: Tied, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on random inputs: what they do depends on parameters, optimizer state and random state."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(5, (4,))).square().sum().backward()
        optimizer.step()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {"average": None, "state": TrainState(next_step=2, history=METRICS), **more}
    save_checkpoint(folder, policy=model, optimizer=optimizer, me=ME, **values)


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> TrainState:
    return load_checkpoint(Location.of(folder), policy=model, optimizer=optimizer, average=average, me=ME)


def test_where_the_loop_was_comes_back_exactly(tmp_path: Path):
    state = TrainState(next_step=2, history=METRICS, reward_sum=0.1 + 0.2, reward_count=24.0, finished=True)
    save(tmp_path, *trained(2), state=state)
    assert load(tmp_path, *trained(0, seed=1)) == state
    assert read_history(Location.of(tmp_path)) == METRICS


def test_parameters_and_optimizer_come_back_bit_for_bit(tmp_path: Path):
    before, optimizer_before = trained(3)
    save(tmp_path, before, optimizer_before)
    after, optimizer_after = trained(1, seed=1)
    assert not torch.equal(after.embed.weight, before.embed.weight)
    load(tmp_path, after, optimizer_after)
    for mine, restored in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(mine, restored)
        assert optimizer_before.state[mine].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in optimizer_before.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer_after.state[restored][name])), name
    assert after.head.weight is after.embed.weight


def test_saving_changes_nothing_even_before_the_first_step(tmp_path: Path):
    # torch fills in an optimizer's state by a step of its own where there is none yet.
    model, optimizer = trained(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save(tmp_path, model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected, its_optimizer = trained(0)
    torch.manual_seed(5)
    advance(expected, its_optimizer, 1)
    torch.manual_seed(5)
    advance(model, optimizer, 1)
    assert torch.equal(model.embed.weight, expected.embed.weight)


def test_the_weight_average_comes_back_apart_from_the_weights(tmp_path: Path):
    model, optimizer = trained(1)
    average = WeightAverage(model, 0.5)
    advance(model, optimizer, 1)
    average.update()
    save(tmp_path, model, optimizer, average=average)
    resumed, its_optimizer = trained(0, seed=9)
    its_average = WeightAverage(resumed, 0.5)
    load(tmp_path, resumed, its_optimizer, its_average)
    assert average.named_values().keys() == {"embed.weight", "norm.weight", "norm.bias"}
    for name, value in average.named_values().items():
        assert torch.equal(its_average.named_values()[name], value)
    assert torch.equal(resumed.norm.weight, model.norm.weight)
    assert not torch.equal(resumed.norm.weight, its_average.named_values()["norm.weight"])


def test_only_the_weights_of_a_checkpoint_can_be_taken(tmp_path: Path):
    best, its_optimizer = trained(1)
    its_average = WeightAverage(best, 0.5)
    save(tmp_path, best, its_optimizer, average=its_average)
    model, optimizer = trained(3, seed=1)
    average = WeightAverage(model, 0.5)
    moments = optimizer.state[model.norm.weight]["exp_avg"].clone()
    torch.manual_seed(4)
    load_weights(Location.of(tmp_path), policy=model, average=average)
    drawn = torch.rand(1)
    assert torch.equal(model.embed.weight, best.embed.weight)
    assert torch.equal(average.named_values()["norm.weight"], its_average.named_values()["norm.weight"])
    assert torch.equal(optimizer.state[model.norm.weight]["exp_avg"], moments)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(1), drawn)


def test_frozen_parameters_are_neither_written_nor_read(tmp_path: Path):
    model, _ = trained(0)
    model.embed.weight.requires_grad_(False)
    optimizer = make_optimizer(model, Train(learning_rate=0.1))
    advance(model, optimizer, 1)
    save(tmp_path, model, optimizer)
    assert set(FileSystemReader(tmp_path).read_metadata().state_dict_metadata) >= {"model.norm.weight"}
    assert not [n for n in FileSystemReader(tmp_path).read_metadata().state_dict_metadata if "embed" in n]
    other, _ = trained(0, seed=3)
    other.embed.weight.requires_grad_(False)
    frozen = other.embed.weight.clone()
    load(tmp_path, other, make_optimizer(other, Train(learning_rate=0.1)))
    assert torch.equal(other.embed.weight, frozen)
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_going_on_from_a_checkpoint_is_going_on_without_stopping(tmp_path: Path):
    model, optimizer = trained(2)
    save(tmp_path, model, optimizer)
    advance(model, optimizer, 3)
    resumed, its_optimizer = trained(0, seed=9)
    load(tmp_path, resumed, its_optimizer)
    advance(resumed, its_optimizer, 3)
    assert torch.equal(resumed.embed.weight, model.embed.weight)
    assert torch.equal(resumed.norm.weight, model.norm.weight)


def draws() -> list[Any]:
    # A normal draw first: it leaves a second one behind, which is part of the state as well.
    return [
        torch.rand(3).tolist(),
        np.random.standard_normal(),
        np.random.random(3).tolist(),
        random.gauss(0, 1),
        [random.random() for _ in range(3)],
    ]


def test_every_random_state_comes_back(tmp_path: Path):
    model, optimizer = trained(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    save(tmp_path, model, optimizer)
    expected = draws()
    assert draws() != expected
    load(tmp_path, model, optimizer)
    assert draws() == expected


class Payload:
    """Pickled, it is a call."""

    def __reduce__(self) -> Any:
        return (print, ("run on load",))


def test_a_rank_that_the_run_did_not_have_keeps_its_own_random_state(tmp_path: Path):
    model, optimizer = trained(1)
    save(tmp_path, model, optimizer)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    load_checkpoint(
        Location.of(tmp_path), policy=model, optimizer=optimizer, average=None, me=Rank(1, 2, torch.device("cpu"))
    )  # fmt: skip
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("file", ["random-0.pt", ".metadata", "a value"])
def test_a_checkpoint_holds_no_code_that_loading_would_run(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
):
    model, optimizer = trained(1)
    if file == "a value":
        optimizer.param_groups[0]["betas"] = Payload()
        save(tmp_path, model, optimizer)
        model, optimizer = trained(1)
    else:
        save(tmp_path, model, optimizer)
        if file == ".metadata":
            (tmp_path / file).write_bytes(pickle.dumps(Payload()))
        else:
            torch.save({"torch": Payload()}, tmp_path / file)
    # torch wraps what goes wrong while it reads a checkpoint.
    with pytest.raises((pickle.UnpicklingError, CheckpointException), match=r"(?s)Unpickl|print"):
        load(tmp_path, model, optimizer)
    assert "run on load" not in capsys.readouterr().out


def test_a_checkpoint_is_whole_until_a_file_is_cut_short_or_missing(tmp_path: Path):
    save(tmp_path, *trained(1))
    files = sorted(tmp_path.iterdir())
    assert {f.name for f in files} == {".metadata", "__0_0.distcp", "random-0.pt", HISTORY, STATE}
    assert is_whole(Location.of(tmp_path))
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert not is_whole(Location.of(tmp_path)), f"{file.name} is cut short"
        file.unlink()
        assert not is_whole(Location.of(tmp_path)), f"{file.name} is missing"
        file.write_bytes(content)
        assert is_whole(Location.of(tmp_path))


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def test_in_an_object_store_it_is_read_where_it_lies(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, optimizer = trained(2)
    save(tmp_path / "written", model, optimizer)
    place = Location.of(f"s3://{BUCKET}/checkpoint")
    for file in (tmp_path / "written").iterdir():  # its index begins with a dot
        Location.of(file).copy_to(place / file.name)
    advance(model, optimizer, 3)
    read: list[int] = []
    slice_file = Reader._slice_file

    def counted(reader: Reader, file: Any, part: Any) -> Any:
        read.append(part.length)
        return slice_file(reader, file, part)

    monkeypatch.setattr(Reader, "_slice_file", counted)
    monkeypatch.setattr(Location, "_download", lambda *_: pytest.fail("it is downloaded"))
    resumed, its_optimizer = trained(0, seed=9)
    state = load_checkpoint(place, policy=resumed, optimizer=its_optimizer, average=None, me=ME)
    assert state == TrainState(next_step=2, history=METRICS)
    advance(resumed, its_optimizer, 3)
    assert torch.equal(resumed.embed.weight, model.embed.weight)
    assert torch.equal(resumed.norm.weight, model.norm.weight)
    everything = sum(read)
    read.clear()
    load_weights(place, policy=resumed, average=None)
    assert 0 < sum(read) < everything / 2  # AdamW keeps two numbers more for each weight


def test_a_file_that_is_cut_short_is_named(tmp_path: Path):
    save(tmp_path, *trained(1))
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp ends before"):
        load(tmp_path, *trained(1))


def test_a_damaged_one_that_only_weights_are_taken_of_is_named_too(tmp_path: Path):
    save(tmp_path, *trained(1))
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:200])
    model, _ = trained(0)
    with pytest.raises(DamagedCheckpoint) as caught:
        load_weights(Location.of(tmp_path), policy=model, average=None)
    assert caught.value.folder == str(tmp_path)
    assert pickle.loads(pickle.dumps(caught.value)).folder == str(tmp_path)  # as it comes back from its worker


def test_no_changed_byte_of_a_tensor_goes_unnoticed(tmp_path: Path):
    save(tmp_path, *trained(1))
    file = tmp_path / "__0_0.distcp"
    content = file.read_bytes()
    expected, _ = trained(1)
    damaged = 0
    for place in range(len(content) // 48, len(content), len(content) // 24):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        model, optimizer = trained(0, seed=1)
        try:
            load(tmp_path, model, optimizer)
        except DamagedCheckpoint as error:
            assert str(tmp_path) in str(error)
            damaged += 1
            continue
        # It was one of those that fill the space between what is kept.
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert damaged > 4


@pytest.mark.parametrize("content", [b"", b"\x80\x04X\xff"])
def test_a_damaged_index_is_told(tmp_path: Path, content: bytes):
    save(tmp_path, *trained(1))
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is damaged"):
        load(tmp_path, *trained(1))


def test_an_empty_folder_is_no_whole_checkpoint(tmp_path: Path):
    assert not is_whole(Location.of(tmp_path))
    assert not is_whole(Location.of(tmp_path / "missing"))
