"""The step plan: every pair once an epoch, the same steps whoever computes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.bins import first_fit
from dpo_ray.errors import ConfigError
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.plan import StepPlan, microbatches, pair_cost

HIDDEN = 64


def index_of(num_pairs: int, num_shards: int = 3) -> PlanIndex:
    """Pairs of all lengths over a few shards."""
    random = np.random.default_rng(7)
    shard = np.sort(random.integers(num_shards, size=num_pairs)).astype(np.int32)
    return PlanIndex.of(
        shards=[f"shard-{i}" for i in range(num_shards)],
        offsets=np.searchsorted(shard, np.arange(num_shards + 1)),
        row=np.array([int((shard[:i] == s).sum()) for i, s in enumerate(shard)], dtype=np.int32),
        lengths=random.integers(1, 200, size=(num_pairs, 3)).astype(np.int32),
        read=num_pairs,
    )


def plan_of(num_pairs: int, batch: int, epochs: int = 1, seed: int = 0, num_shards: int = 3) -> StepPlan:
    return StepPlan(index_of(num_pairs, num_shards), batch, epochs, seed, HIDDEN)


def order(plan: StepPlan, start: int = 0) -> list[tuple[int, list[int]]]:
    return [(step, rows.tolist()) for step, rows in plan.steps(start)]


@pytest.mark.parametrize(("num_pairs", "batch", "epochs"), [(12, 4, 1), (12, 4, 3), (10, 4, 2), (5, 1, 2), (3, 7, 7)])
def test_every_pair_comes_exactly_once_an_epoch(num_pairs: int, batch: int, epochs: int):
    rows = [row for _, rows in order(plan_of(num_pairs, batch, epochs)) for row in rows]
    assert len(rows) == num_pairs * epochs // batch * batch
    for epoch in range(0, len(rows), num_pairs):
        part = rows[epoch : epoch + num_pairs]
        assert len(set(part)) == len(part)
        if len(part) == num_pairs:
            assert set(part) == set(range(num_pairs))


def test_steps_are_numbered_and_full():
    steps = order(plan_of(11, 4, 2))
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4]  # 22 // 4
    assert {len(rows) for _, rows in steps} == {4}


@pytest.mark.parametrize("start", [0, 1, 2, 4, 5])
def test_a_plan_started_later_goes_on_exactly(start: int):
    plan = plan_of(10, 4, 2)
    assert plan.num_steps == 5
    assert order(plan, start) == order(plan)[start:]


def test_the_plan_is_deterministic_and_the_seed_changes_it():
    assert order(plan_of(40, 8, 2)) == order(plan_of(40, 8, 2))
    assert order(plan_of(40, 8, 2)) != order(plan_of(40, 8, 2, seed=1))


def test_epochs_differ_in_order():
    rows = [row for _, rows in order(plan_of(40, 8, 2)) for row in rows]
    assert rows[:40] != rows[40:]
    assert rows[:40] != sorted(rows[:40])


def test_rows_are_shuffled_within_windows_of_shards_so_that_a_step_reads_few_files():
    # 40 shards of 25 rows: windows of 16, 16 and 8 shards.
    index = PlanIndex.of(
        shards=list(map(str, range(40))),
        offsets=np.arange(41) * 25,
        row=np.tile(np.arange(25, dtype=np.int32), 40),
        lengths=np.ones((1000, 3), dtype=np.int32),
        read=1000,
    )
    rows = np.concatenate([rows for _, rows in StepPlan(index, 10, 1, 0, HIDDEN).steps()])
    windows = [set(index.shard_of(rows[a:b]).tolist()) for a, b in ((0, 400), (400, 800), (800, 1000))]
    assert [len(w) for w in windows] == [16, 16, 8]
    assert set.union(*windows) == set(range(40))
    # Within a window rows of different shards are mixed.
    assert len(set(index.shard_of(rows[:40]).tolist())) > 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_workers(world_size: int):
    plan = plan_of(24, 8)
    for _, rows in plan.steps():
        ranks = plan.microbatches(rows, world_size, 400)
        assert len(ranks) == world_size
        assert all(any(rank) for rank in ranks)
        assert Counter(row for rank in ranks for batch in rank for row in batch) == Counter(rows.tolist())


def test_microbatches_keep_to_the_token_budget_by_the_pairs_own_lengths():
    plan = plan_of(24, 8)
    tokens = plan.index.lengths.sum(axis=1)
    for _, rows in plan.steps():
        for rank in plan.microbatches(rows, 2, 400):
            for batch in rank:
                assert len(batch) == 1 or tokens[batch].sum() <= 400


def test_too_few_pairs_for_a_step_are_a_configuration_error():
    with pytest.raises(ConfigError) as caught:
        plan_of(7, 8)
    assert "7 training pairs" in str(caught.value) and "global_batch_size=8" in str(caught.value)
    with pytest.raises(ConfigError):
        plan_of(0, 1)
    assert plan_of(4, 8, epochs=2).num_steps == 1


@given(
    st.lists(st.tuples(*[st.integers(0, 60)] * 3), min_size=1, max_size=24),
    st.integers(1, 6),
    st.integers(1, 200),
)
def test_a_step_is_spread_whole_into_as_many_microbatches_on_every_rank(
    lengths: list[tuple[int, int, int]], world_size: int, limit: int
):
    index = replace(index_of(len(lengths) + 5), lengths=np.array([(1, 1, 1)] * 5 + lengths, dtype=np.int32))
    rows = np.arange(5, len(index))[::-1]  # not the rows from 0 on
    ranks = microbatches(index, rows, world_size, limit, HIDDEN)
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(row for rank in ranks for group in rank for row in group) == sorted(rows.tolist())
    tokens = index.lengths.sum(axis=1)
    for rank in ranks:
        assert all(len(group) <= 1 or tokens[group].sum() <= limit for group in rank)
        if not all(rank):  # an empty one only where each pair goes alone already
            assert max(map(len, rank)) <= 1
    # Some rank needed them all: none is there for nothing.
    assert any(len(first_fit(tokens[[row for group in rank for row in group]], limit)) == len(rank) for rank in ranks)
    assert microbatches(index, rows, world_size, limit, HIDDEN) == ranks


def test_the_cost_of_a_pair_by_hand():
    # prompt 10, chosen 4, rejected 6: 20 tokens. Attention: 14² + 6 · (16 + 10) = 352; over 12 · 8 hidden = 3.6667.
    assert pair_cost(np.array([[10, 4, 6]]), 8)[0] == pytest.approx(20 + 352 / 96, abs=1e-12)


def test_a_single_answer_costs_the_same_on_either_side():
    chosen, rejected = pair_cost(np.array([[10, 4, 0], [10, 0, 4]]), 8)
    # 14 tokens, attention 14² over 12 · 8; as rejected: 10² + 4 · (14 + 10) = 14².
    assert chosen == rejected == pytest.approx(14 + 196 / 96, abs=1e-12)


def test_rows_that_lack_a_side_are_counted():
    lengths = np.array([[5, 2, 0], [5, 2, 3], [5, 0, 3]], dtype=np.int32)
    index = PlanIndex.of(["shard"], np.array([0, 3]), np.arange(3, dtype=np.int32), lengths, 3)
    assert index.num_unpaired == 2
    assert index_of(3).num_unpaired == 0


def test_a_shared_prompt_makes_a_pair_cheaper_than_its_two_sequences():
    pair = pair_cost(np.array([[100, 10, 10]]), HIDDEN)[0]
    alone = pair_cost(np.array([[100, 10, 0]]), HIDDEN)[0]
    assert alone < pair < 2 * alone


@pytest.mark.parametrize("start", [0, 1, 159, 160, 161, 499, 500, 799, 999, 1000])
def test_a_plan_over_many_shards_goes_on_exactly_at_any_step(start: int):
    # Windows of 16 shards; some shards are empty, and some hold more than a window's mean.
    plan = plan_of(2000, 4, epochs=2, num_shards=70)
    assert plan.num_steps == 1000
    assert order(plan, start) == order(plan)[start:]


def test_a_restart_late_in_a_long_plan_looks_at_one_window_only(monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(4000, 4, epochs=1, num_shards=160)
    drawn: list[int] = []
    make = np.random.default_rng

    def counting(seed: Any) -> Any:
        drawn.append(len(seed))
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", counting)
    next(iter(plan.steps(950)))
    assert drawn == [2, 3]  # the order of the shards, and that of one window's pairs


@pytest.mark.parametrize(("tokens_a_pair", "size"), [(3, 16), (3000, 16), (30_000, 8), (3_000_000, 2)])
def test_of_large_shards_fewer_make_up_a_window(tokens_a_pair: int, size: int):
    # 40 shards of 500 pairs.
    lengths = np.full((20_000, 3), tokens_a_pair // 3, dtype=np.int32)
    index = PlanIndex.of([*map(str, range(40))], np.arange(41) * 500, np.tile(np.arange(500), 40), lengths, 20_000)
    plan = StepPlan(index, 100, 1, 0, HIDDEN)
    assert plan.shards_per_window == size
    pairs = np.concatenate([pairs for _, pairs in plan.steps()])
    assert len(set(index.shard_of(pairs[: size * 500]).tolist())) == size
