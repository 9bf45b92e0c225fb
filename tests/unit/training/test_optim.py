"""The schedule by hand, and what decays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dpo_ray.config import Train
from dpo_ray.training.optim import WeightAverage, learning_rate, make_optimizer
from tests.rounding import ulps


def rates(num_steps: int, **options: object) -> list[float]:
    config = Train.model_validate({"learning_rate": 1.0, **options})
    return [learning_rate(step, num_steps, config) for step in range(num_steps)]


def test_linear_after_warm_up():
    # 10 steps, 2 of warm-up: 1/2, 2/2; then 8 steps from 1 down by 1/8 each.
    expected = [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(10, schedule="linear", warmup_fraction=0.2) == pytest.approx(expected, abs=1e-12)


def test_cosine_after_warm_up():
    # 5 steps, 1 of warm-up; then (1 + cos(π · k/4)) / 2.
    expected = [1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert rates(5, schedule="cosine", warmup_fraction=0.2) == pytest.approx(expected, abs=1e-12)


def test_constant_after_warm_up():
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1]
    assert rates(6, schedule="constant", warmup_fraction=0.5) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates(4, schedule="linear", warmup_fraction=0.0) == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-12)


def test_a_single_step_has_the_peak():
    assert rates(1, warmup_fraction=0.1) == [1.0]
    assert rates(1, warmup_fraction=0.0) == [1.0]


@pytest.mark.parametrize(("fraction", "num_steps", "warmup"), [(0.1, 30, 3), (0.07, 100, 7), (0.1, 25, 3)])
def test_the_warm_up_is_the_fraction_of_the_steps_rounded_up(fraction: float, num_steps: int, warmup: int):
    got = rates(num_steps, schedule="constant", warmup_fraction=fraction)
    assert got.index(1.0) == warmup - 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_rate_is_above_zero_and_at_most_the_peak(schedule: str):
    assert all(0 < rate <= 1 for rate in rates(37, schedule=schedule))


def test_the_peak_scales_the_whole_schedule():
    assert rates(9, learning_rate=5e-7) == pytest.approx([5e-7 * r for r in rates(9)], rel=1e-12)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = make_optimizer(model, Train(weight_decay=0.25))
    decaying, plain = optimizer.param_groups
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight)]
    assert {id(p) for p in plain["params"]} == {id(p) for p in model.parameters() if p.ndim < 2}
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)


def test_a_first_step_moves_each_weight_by_the_learning_rate():
    # AdamW's first step is lr · g / (|g| + eps), after decay by 1 - lr · wd.
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = nn.Module()
    model.weight = weight
    optimizer = make_optimizer(model, Train(learning_rate=0.1, weight_decay=0.5))
    weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    expected = torch.tensor([[1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]])
    torch.testing.assert_close(weight.data, expected, rtol=0, atol=ulps(8, 1))


def test_a_gradient_of_a_hundred_millionth_makes_half_a_step():
    # Where AdamW's first step, lr · g / (|g| + eps), has g = eps.
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = make_optimizer(model, Train(learning_rate=0.5, weight_decay=0.0))
    model.weight.grad = torch.tensor([[1e-8, -1e-8]])
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.75, 1.25]]), rtol=0, atol=ulps(8, 1))


class Two(nn.Module):
    """One weight that is trained, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)

    def set(self, *values: float) -> None:
        with torch.no_grad():
            self.trained.copy_(torch.tensor(values))


def test_the_weight_average_by_hand():
    model = Two()
    average = WeightAverage(model, 0.75)
    model.set(5.0, -2.0)
    assert average.named_values()["trained"].tolist() == [1, -2]  # its own from the start
    average.update()
    assert average.named_values()["trained"].tolist() == [2, -2]  # ¾ · 1 + ¼ · 5
    model.set(6.0, 2.0)
    average.update()
    assert average.named_values()["trained"].tolist() == [3, -1]  # ¾ · 2 + ¼ · 6
    assert model.trained.tolist() == [6, 2]
    assert average.named_values().keys() == {"trained"}


def test_the_weights_are_the_averages_for_a_while():
    model = Two()
    average = WeightAverage(model, 0.5)
    model.set(3.0, 0.0)
    average.update()
    parameter = model.trained
    with average.in_place():
        assert model.trained.tolist() == [2, -1]
        assert model.trained is parameter
    assert model.trained.tolist() == [3, 0]
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert model.trained.tolist() == [3, 0]
    assert average.named_values()["trained"].tolist() == [2, -1]


def test_writing_into_the_named_values_changes_the_average():
    model = Two()
    average = WeightAverage(model, 0.5)
    average.named_values()["trained"].copy_(torch.tensor([9.0, 9.0]))
    with average.in_place():
        assert model.trained.tolist() == [9, 9]
