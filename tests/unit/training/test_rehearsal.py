"""Whether the longest pair fits is found out before the first step, and changes nothing that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import DistStoreError

from benchmarks.attention import FAMILIES, saved
from dpo_ray.config import Model, Train
from dpo_ray.errors import DataError, PairTooLong
from dpo_ray.model.attention import is_stepwise, window_of
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training import rehearsal
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.longest import LongestPair
from dpo_ray.training.memory import pair_bytes, room_beside_state, shape_of
from dpo_ray.training.optim import make_optimizer
from dpo_ray.training.parallel import Rank
from dpo_ray.training.rehearsal import estimate, try_out
from dpo_ray.training.step import Learner
from tests.training import Gang, Trained, longest_of, memory_ends, random_pairs, run, scored

PAIRS, BATCH = 16, 8
GIB = 2**30


@pytest.fixture(scope="module")
def pairs(small_model: Path) -> list[TokenizedPair]:
    return scored(random_pairs(PAIRS), small_model)


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    made = Gang(2, tmp_path_factory.mktemp("gang") / "store")
    yield made
    made.end()


def learner(folder: Path, **train: Any) -> Learner:
    options = Train.model_validate(train)
    policy = load_policy(folder)
    scorer = CompletionScorer(policy).train()
    me = Rank(0, 1, torch.device("cpu"))
    return Learner(scorer, scorer, make_optimizer(policy, options), None, options, me, TrainState())


def pair_of(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    return TokenizedPair("a1b2", [3] * prompt, [4] * chosen, [5] * rejected)


def require_alike(one: Trained, other: Trained) -> None:
    assert all(torch.equal(one.weights[name], weight) for name, weight in other.weights.items())
    assert one.losses == other.losses and len(one.losses) == PAIRS // BATCH
    assert one.of("grad_norm") == other.of("grad_norm")


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "aot"])
def test_trying_it_changes_nothing_bit_for_bit(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, loss: str
):
    for tries in (False, True):
        run(small_model, pairs, tmp_path / str(tries), loss={"type": loss}, tries_longest=tries)
    require_alike(Trained(tmp_path / "True"), Trained(tmp_path / "False"))


@pytest.mark.parametrize(("strategy", "dtype"), [("ddp", "float32"), ("ddp", "bfloat16"), ("fsdp", "float32")])
def test_nor_with_two_workers(
    gang: Gang, small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, strategy: str, dtype: str
):
    for tries in (False, True):
        model = Model(path=str(small_model), dtype=dtype)
        gang.run(model, pairs, tmp_path / str(tries), strategy=strategy, tries_longest=tries, reference_tolerance=None)
    require_alike(Trained(tmp_path / "True"), Trained(tmp_path / "False"))


def test_the_random_state_and_the_gradients_are_as_before(small_model: Path, pairs: list[TokenizedPair]):
    made = learner(small_model)
    noise = torch.nn.Dropout(0.5)
    made.scorer.model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: noise(output))
    before = torch.get_rng_state()
    made.rehearse(pairs[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in made.scorer.parameters())
    assert not made.optimizer.state


@pytest.mark.parametrize("packed", [True, False])
def test_which_pair_is_the_longest_depends_on_the_layout(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, packed: bool
):
    long_prompt, long_answers = pair_of(40, 5, 5), pair_of(2, 30, 28)
    tried = []
    with mock.patch.object(Learner, "rehearse", lambda _, pair: tried.append(pair)):
        run(
            small_model,
            [*pairs, long_prompt, long_answers],
            tmp_path,
            loss={"type": "simpo"},
            packed=packed,
            tries_longest=True,
        )
    assert tried == [long_answers if packed else long_prompt]


@pytest.mark.parametrize("workers", [1, 2])
def test_where_memory_ends_it_is_told_by_name_before_the_first_step(
    gang: Gang, small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, workers: int
):
    start = run if workers == 1 else gang.run
    with pytest.raises(PairTooLong) as caught:
        start(small_model, pairs, tmp_path, tries_longest=True, memory_ends_on_rank=workers - 1)
    told = str(caught.value)
    place = max(range(PAIRS), key=lambda n: pairs[n].num_tokens)
    found = pairs[place]
    assert f"{found.pair_id} (row {place} of memory), of {found.num_tokens} tokens" in told
    assert f"({len(found.prompt_ids)} of the prompt, {len(found.chosen_ids)} chosen" in told
    assert f"rank {workers - 1}: CUDA out of memory. Tried to allocate 2.00 GiB" in told
    assert all(way in told for way in ("data.max_completion_tokens", "fsdp", "activation_checkpointing", "model.lora"))
    assert list(tmp_path.iterdir()) == []


def test_where_others_never_come_to_tell_the_one_without_memory_says_so(
    small_model: Path, pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch
):
    def nobody(*_: Any) -> None:
        raise DistStoreError("wait timeout")

    monkeypatch.setattr(rehearsal, "_told_by_all", nobody)
    made = learner(small_model)
    with pytest.raises(DistStoreError):
        try_out(made, longest_of(pairs).packed)
    monkeypatch.setattr(made, "rehearse", memory_ends)
    with pytest.raises(DataError, match=r"Memory does not suffice .*rank 0: CUDA out of memory"):
        try_out(made, longest_of(pairs).packed)


def memory_for(folder: Path, pair: TokenizedPair, share: float) -> int:
    """Bytes of a worker that has this share of what the estimate says that the pair needs."""
    model, options = Model(path=str(folder)), Train()
    shape = shape_of_folder(folder)
    state = -room_beside_state(shape, model, options, memory=0, num_workers=1)
    return int((state + share * pair_bytes(shape, model, options, pair, "dpo_packed")) / 0.8)


def shape_of_folder(folder: Path) -> Any:
    from dpo_ray.model.resolve import ModelFolder

    return shape_of(ModelFolder.of(Model(path=str(folder))))


def test_what_is_estimated_not_to_fit_is_refused(small_model: Path):
    pair = pair_of(20_000, 9_000, 1_000)
    told = LongestPair(pair, "s3://b/shard-7.parquet", 41)
    made, model = learner(small_model), Model(path=str(small_model))
    estimate(made, told, model, memory_for(small_model, pair, 1.01))
    with pytest.raises(PairTooLong) as caught:
        estimate(made, told, model, memory_for(small_model, pair, 0.5))
    message = str(caught.value)
    assert "a1b2 (row 41 of s3://b/shard-7.parquet), of 30000 tokens (20000 of the prompt, 9000 chosen, 1000" in message
    assert "data.max_prompt_tokens" in message and "set train.tokens_per_microbatch to a number" in message
    fits = int(message.split("about ")[1].split(" tokens")[0])
    assert 15_000 < fits < 30_000  # half of the bytes, of which attention's squares are a part


def test_who_set_a_number_is_warned_only(small_model: Path, capfd: pytest.CaptureFixture[str]):
    pair = pair_of(2_000, 900, 100)
    made = learner(small_model, tokens_per_microbatch=512)
    estimate(made, LongestPair(pair, "s", 0), Model(path=str(small_model)), memory_for(small_model, pair, 2))
    assert capfd.readouterr().err == ""
    estimate(made, LongestPair(pair, "s", 0), Model(path=str(small_model)), 0)
    assert "It is tried all the same, for train.tokens_per_microbatch is set" in capfd.readouterr().err


def kept_by(scorer: CompletionScorer, pair: TokenizedPair) -> int:
    """Bytes that the forward pass keeps for the backward one, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in scorer.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = scorer(scorer.collate([pair])).logprobs
    return sum(size for size, _ in kept.values())


