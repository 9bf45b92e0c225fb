"""Exit codes and the way over process borders."""

from __future__ import annotations

import pickle

import pytest

from dpo_ray.data.rules import BadRow
from dpo_ray.errors import (
    Busy,
    ConfigError,
    DataError,
    DpoRayError,
    GateFailed,
    LeaseLost,
    ReferenceMismatch,
    RewardError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DpoRayError, 1),
        (ConfigError, 2),
        (RewardError, 2),
        (DataError, 3),
        (ReferenceMismatch, 3),
        (GateFailed, 4),
        (LeaseLost, 1),
        (Busy, 75),
    ],
)
def test_each_error_has_its_exit_code(error: type[DpoRayError], code: int):
    assert error("x").exit_code == code
    assert isinstance(error("x"), DpoRayError)


@pytest.mark.parametrize(
    "error", [DpoRayError("m"), ConfigError("m"), DataError("m"), RewardError("m"), BadRow("role_order")]
)
def test_errors_survive_pickling(error: Exception):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert vars(copy) == vars(error)
