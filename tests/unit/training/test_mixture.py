"""A mixture of sources: the shares that steps have, and that a plan goes on exactly wherever it stopped."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import DataError
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.mixture import Mixture, by_source, mixture_lines
from dpo_ray.training.plan import StepPlan

HIDDEN = 64
WEIGHTS = {"math": 0.5, "chat": 0.3, "safety": 0.2}
SIZES = {"math": 300, "chat": 900, "safety": 120}


def index_of(sizes: dict[str, int], rows_per_shard: int = 25) -> PlanIndex:
    """The shards of each source one after the other."""
    counts, source = list[int](), list[int]()
    for number, size in enumerate(sizes.values()):
        for first in range(0, size, rows_per_shard):
            counts.append(min(rows_per_shard, size - first))
            source.append(number)
    total = sum(counts)
    return PlanIndex.of(
        shards=[f"shard-{n}" for n in range(len(counts))],
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        row=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        lengths=np.random.default_rng(1).integers(1, 200, size=(total, 3)).astype(np.int32),
        read=total,
        source=np.array(source, dtype=np.int16),
        sources=list(sizes),
    )


def plan_of(batch: int = 20, epochs: int = 2, seed: int = 0, weights: dict[str, float] | None = WEIGHTS) -> StepPlan:
    return StepPlan(index_of(SIZES), batch, epochs, seed, HIDDEN, weights)


def sources_of(plan: StepPlan, rows: np.ndarray) -> Counter[str]:
    return Counter(plan.index.sources[n] for n in plan.index.source[plan.index.shard_of(rows)])


def order(plan: StepPlan, start: int = 0) -> list[tuple[int, list[int]]]:
    return [(step, rows.tolist()) for step, rows in plan.steps(start)]


# How many pairs of each source there are among so many.


def test_shares_of_a_few_pairs_by_hand():
    # Seats by (j − ½)/w: math 1, 3, 5, …; chat 1⅔, 5, 8⅓, …; safety 2½, 7½, …
    taken = [tuple(Mixture(WEIGHTS).taken(count).values()) for count in range(6)]
    assert taken == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1), (3, 1, 1)]
    assert Mixture(WEIGHTS).taken(10) == {"math": 5, "chat": 3, "safety": 2}
    assert Mixture({"a": 1, "b": 1}).taken(3) == {"a": 2, "b": 1}  # of equals the first


WEIGHT_LISTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=7)


@given(weights=WEIGHT_LISTS, count=st.integers(0, 3000))
def test_shares_add_up_and_are_near_exact_and_nobody_loses_a_pair_when_there_is_one_more(
    weights: list[float], count: int
):
    mixture = Mixture({str(n): weight for n, weight in enumerate(weights)})
    now, more = mixture.taken(count), mixture.taken(count + 1)
    assert sum(now.values()) == count and sum(more.values()) == count + 1
    assert all(more[name] >= now[name] for name in now)
    for name, pairs in now.items():
        assert abs(pairs - count * mixture.shares[name]) <= Fraction(1, 2) * (1 + len(weights) * mixture.shares[name])


@given(weights=WEIGHT_LISTS)
def test_the_formula_is_what_dealing_one_by_one_comes_to(weights: list[float]):
    mixture = Mixture({str(n): weight for n, weight in enumerate(weights)})
    dealt = dict.fromkeys(mixture.shares, 0)
    for count in range(1, 60):
        dealt[min(dealt, key=lambda name: (dealt[name] + Fraction(1, 2)) / mixture.shares[name])] += 1
        assert mixture.taken(count) == dealt


# The plan.


def test_each_step_has_of_each_source_its_share():
    for _, rows in plan_of().steps():
        assert sources_of(plan_of(), rows) == {"math": 10, "chat": 6, "safety": 4}


def test_shares_over_two_epochs_are_the_weights_where_a_step_is_too_small_for_them():
    plan = plan_of(batch=7)
    assert plan.num_steps == 2 * 1320 // 7
    rows = np.concatenate([rows for _, rows in plan.steps()])
    counts = sources_of(plan, rows)
    for source, share in WEIGHTS.items():
        assert abs(counts[source] - share * len(rows)) <= 1.5
    for _, of_step in plan.steps():
        assert sources_of(plan, of_step)["math"] in {3, 4}


def test_a_source_is_gone_through_pass_after_pass_by_itself():
    plan = plan_of()
    rows = np.concatenate([rows for _, rows in plan.steps()])
    owner = plan.index.source[plan.index.shard_of(rows)]
    for number, (name, size) in enumerate(SIZES.items()):
        mine = rows[owner == number].tolist()
        passes = [mine[first : first + size] for first in range(0, len(mine), size)]
        for one in passes:
            assert len(set(one)) == len(one)  # no pair twice in a pass
        whole = [one for one in passes if len(one) == size]
        assert all(set(one) == set(whole[0]) for one in whole)
        assert all(a != b for a, b in itertools.pairwise(whole)), name
        assert len(whole) == {"math": 4, "chat": 0, "safety": 4}[name]


def test_how_often_each_pair_comes_is_told():
    # 2640 pairs in two epochs: 1320, 792 and 528.
    told = plan_of().trained()
    assert told["math"] == {"pairs": 300, "share": 0.5, "passes": 4.4}
    assert told["chat"] == {"pairs": 900, "share": 0.3, "passes": 0.88}
    assert told["safety"]["passes"] == 4.4
    assert next(mixture_lines(told)) == "source math: 300 pairs, 50.0% of all that are trained on, each pair 4.40 times"
    without = plan_of(weights=None).trained()
    assert without["math"] == {"pairs": 300, "share": pytest.approx(300 / 1320), "passes": 2}


@pytest.mark.parametrize("batch", [7, 20])
@pytest.mark.parametrize("start", [0, 1, 33, 65, 66, 67, 131])
def test_a_mixture_goes_on_exactly_at_any_step(batch: int, start: int):
    plan = plan_of(batch)
    assert order(plan, start) == order(plan)[start:]


def test_the_seed_changes_the_order_and_other_sources_do_not():
    assert order(plan_of()) == order(plan_of())
    assert order(plan_of()) != order(plan_of(seed=1))
    beside = [
        StepPlan(index_of({"math": 300, other: SIZES[other]}), 16, 1, 0, HIDDEN, {"math": 1, other: 1})
        for other in ("chat", "safety")
    ]
    # Of the first source pairs have the same numbers in both.
    math = [np.concatenate([rows[rows < 300] for _, rows in plan.steps()]).tolist()[:200] for plan in beside]
    assert math[0] == math[1]


def test_without_weights_sources_change_nothing():
    plain = PlanIndex.of(*(getattr(index_of(SIZES), name) for name in ("shards", "offsets", "row", "lengths", "read")))
    assert order(StepPlan(plain, 20, 2, 0, HIDDEN)) == order(plan_of(weights=None))


def test_a_source_without_a_pair_is_refused():
    with pytest.raises(
        DataError, match=r"The source code of data.train has a weight of 0.1, but no pair of it is left"
    ):
        plan_of(weights={**WEIGHTS, "code": 0.1})
    with pytest.raises(DataError, match=r"1020 training pairs are of no source that data.train gives a weight to"):
        plan_of(weights={"math": 1.0})


def test_windows_of_many_sources_are_small_enough_for_one_cache():
    plan = plan_of()
    assert plan.shards_per_window == 5 and plan.shards_at_once == 15
    assert plan_of(weights=None).shards_at_once == 16


def test_metrics_of_the_last_epoch_count_each_pair_alike():
    history = [
        {"epoch": 0.5, "sources/math/pairs": 9, "sources/math/loss": 9.0},
        {"epoch": 1.5, "sources/math/pairs": 1, "sources/math/loss": 1.0},
        {"epoch": 2.0, "sources/math/pairs": 3, "sources/math/loss": 2.0},
    ]
    told = by_source({"math": {"pairs": 5, "share": 1.0, "passes": 2.0}, "chat": {"pairs": 1}}, history)
    assert told == {"math": {"pairs": 5, "share": 1.0, "passes": 2.0, "loss": 1.75}, "chat": {"pairs": 1}}


def test_a_million_rows_are_planned_a_window_at_a_time():
    sizes = {"math": 300_000, "chat": 600_000, "safety": 100_000}
    index = index_of(sizes, rows_per_shard=4000)
    plan = StepPlan(index, 64, 2, 0, HIDDEN, WEIGHTS)
    began = time.monotonic()
    seen = np.zeros(len(index), dtype=np.int64)
    for _, rows in plan.steps():
        np.add.at(seen, rows, 1)
    whole = time.monotonic() - began
    tracemalloc.start()
    for _ in itertools.islice(plan.steps(), 3000):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = plan.num_steps * 64
    counts = dict(zip(sizes, (int(part.sum()) for part in np.split(seen, [300_000, 900_000])), strict=True))
    began = time.monotonic()
    last = next(iter(plan.steps(plan.num_steps - 1)))
    resumed = time.monotonic() - began
    for source, share in WEIGHTS.items():
        assert abs(counts[source] - share * total) <= 1.5
    shares = {source: f"{counts[source] / total:.6f}" for source in WEIGHTS}
    print(
        f"10^6 rows, 2 epochs, {plan.num_steps} steps: {whole:.1f} s for all, {1000 * resumed:.0f} ms to the last one, "
        f"{peak / 2**20:.1f} MiB at the peak, shares {shares}"
    )
    assert len(last[1]) == 64
    # Each pair of a source as often as any other of it, but for the pass that is under way.
    assert all(np.ptp(part) <= 1 for part in np.split(seen, [300_000, 900_000]))
