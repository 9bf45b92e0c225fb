"""The doctor on a Ray head: what its nodes have, and a token that they ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, dpo_ray, overrides
from tests.on_ray.test_main_job import preference_rows
from tests.ray_head import ray_head

pytestmark = pytest.mark.ray

TOKEN = "0123456789abcdef0123456789abcdef"


def test_a_cluster_is_looked_at_node_by_node(tmp_path: Path, tiny_model: Path, write_preferences):
    write_preferences(tmp_path / "data", preference_rows(0, 12))
    values = {
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "data__train": str(tmp_path / "data"),
        "reference__engine": "torch",
        "train__num_workers": 3,
        "train__cpus_per_worker": 1,
        "run__wait_for_resources": 0,
    }
    command = ["doctor", str(CONFIGS / "align_cpu.yaml"), "--json"]
    with ray_head(num_cpus=4) as head:
        done = dpo_ray(*command, *overrides(**values), env=head.env)
        small = dpo_ray(*command, *overrides(**{**values, "train__cpus_per_worker": 2}), env=head.env)
    assert done.code == 0, done.log
    found = json.loads(done.lines('{"exit_code"')[0])["lines"]
    said = {line["check"]: line["said"] for line in found}
    assert said["nodes"] == "1 of 1 nodes answered"
    assert "has 4 CPUs and 0 GPUs on 1 nodes" in next(x["said"] for x in found if x["check"] == "cluster")
    assert small.code == 2
    failed = [x for x in json.loads(small.lines('{"exit_code"')[0])["lines"] if x["status"] == "failed"]
    assert [x["check"] for x in failed] == ["cluster"], "the trials of its section tune are only warned of"
    assert "train: The Ray cluster has 4 CPUs, but this needs 6 at once" in failed[0]["said"]


@pytest.mark.long
def test_a_cluster_that_asks_for_a_token_is_told_from_none(tmp_path: Path, tiny_model: Path, write_preferences):
    write_preferences(tmp_path / "data", preference_rows(0, 12))
    values = {
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "data__train": str(tmp_path / "data"),
    }
    command = ["doctor", str(CONFIGS / "align_cpu.yaml"), *overrides(**values, reference__engine="torch")]
    with ray_head(token=TOKEN) as head:
        kept_out = dpo_ray(*command, env={**head.env, "RAY_AUTH_MODE": "disabled"})
        let_in = dpo_ray(*command, env=head.env)
    assert kept_out.code == 2, kept_out.log
    [said] = kept_out.lines("failed  cluster: ")
    assert "does not let us in" in said and "here RAY_AUTH_MODE is disabled, and a token is in RAY_AUTH_TOKEN" in said
    assert "set RAY_AUTH_MODE=token" in said
    assert kept_out.lines("ok      output: "), "the others are looked at all the same"
    assert let_in.code == 0, let_in.log
    assert let_in.lines("ok      Ray's token: RAY_AUTH_MODE is token")
    assert TOKEN not in kept_out.log + let_in.log
