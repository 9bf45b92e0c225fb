"""The small file of work that goes on: it hides nothing of how that ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.storage.location import Location
from dpo_ray.storage.told import kept_told


def test_what_cannot_be_found_out_does_not_take_the_place_of_the_works_own_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def content() -> bytes:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ValueError, match="the cause"), kept_told(Location.of(tmp_path / "told"), content, "train"):
        raise ValueError("the cause")
    assert capsys.readouterr().err.count("could not be written (CUDA error") == 1
