"""A pipeline's nights: a head and two nodes, jobs with the user's own rule, data that grow, and what then stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.pairs import PreferencePair
from tests.command_line import DPO_RAY, Finished, dpo_ray, summary_of
from tests.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.long]

NAME = "nightly"
GATE_FAILED = 4
JOINED = "on the cluster"
"""What a run says that asks Ray for anything."""
RULE = '''
def few_words(prompt: str, completion: str, finished: bool) -> float:
    """The fewer, the better."""
    return -float(len(completion.split()))
'''
SAMPLING = {"samples": 2, "max_tokens": 8, "dtype": "float32"}


def rows(first: int, count: int, swapped: bool = False) -> list[dict[str, str]]:
    chosen, rejected = ("No {n} today.", "It is {n}.") if swapped else ("It is {n}.", "No {n} today.")
    return [
        {"prompt": f"Say {n}.", "chosen": chosen.format(n=n), "rejected": rejected.format(n=n)}
        for n in range(first, first + count)
    ]


def pair_id(row: dict[str, str]) -> str:
    return PreferencePair(({"role": "user", "content": row["prompt"]},), row["chosen"], row["rejected"]).pair_id


@dataclass
class Nights:
    """A scheduler's folder with the configuration and the rule, the cluster, and the output."""

    folder: Path
    head: RayHead
    add: Callable[..., Path]
    """add(partition, rows) puts a shard there."""

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def submit(self, day: str) -> Finished:
        """As a scheduler does it each night."""
        command = ["submit", str(self.folder / "here" / "nightly.yaml"), "--period", day, "--executable", DPO_RAY]
        return dpo_ray(*command, env={"RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": self.head.dashboard})

    def latest(self) -> dict[str, Any]:
        return json.loads((self.output / "models" / NAME / "latest.json").read_text())

    def told(self, *words: str) -> Any:
        """What a command about the output prints with --json."""
        done = dpo_ray(words[0], str(self.output), *words[1:], "--json")
        assert done.code == 0, done.log
        return json.loads(done.log)


@pytest.fixture(scope="module")
def nights(tmp_path_factory, servable_model, write_preferences) -> Iterator[Nights]:
    folder = tmp_path_factory.mktemp("nights")
    here = folder / "here"
    here.mkdir()
    (here / "my_rules.py").write_text(RULE)
    write_preferences(folder / "eval", rows(1000, 40))
    tree = {
        "run": {"name": NAME, "output": str(folder / "out")},
        "model": {"path": str(servable_model)},
        "data": {
            "train": str(folder / "data"),
            "eval": str(folder / "eval"),
            "rows_per_shard": 20,
            "max_prompt_tokens": 64,
            "max_completion_tokens": 32,
        },
        "vllm": {"cpus_per_actor": 1, "kv_cache_gib": 1, "max_num_seqs": 16},
        "reference": {"engine": "torch", "calibration_pairs": 4},
        "train": {
            "num_workers": 2,
            "global_batch_size": 6,
            "epochs": 2,
            "learning_rate": 1e-3,
            "tokens_per_microbatch": 1024,
        },
        "evaluate": {"win_rate": {"sampling": SAMPLING, "reward": "my_rules:few_words"}},
        "publish": {"gate": {"accuracy_above": 0.5, "no_regression": {"held_out": 0.1}}},
    }
    (here / "nightly.yaml").write_text(yaml.safe_dump(tree))

    def add(day: str, new: list[dict[str, str]]) -> Path:
        return write_preferences(folder / "data" / f"date={day}", new)

    with pytest.MonkeyPatch.context() as patch, ray_head(num_cpus=0) as head, head.node(), head.node():
        patch.chdir(here)
        yield Nights(folder, head, add)


def shards_at(night: Finished, kind: str) -> list[tuple[int, int]]:
    """Of each time that shards of a kind were gone through: how many were finished already, and how many were not."""
    found = re.findall(rf"\[{kind}\] (\d+) of \d+ shards are finished already, (\d+) to compute", night.log)
    return [(int(finished), int(computed)) for finished, computed in found]


