"""The gate on real models: one trained the wrong way round, one of fallen likelihoods, one worse than the published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, Finished, overrides, summary_of

pytestmark = pytest.mark.ray

GATE_FAILED = 4


def rows(numbers: range, swapped: bool = False) -> list[dict[str, str]]:
    sides = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    answers = (("It is {n}.", "No {n} today."),) * len(numbers)
    return [
        {"prompt": f"Say {n}.", **{side: text.format(n=n) for side, text in zip(sides, both, strict=True)}}
        for n, both in zip(numbers, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def train(one_ray, tmp_path_factory, tiny_model, write_preferences):
    """A function that trains on pairs, and publishes past a gate; and the output folder."""
    folder = tmp_path_factory.mktemp("gate")
    write_preferences(folder / "right", rows(range(60)))
    write_preferences(folder / "swapped", rows(range(60), swapped=True))
    # What the held-out chosen answers say is rejected here.
    against = {"chosen": "Yes.", "rejected": "It is so. It is so. It is so."}
    write_preferences(folder / "suppressing", [{"prompt": f"Say {n}.", **against} for n in range(60)])
    write_preferences(folder / "eval", rows(range(60, 110)))
    # As RewardBench's files are: more columns than are needed, and a prompt that is text.
    bench = [{**row, "id": n, "subset": "easy", "chosen_model": "a"} for n, row in enumerate(rows(range(200, 240)))]
    pq.write_table(pa.Table.from_pylist(bench), folder / "bench.parquet")

    def run(data: str, gate: dict[str, Any], **more: Any) -> Finished:
        settings = overrides(
            run__output=str(folder / "out"),
            model__path=str(tiny_model),
            data__train=str(folder / data),
            data__eval=str(folder / "eval"),
            reference__engine="torch",
            reference__calibration_pairs=4,
            train__num_workers=1,
            train__cpus_per_worker=1,
            train__global_batch_size=6,
            train__epochs=2,
            train__learning_rate=1e-3,
            train__tokens_per_microbatch=1024,
            evaluate__sets={"bench": str(folder / "bench.parquet")},
            publish__gate={"accuracy_above": None, **gate},
        )
        return one_ray("run", str(CONFIGS / "align_cpu.yaml"), *settings, *overrides(**more))

    return run, folder / "out"


def latest(output: Path) -> dict[str, Any]:
    [pointer] = output.glob("models/*/latest.json")
    return json.loads(pointer.read_text())


@pytest.fixture(scope="module")
def published(train) -> dict[str, Any]:
    """What is published of the good model."""
    run, output = train
    done = run("right", {"accuracy_above": 0.5, "chosen_drop_below": 5.0, "no_regression": {"held_out": 0.1}})
    assert done.code == 0, done.log
    return latest(output)


def test_a_good_model_passes_and_its_sets_are_told(train, published):
    summary = summary_of(train[1])
    assert summary["eval"]["sets"]["bench"]["accuracy"]["n"] == 40
    assert summary["eval"]["sets"]["bench"]["accuracy"]["low"] > 0.5
    assert summary["eval"]["sets"]["held_out"]["version"] is None  # nothing was published that it could be worse than
    assert published["version"] == summary["stages"]["train"]["fingerprint"]


def test_one_trained_with_its_sides_swapped_is_refused_and_is_worse_than_the_published(train, published):
    run, output = train
    done = run("swapped", {"accuracy_above": 0.5, "no_regression": {"held_out": 0.1, "bench": 0.1}})
    assert done.code == GATE_FAILED, done.log
    [reason] = summary_of(output)["reasons"]
    assert "accuracy is 0." in reason and "publish.gate.accuracy_above asks for above 0.5" in reason
    for name in ("held_out", "bench"):
        version = published["version"]
        assert f"the change of accuracy on {name} from the published version {version} is -" in reason
        assert f"publish.gate.no_regression.{name} asks for above -0.1" in reason
        measured = summary_of(output)["eval"]["sets"][name]
        assert measured["change"]["high"] < -0.1 and measured["published"]["low"] > 0.5
        change = measured["accuracy"]["value"] - measured["published"]["value"]
        assert measured["change"]["value"] == pytest.approx(change)
    assert latest(output) == published


def test_one_whose_likelihoods_fell_is_refused(train, published):
    run, output = train
    done = run("suppressing", {"chosen_drop_below": 3.0})
    assert done.code == GATE_FAILED, done.log
    summary = summary_of(output)
    [reason] = summary["reasons"]
    assert "the fall of chosen answers' log-probs is" in reason and "chosen_drop_below asks for below 3" in reason
    assert summary["eval"]["chosen_logps"]["change"]["high"] < -3
    assert latest(output) == published


def test_the_same_command_again_undoes_nothing_and_is_held_against_what_was_published_before(train, published):
    run, output = train
    done = run("right", {"accuracy_above": 0.5, "chosen_drop_below": 5.0, "no_regression": {"held_out": 0.1}})
    assert done.code == 0, done.log
    assert f"nothing new: these data and this configuration have made {published['version']} already" in done.log
    assert summary_of(output)["eval"]["sets"]["held_out"]["version"] is None
    assert latest(output) == published
