"""What a failure of vLLM says of a model, and what it says nothing of."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import NodeDiedError, RayTaskError

from dpo_ray.errors import ConfigError, StorageError
from dpo_ray.on_ray import engine_choice
from dpo_ray.on_ray.engine_choice import CannotServe, Undecided, tried
from dpo_ray.on_ray.pool import Pool


def of_task(cause: Exception) -> Exception:
    """As ray.get raises it."""
    failed: Exception = RayTaskError("task", f"Traceback\n{type(cause).__name__}: {cause}", cause).as_instanceof_cause()
    return failed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (of_task(ValueError("Model architectures ['Other'] are not supported")), CannotServe),
        (of_task(RuntimeError("Engine core initialization failed")), CannotServe),
        (of_task(RuntimeError("CUDA error: out of memory")), Undecided),
        (of_task(ConfigError("model.path is away")), Undecided),
        (of_task(StorageError("the store is away")), Undecided),
        (of_task(OSError("no space left")), Undecided),
        (NodeDiedError("the node is lost"), Undecided),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_only_what_is_of_the_model_is_remembered(error: Exception, expected: type, monkeypatch: pytest.MonkeyPatch):
    def fails(pool: Any) -> None:
        raise error

    monkeypatch.setattr(engine_choice, "alone", fails)
    with pytest.raises(expected, match="vLLM cannot score this model: "):
        tried(Pool(lambda: None, {}), "score this model")
