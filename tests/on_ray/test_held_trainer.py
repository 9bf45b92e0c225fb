"""A training that is stopped from outside gives back what it held."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import LONGEST

pytestmark = pytest.mark.ray


def endless(config: dict[str, Any]) -> None:
    import ray.train

    for step in range(1, 1_000_000):
        ray.train.report({"step": step})
        time.sleep(0.05)


class Holder:
    """An actor, as a trial is one: a controller cannot run in the driver."""

    def __init__(self, storage: str) -> None:
        from dpo_ray.on_ray.held_trainer import Hold

        self.storage, self.hold = storage, Hold()
        self.seen: list[dict[str, Any]] = []

    def fit(self) -> str:
        import ray.train
        from ray.train.torch import TorchConfig

        from dpo_ray.on_ray.held_trainer import HeldTrainer, Stopped

        trainer = HeldTrainer(
            endless,
            hold=self.hold,
            tell=self.seen.append,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1.0}),
            run_config=ray.train.RunConfig(name="held", storage_path=self.storage),
            torch_config=TorchConfig(backend="gloo"),
        )
        try:
            trainer.fit()
        except Stopped:
            return "stopped"
        return "ended"

    def told(self) -> list[dict[str, Any]]:
        return list(self.seen)

    def stop(self) -> None:
        self.hold.stop()


@pytest.fixture
def holder(shared_ray, tmp_path: Path):
    import ray

    shared_ray._start()
    return ray.remote(num_cpus=0, max_concurrency=2)(Holder).remote(str(tmp_path))


def groups() -> list[str]:
    import ray

    return [i for i, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]


def test_a_stop_ends_the_workers_and_frees_their_place(holder):
    import ray

    before = ray.available_resources()["CPU"]
    ended = holder.fit.remote()
    deadline = time.monotonic() + LONGEST
    while not any("step" in told for told in ray.get(holder.told.remote())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told = ray.get(holder.told.remote())
    assert groups() == [told[0]["placement_group"]]  # known before anything is placed in it
    assert [t["step"] for t in told[1:]] == list(range(1, len(told)))
    ray.get(holder.stop.remote())
    assert ray.get(ended) == "stopped"
    assert groups() == []
    while ray.available_resources()["CPU"] < before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == before


def test_what_was_stopped_before_it_began_does_not_begin(holder):
    import ray

    ray.get(holder.stop.remote())
    assert ray.get(holder.fit.remote()) == "stopped"
    assert ray.get(holder.told.remote()) == [] and groups() == []
