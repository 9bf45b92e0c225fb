"""Margins and soft labels in the losses that use them, by hand: the golden pair has h = 2, β = 0.1 unless stated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_ray.config.losses import Judged, require_use
from dpo_ray.errors import DataError
from dpo_ray.losses.formulas import ipo_loss, kl_estimate, sigmoid_loss
from dpo_ray.losses.objective import pair_loss
from dpo_ray.losses.pair_logps import PairLogps
from dpo_ray.pairs import CARRIED, JUDGED
from tests.unit.losses.cases import ALL_LOSSES, GOLDEN, LOSS, f64, logps, name, softplus, weighted

WITH_PREFERENCE = [one for one in ALL_LOSSES if "preference" in one.uses]


def judged(pairs: PairLogps, **values: float) -> PairLogps:
    return replace(pairs, **{name: f64(value) for name, value in values.items()})


def loss(type: str, **options: Any) -> Any:
    return LOSS.validate_python({"type": type, **options})


# −log σ(x) is log(1 + e^(−x)). βh = 0.2; of means, h = 1/5 + 1/8 = 0.325.
GOLDEN_VALUES = [
    (loss("sigmoid"), {"margin": 0.5}, softplus(0.3)),  # −log σ(0.2 − 0.5) = 0.854355
    (loss("sigmoid"), {"margin": 0.2}, math.log(2)),
    (loss("sigmoid"), {"preference": 0.75}, 0.648139),  # 0.75·0.598139 + 0.25·0.798139
    (loss("sigmoid"), {"preference": 0.5}, 0.698139),  # the mean of both
    (loss("sigmoid", label_smoothing=0.1), {"preference": 0.75}, 0.658139),  # 0.75·0.9 + 0.25·0.1 = 0.7 are right
    (loss("sigmoid", label_smoothing=0.1), {"margin": 0.5}, 0.9 * softplus(0.3) + 0.1 * softplus(-0.3)),
    (loss("sigmoid_norm"), {"margin": 0.625}, softplus(-1.0)),  # 5·0.325 − 0.625 = 1
    (loss("sigmoid_norm"), {"preference": 0.9}, 0.342245),  # 0.9·0.179745 + 0.1·1.804745
    (loss("ipo", log_ratio="sum"), {"preference": 0.75}, 0.25),  # (2 − 0.5·5)²
    (loss("ipo", log_ratio="sum"), {"preference": 0.7}, 0.0),  # (2 − 0.4·5)²
    (loss("ipo", log_ratio="sum"), {"preference": 0.5}, 4.0),  # 2²: of a tie the target is 0
    (loss("ipo"), {"preference": 0.75}, 4.730625),  # (0.325 − 2.5)²
    (loss("simpo"), {"margin": 0.5}, softplus(2.0)),  # −log σ(2·(−2 + 1.75) − 1 − 0.5)
    (loss("simpo", target_margin=0), {"margin": 1.0}, 1.701413),  # a margin of all pairs is the target margin
    (weighted((2, {"type": "sigmoid"}), (1, {"type": "sigmoid", "beta": 0.2})), {"margin": 0.4}, None),
]


@pytest.mark.parametrize(("options", "values", "expected"), GOLDEN_VALUES[:-1], ids=name)
def test_golden_values(options: Any, values: dict[str, float], expected: float):
    assert pair_loss(options, judged(GOLDEN, **values)).item() == pytest.approx(expected, abs=1e-6)


def test_a_weighted_sum_gives_each_term_the_margin():
    options, values, _ = GOLDEN_VALUES[-1]
    by_hand = 2 * softplus(-(0.2 - 0.4)) + softplus(-(0.4 - 0.4))
    assert pair_loss(options, judged(GOLDEN, **values)).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
def test_what_says_nothing_changes_no_bit(options: Any):
    nothing = judged(GOLDEN, weight=1.0, margin=0.0, preference=1.0)
    assert torch.equal(pair_loss(options, nothing), pair_loss(options, GOLDEN))


@pytest.mark.parametrize("options", [one for one in ALL_LOSSES if one.type != "weighted"], ids=name)
def test_a_loss_depends_on_what_it_says_that_it_uses_and_on_nothing_else(options: Any):
    plain = pair_loss(options, GOLDEN).item()
    for column, value in (("margin", 0.3), ("preference", 0.8)):
        changed = pair_loss(options, judged(GOLDEN, **{column: value})).item() != plain
        assert changed == (column in options.uses)


def swapped(pairs: PairLogps) -> PairLogps:
    """The answers in each other's place, and what was said of them turned round with them."""
    return replace(
        pairs,
        policy_chosen=pairs.policy_rejected,
        policy_rejected=pairs.policy_chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
        num_chosen_tokens=pairs.num_rejected_tokens,
        num_rejected_tokens=pairs.num_chosen_tokens,
        mean_chosen=pairs.mean_rejected,
        mean_rejected=pairs.mean_chosen,
        margin=None if pairs.margin is None else -pairs.margin,
        preference=None if pairs.preference is None else 1 - pairs.preference,
    )


