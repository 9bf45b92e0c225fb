"""Sweeps from data to the published best model."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.command_line import CONFIGS, Finished, in_process, overrides, summary_of
from tests.on_ray.test_main_job import preference_rows

pytestmark = pytest.mark.ray

SETTINGS = {
    "run__name": "swept",
    "data__held_out_fraction": 0.5,
    "reference__engine": "torch",
    "reference__calibration_pairs": 4,
    "train__num_workers": 1,
    "train__cpus_per_worker": 1,
    "train__global_batch_size": 5,
    "train__epochs": 2,
    "train__eval_every_steps": 2,
    "train__checkpoint_every_steps": 100,
    "train__tokens_per_microbatch": 1024,
    "publish__gate__accuracy_above": None,
    "tune__beta": None,
    "tune__learning_rate": None,
    "tune__max_concurrent_trials": 2,
}


@pytest.fixture(scope="module")
def sweep(one_ray, tmp_path_factory, tiny_model, write_preferences):
    """A function that runs a command in a folder that all tests here share, and that folder."""
    folder = tmp_path_factory.mktemp("sweep")
    write_preferences(folder / "data", preference_rows(0, 80))
    paths = {
        "run__output": str(folder / "out"),
        "model__path": str(tiny_model),
        "data__train": str(folder / "data" / "*.parquet"),
    }

    def run(command: str = "sweep", config: Path = CONFIGS / "align_cpu.yaml", **more) -> Finished:
        return one_ray(command, str(config), *overrides(**{**SETTINGS, **paths, **more}))

    return run, folder / "out"


def free_and_whole() -> tuple[float, float]:
    import ray

    return ray.available_resources()["CPU"], ray.cluster_resources()["CPU"]


@pytest.fixture(scope="module")
def first(sweep):
    """A grid of which one trial diverges, ended early by ASHA, and its best trial with another seed."""
    run, output = sweep
    done = run(
        tune__learning_rate=[1e-4, 3e-3, 1e30],
        tune__scheduler={"type": "asha", "reduction_factor": 2},
        tune__repeat_best={"k": 1, "seeds": 1},
    )
    assert done.code == 0, done.log
    return done, summary_of(output), pq.read_table(summary_of(output)["sweep"]["results"]).to_pylist()


def test_a_diverging_trial_is_marked_and_does_not_stop_the_others(first):
    _, summary, table = first
    states = {row["train.learning_rate"]: row["state"] for row in table if row["seed"] == 0}
    assert states[1e30] == "diverged"
    assert "finished" in states.values()
    [diverged] = [row for row in table if row["state"] == "diverged"]
    assert "not finite" in diverged["reason"] or "nan" in diverged["reason"].lower()
    assert diverged["policy"] is None and diverged["accuracy"] is None
    assert sum(summary["sweep"]["trials"].values()) == 3


def test_the_reference_is_scored_once_and_nothing_is_left_of_the_trials(first):
    _, summary, _ = first
    assert [name for name in summary["stages"] if name.startswith("reference")] == ["reference"]
    assert summary["stages"]["reference"]["rows"]["kept"] == 80
    import ray

    free, whole = free_and_whole()
    assert free == whole
    assert not [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]


def test_the_best_is_repeated_and_judged_on_pairs_that_no_trial_was_ranked_on(first, sweep):
    done, summary, table = first
    output = sweep[1]
    best = summary["sweep"]["best"]
    repeated = [row for row in table if row["seed"] == 1]
    assert [row["number"] for row in repeated] == [best["number"]] and best["spread_over_seeds"] is not None
    final = summary["sweep"]["final"]
    ranked_on = next(line for line in done.lines("trials are ranked on"))
    ranking, judging = (int(word) for word in ranked_on.split() if word.isdigit())
    scored = summary["stages"]["score (the best)"]["rows"]
    assert scored["kept"] == final["accuracy"]["n"] == judging > 0 and ranking > 0
    assert final["published"] == summary["published"]
    assert (Path(summary["published"]) / "model.safetensors").exists()
    page = (output / "runs" / summary["run_id"] / "report.html").read_text()
    assert f"{final['accuracy']['n']}" in page and f"Chosen: trial {best['number']}" in page and "<svg" in page
    assert 'id="training"' in page and "Reward of chosen" in page
    assert f"dpo-ray run {summary['sweep']['best_yaml']}" in page and "dpo-ray sweep" in summary["command"]


def test_best_yaml_is_a_run_that_makes_the_same_model(first, sweep):
    output = sweep[1]
    _, summary, _ = first
    path = Path(summary["sweep"]["best_yaml"])
    best = yaml.safe_load(path.read_text())
    assert (
        best["tune"] is None
        and best["train"]["learning_rate"] == summary["sweep"]["best"]["values"]["train.learning_rate"]
    )
    done = in_process("run", str(path))  # nothing is computed, so no Ray is asked for
    assert done.code == 0, done.log
    again = summary_of(output)
    assert again["stages"]["train"]["reused"] and again["eval"] == summary["eval"]
    assert again["published"] == summary["published"]


def test_models_of_the_others_and_checkpoints_of_those_that_were_ended_are_removed(first, sweep):
    _, _, table = first
    folders = list((sweep[1] / "artifacts" / "train").iterdir())
    assert {f.name for f in folders if (f / "manifest.json").exists()} == {
        row["policy"] for row in table if row["policy"]
    }
    assert not [f for f in folders if (f / "checkpoints").exists()]


@pytest.mark.long
def test_the_same_command_repeats_no_trial_and_more_trials_are_added(first, sweep):
    run, output = sweep
    tpe = {
        "tune__space": {
            "train.loss.beta": {"loguniform": [0.05, 0.5]},
            "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
        },
        "tune__search": "tpe",
        "tune__rank_by": ["accuracy", "likelihood_drop"],
    }
    done = run(**tpe, tune__num_trials=2)
    assert done.code == 0, done.log
    assert summary_of(output)["stages"]["reference"]["reused"]
    before = pq.read_table(summary_of(output)["sweep"]["results"]).to_pylist()
    done = run(**tpe, tune__num_trials=3)
    assert done.code == 0, done.log
    after = pq.read_table(summary_of(output)["sweep"]["results"]).to_pylist()
    assert after[:2] == before and [row["number"] for row in after] == [0, 1, 2]
    assert done.lines("[sweep] trial 2: ") and not done.lines("[sweep] trial 0: ")
    assert done.lines("2 have ended")
    again = run(**tpe, tune__num_trials=3)
    assert again.code == 0 and not again.lines("[sweep] trial ")


@pytest.mark.long
def test_a_failing_trial_is_marked_and_losses_that_need_other_rows_have_them(sweep):
    run, output = sweep
    done = run(
        tune__space={
            "model.lora.target_modules": {"choice": [["q_proj"], ["no_such_layer"]]},
            "train.loss": [{"type": "sigmoid"}, {"type": "orpo"}],
        },
        train__epochs=1,
    )
    assert done.code == 0, done.log
    summary = summary_of(output)
    assert summary["sweep"]["trials"] == {"finished": 2, "failed": 2}
    assert {key.partition("-")[0] for key in summary["sweep"]["rows"]} == {"reference", "tokenized"}
    table = pq.read_table(summary["sweep"]["results"]).to_pylist()
    assert all("no_such_layer" in row["reason"] for row in table if row["state"] == "failed")
    assert not done.lines("is tried again")  # it would end alike
    assert free_and_whole()[0] == free_and_whole()[1]


def test_values_that_leave_other_held_out_pairs_are_refused_before_the_reference(sweep):
    run, _ = sweep
    done = run(tune__space={"data.max_completion_tokens": [13, 256]})
    assert done.code == 3, done.log
    assert done.lines("could not be compared") and not done.lines("[reference] computing")


def test_a_sweep_of_which_no_trial_finishes_says_why(sweep):
    run, _ = sweep
    done = run(tune__learning_rate=[1e30], train__epochs=1)
    assert done.code == 1
    assert "None of the 1 trials came to its end" in done.log and "Lower train.learning_rate" in done.log


def test_a_dry_run_tells_the_search():
    config = str(CONFIGS / "align_cpu.yaml")
    done = in_process("sweep", config, "--dry-run", "-o", "data.train=x", "-o", "model.lora.rank=8")
    assert done.code == 0
    assert done.lines("# sweep: 4 trials, grid, ranked by accuracy")
    assert done.lines('#   train.loss.beta: {"choice": [0.05, 0.2]}')
