"""The limits of the calibration gate: by dtype, one by one, and its earlier form."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.config.tolerance import Limits
from dpo_ray.errors import ConfigError


def config(**reference: Any) -> Config:
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "x"}}
    return parse_config({**tree, "reference": reference})


def test_what_is_left_out_follows_from_the_dtype():
    tolerance = config().reference.tolerance
    narrow, wide = tolerance.limits("float32"), tolerance.limits("bfloat16")
    assert all(10 * small <= vars(wide)[name] for name, small in vars(narrow).items())


def test_a_limit_that_is_named_holds_for_every_dtype_and_the_others_stay():
    tolerance = config(tolerance={"p99_per_token": 0.25}).reference.tolerance
    for dtype in ("float32", "bfloat16"):
        default = config().reference.tolerance.limits(dtype)
        assert tolerance.limits(dtype) == Limits(default.bias_per_token, 0.25, default.worst_token)


@pytest.mark.parametrize("number", [0.05, 5, 5.0])
def test_the_earlier_form_is_refused_and_the_new_one_named(number: float):
    with pytest.raises(ConfigError) as refused:
        config(tolerance=number)
    for text in (
        f"reference.tolerance={number}",
        "earlier form",
        "model.dtype",
        "{bias_per_token: …, p99_per_token: …",
    ):
        assert text in str(refused.value)


@pytest.mark.parametrize("given", [{"p99_per_token": 0.0}, {"bias_per_token": -1}, {"sequence": 0.05}, "auto", None])
def test_what_is_no_limit_is_refused_by_name(given: Any):
    with pytest.raises(ConfigError, match=r"reference\.tolerance"):
        config(tolerance=given)
