"""Rounds on a policy's own samples, and labels from every kind of source: real vLLM, a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import Finished, overrides, summary_of

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.long]

RULE = [{"function": "dpo_ray.rewards:length_window", "arguments": {"at_most": 4, "unit": "words"}}]
SAMPLING = {"samples": 4, "max_tokens": 12, "dtype": "float32"}


@pytest.fixture(scope="module")
def rounds(one_ray, tmp_path_factory, servable_model):
    """A function that runs a command on prompts of the test's, and the output folder."""
    folder = tmp_path_factory.mktemp("rounds")
    with (folder / "prompts.jsonl").open("w") as file:
        for n in range(24):
            file.write(json.dumps({"prompt": f"Say {n}.", "answer": str(n)}) + "\n")

    def run(command: str, **more) -> Finished:
        settings = {
            "run__name": "rounds",
            "run__output": str(folder / "out"),
            "model__path": str(servable_model),
            "data__held_out_fraction": 0.4,
            "data__max_prompt_tokens": 64,
            "data__max_completion_tokens": 64,
            "generate": {"prompts": str(folder / "prompts.jsonl"), "sampling": SAMPLING, "reward": RULE},
            "vllm": {"cpus_per_actor": 1, "kv_cache_gib": 1, "max_num_seqs": 16},
            "reference__engine": "torch",
            "reference__calibration_pairs": 4,
            "train__num_workers": 1,
            "train__global_batch_size": 4,
            "train__learning_rate": 1e-3,
            "train__tokens_per_microbatch": 1024,
            "evaluate": {"win_rate": {"sampling": SAMPLING, "reward": RULE}},
            "publish__gate__accuracy_above": None,
            **more,
        }
        return one_ray(command, str(folder / "config.yaml"), *overrides(**settings))

    (folder / "config.yaml").write_text("{run: {}, model: {}, data: {}}")
    return run, folder / "out"


@pytest.fixture(scope="module")
def done(rounds) -> Finished:
    run, _ = rounds
    found = run("iterate", iterate={"rounds": 2, "prompts": "repeated", "replay": 0.5})
    assert found.code == 0, found.log
    return found


def test_each_round_samples_with_the_policy_before_it_and_is_measured_against_the_first(done, rounds):
    summary = summary_of(rounds[1])
    told = summary["rounds"]
    assert 1 <= len(told) <= 2 and sum(one["best"] for one in told) == 1
    assert all(0 <= one["win_rate"]["low"] <= one["win_rate"]["value"] <= one["win_rate"]["high"] for one in told)
    stages = summary["stages"]
    assert stages["sample_base (round 1)"]["fingerprint"]
    assert summary["published"].endswith(next(one["policy"] for one in told if one["best"]))
    run = rounds[1] / "runs" / summary["run_id"]
    page = (run / "report.html").read_text()
    for one in told:
        assert f'href="{one["report"]}"' in page and "A round" in (run / one["report"]).read_text()
    if len(told) == 2:
        assert stages["sample_base (round 2)"]["reused"]
        assert stages["sample_base (round 2)"]["fingerprint"] == stages["sample_base (round 1)"]["fingerprint"]
        assert stages["generate (round 2)"]["fingerprint"] != stages["generate (round 1)"]["fingerprint"]
        assert stages["replay (round 2)"]["rows"]["dropped"]["not_replayed"] > 0


def test_the_same_command_does_nothing_again(done, rounds):
    run, output = rounds
    before = summary_of(output)["rounds"]
    again = run("iterate", iterate={"rounds": 2, "prompts": "repeated", "replay": 0.5})
    assert again.code == 0, again.log
    summary = summary_of(output)
    assert summary["rounds"] == before
    assert all(stage["reused"] for stage in summary["stages"].values())


def test_pairs_say_what_made_them(done, rounds):
    assert list((rounds[1] / "artifacts" / "rewards").glob("*/manifest.json"))
    files = list((rounds[1] / "artifacts" / "pairs" / "shards").glob("*.parquet"))
    assert files
    for file in files:
        for row in pq.read_table(file).to_pylist():
            lineage = json.loads(row["lineage"])
            assert lineage["chosen"]["scores"]["length_window"] > lineage["rejected"]["scores"]["length_window"]
            assert len(lineage["chosen"]["model"]) == 16 and lineage["sampling"]["asks"][0]["samples"] == 4
            assert (Path(rounds[1]) / "artifacts/candidates" / lineage["candidates"] / "manifest.json").exists()