@pytest.mark.parametrize("options", [one for one in WITH_PREFERENCE if getattr(one, "nll_weight", 0) == 0], ids=name)
@given(preference=st.floats(0, 1), margin=st.floats(0, 2))
def test_with_the_sides_swapped_and_the_label_turned_round_the_loss_is_the_same(
    options: Any, preference: float, margin: float
):
    said = {"preference": preference} | ({"margin": margin} if "margin" in options.uses else {})
    pairs = judged(GOLDEN, **said)
    assert pair_loss(options, swapped(pairs)).item() == pytest.approx(pair_loss(options, pairs).item(), abs=1e-9)


@given(margin=st.floats(0, 5))
def test_a_larger_margin_is_a_larger_loss_by_less_than_the_margin(margin: float):
    for options in (loss("sigmoid"), loss("sigmoid_norm"), loss("simpo")):
        more = pair_loss(options, judged(GOLDEN, margin=margin)).item() - pair_loss(options, GOLDEN).item()
        assert 0 <= more <= margin


@given(p=st.floats(0, 1), h=st.floats(-20, 20))
def test_a_soft_label_is_the_mean_over_hard_ones(p: float, h: float):
    def slope(of: Any) -> float:
        at = torch.tensor(h, dtype=torch.float64, requires_grad=True)
        [found] = torch.autograd.grad(of(at), at)
        return float(found)

    for soft, hard in (
        (lambda x: sigmoid_loss(x, 0.3, preference=p), lambda x: sigmoid_loss(x, 0.3)),
        (lambda x: ipo_loss(x, 0.3, preference=p), lambda x: ipo_loss(x, 0.3)),
    ):
        mean = p * slope(hard) + (1 - p) * slope(lambda x, hard=hard: hard(-x))
        assert slope(soft) == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_the_best_margin_for_a_soft_label_is_its_log_odds_and_for_ipo_linear_in_it(p: float):
    def slope(of: Any, h: float) -> Tensor:
        at = torch.tensor(h, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(of(at), at)[0]

    assert slope(lambda h: sigmoid_loss(h, 0.5, preference=p), math.log(p / (1 - p)) / 0.5).item() == pytest.approx(0)
    assert slope(lambda h: ipo_loss(h, 0.5, preference=p), 2 * p - 1).item() == pytest.approx(0)


def test_a_tie_draws_the_two_answers_together():
    for options in WITH_PREFERENCE:
        if options.type == "sigmoid" and getattr(options, "nll_weight", 0) == 0:
            even, apart = logps((-10, -10), (-10, -10)), GOLDEN
            values = [pair_loss(options, judged(pairs, preference=0.5)).item() for pairs in (even, apart)]
            assert values[0] < values[1]


def test_the_columns_are_those_that_the_rows_carry():
    assert get_args(Judged) == JUDGED and ("source", *JUDGED) == CARRIED


def test_a_weighted_sum_uses_what_all_of_its_terms_do():
    assert weighted((1, {"type": "sigmoid"}), (1, {"type": "ipo"})).uses == {"weight", "preference"}
    assert weighted((1, {"type": "sigmoid"}), (1, {"type": "bco_pair"})).uses == {"weight"}


@pytest.mark.parametrize(
    ("options", "column", "able"),
    [
        (loss("hinge"), "margin", "sigmoid, sigmoid_norm, simpo"),
        (loss("simpo"), "preference", "sigmoid, ipo, sigmoid_norm"),
        (loss("aot"), "weight", "kto"),
    ],
    ids=name,
)
def test_a_loss_that_does_not_use_a_column_is_refused_with_those_that_do(options: Any, column: Judged, able: str):
    with pytest.raises(DataError) as caught:
        require_use(options, column, "data.jsonl has")
    told = str(caught.value)
    assert told.startswith(f"data.jsonl has a {column} for each pair, and train.loss.type={options.type} does not use")
    assert able in told and f"data.ignore=[{column}]" in told
    require_use(loss("sigmoid"), column, "data.jsonl has")


def test_the_kl_estimate_counts_a_row_by_its_weight():
    ratios = f64(1.0, 4.0)
    assert kl_estimate(ratios, f64(2.0, 1.0)).item() == kl_estimate(f64(1.0, 1.0, 4.0)).item() == 2.0