LONG = (600, 300, 1500)  # long enough for squares to be more than half of it


@pytest.mark.parametrize("implementation", ["dpo_packed", "sdpa", "eager"])
def test_a_long_pair_keeps_at_most_what_is_counted_and_not_half_of_it(small_model: Path, implementation: str):
    policy = load_policy(small_model).train()
    policy.set_attn_implementation(implementation)
    measured = kept_by(CompletionScorer(policy), pair_of(*LONG))
    counted = pair_bytes(shape_of_folder(small_model), Model(path="m"), Train(), pair_of(*LONG), implementation)
    assert measured <= counted <= 2 * measured


@pytest.mark.parametrize("name", ["Mistral, window", "Gemma 2, windows, soft caps", "Gemma 3, mixed windows"])
def test_windows_and_soft_caps_are_counted_too(name: str, tmp_path: Path):
    family = next(f for f in FAMILIES if f.name == name)
    folder = saved(family, tmp_path, sliding_window=400, max_position_embeddings=4096)
    policy = load_policy(folder).train()
    measured = kept_by(CompletionScorer(policy), pair_of(*LONG))
    shape, options = shape_of_folder(folder), {"window": window_of(policy.config), "stepwise": is_stepwise(policy)}
    counted = pair_bytes(shape, Model(path="m"), Train(), pair_of(*LONG), "dpo_packed", **options)
    assert measured <= counted <= 2 * measured