@pytest.fixture(scope="module")
def first(nights: Nights) -> tuple[Finished, dict[str, Any]]:
    nights.add("2026-11-01", rows(0, 60))
    done = nights.submit("2026-11-01")
    assert done.code == 0, done.log
    return done, nights.latest()


@pytest.fixture(scope="module")
def second(nights: Nights, first) -> tuple[Finished, dict[str, Any]]:
    nights.add("2026-11-02", rows(100, 40))
    done = nights.submit("2026-11-02")
    assert done.code == 0, done.log
    return done, nights.latest()


@pytest.fixture(scope="module")
def third(nights: Nights, second) -> Finished:
    done = nights.submit("2026-11-03")
    assert done.code == 0, done.log
    return done


@pytest.fixture(scope="module")
def fourth(nights: Nights, third) -> Finished:
    """A shard came whose sides are swapped."""
    nights.add("2026-11-04", rows(200, 240, swapped=True))
    return nights.submit("2026-11-04")


def test_the_first_night_publishes_by_a_gate_and_the_users_own_rule(nights: Nights, first):
    done, pointer = first
    assert "and with it my_rules.py" in done.log
    assert Path(pointer["path"], "model.safetensors").is_file()
    assert shards_at(done, "reference")[0] == (0, 5)  # three of the data, two of the held-out
    [run] = nights.told("show")["runs"][-1:]
    assert run["outcome"] == "published"


def test_the_second_computes_what_is_new_and_moves_the_pointer(nights: Nights, first, second):
    done, pointer = second
    for kind in ("tokenized", "reference"):
        assert shards_at(done, kind)[0] == (5, 2), kind
    assert done.lines("[candidates] reused: 40 rows")  # the base model's answers
    assert pointer["version"] != first[1]["version"]
    assert nights.told("lineage", NAME)["policies"][0]["rows"]["read"] == 100 + 40


def test_the_third_has_nothing_to_do_and_says_so(nights: Nights, second, third):
    version = second[1]["version"]
    assert f"nothing new: these data and this configuration have made {version} already" in third.log
    assert second[0].lines(JOINED) and not third.lines(JOINED) and not third.lines("to compute")
    assert nights.latest() == second[1]


def test_the_fourth_fails_its_gate_and_the_pointer_stays(nights: Nights, second, fourth):
    assert fourth.code == GATE_FAILED, fourth.log
    [reason] = summary_of(nights.output)["reasons"]
    assert f"the change of accuracy on held_out from the published version {second[1]['version']} is -" in reason
    assert "publish.gate.no_regression.held_out asks for above -0.1" in reason
    assert nights.latest() == second[1]
    outcomes = [run["outcome"] for run in nights.told("show")["runs"]]
    assert sorted(outcomes) == sorted(["published", "published", "nothing new", "not published"])


def test_a_row_tells_which_models_have_seen_it(nights: Nights, first, second, fourth):
    def seen(row: dict[str, str]) -> dict[str, str]:
        return {one["version"]: one["fate"] for one in nights.told("lineage", pair_id(row))["models"]}

    one, two = first[1]["version"], second[1]["version"]
    assert seen(rows(0, 1)[0]) == {one: "trained", two: "trained"}
    assert seen(rows(100, 1)[0]) == {one: "absent", two: "trained"}
    assert seen(rows(1000, 1)[0]) == {one: "held_out", two: "held_out"}
    assert seen(rows(200, 1, swapped=True)[0]) == {one: "absent", two: "absent"}


def test_the_first_stands_again_after_a_rollback(nights: Nights, first, second, fourth):
    done = dpo_ray("rollback", str(nights.output), NAME, "--why", "answers are worse")
    assert done.code == 0, done.log
    assert nights.latest()["version"] == first[1]["version"]
    assert Path(nights.latest()["path"], "model.safetensors").is_file()


def test_the_same_night_again_runs_no_second_time(nights: Nights, second):
    done = nights.submit("2026-11-02")
    assert done.code == 0 and "SUCCEEDED: it is not run twice" in done.log
