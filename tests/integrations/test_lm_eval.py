"""Benchmark tasks by lm-evaluation-harness itself: a task of the test's own, tiny models, no network."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dpo_ray.config import Tasks
from dpo_ray.errors import ConfigError
from dpo_ray.scoring.task_source import require_tasks
from tests.command_line import CONFIGS, LONGEST, Finished, overrides, shards_of, summary_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: make test-integrations has it"),
]

DOCUMENTS = 120
COLOURS = (
    *("red", "green", "blue", "white", "black", "yellow", "orange", "purple", "brown", "pink", "grey", "gold"),
    *("silver", "violet", "crimson", "olive", "navy", "teal", "beige", "ivory"),
)


def write_tasks(folder: Path) -> Path:
    """A folder with a task of each kind: choices, answers that the model writes, texts; and a tag and groups."""
    folder.mkdir()
    with (folder / "colours.jsonl").open("w") as file:
        draw = random.Random(0)
        for n in range(DOCUMENTS):
            # Other choices each time: a model that always favours the same words is not right equally often by chance.
            choices, label = draw.sample(COLOURS, 4), draw.randrange(4)
            row = {"question": f"Which colour has card {n}?", "choices": choices, "label": label}
            file.write(json.dumps({**row, "answer": choices[label]}) + "\n")
    common = {
        "tag": "card_tasks",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
    }
    tasks = {
        "card_colours": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        },
        "card_answers": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "card_texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{answer}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    groups = {
        "card_mean": {"task": ["card_colours"], "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}]},
        "card_both": {"task": ["card_colours", "card_answers"]},
    }
    for name, group in groups.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, **group}))
    (folder / "card_code.yaml").write_text(
        yaml.safe_dump({"task": "card_code", "unsafe_code": True, **common, **tasks["card_answers"]})
    )
    (folder / "card_lost.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "card_lost",
                **common,
                **tasks["card_colours"],
                "tag": "lost",
                "dataset_kwargs": {"data_files": {"test": str(folder / "lost.jsonl")}},
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def job(one_ray, tmp_path_factory, tiny_model, write_preferences) -> tuple[Callable[..., Finished], Path]:
    """A function that runs a command with tasks, and its folder: `tasks` has their files, `out` is the output."""
    folder = tmp_path_factory.mktemp("tasks_job")
    write_tasks(folder / "tasks")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Which colour has card {n}?"}],
            "chosen": [{"role": "assistant", "content": "red"}],
            "rejected": [{"role": "assistant", "content": "It has a colour, but I will not say which."}],
        }
        for n in range(40)
    ]
    write_preferences(folder / "data", rows)

    def run(command: str, tasks: dict[str, Any], **more) -> Finished:
        values = {
            "run__name": "cards",
            "run__output": str(folder / "out"),
            "model__path": str(tiny_model),
            "data__train": str(folder / "data" / "*.parquet"),
            "data__held_out_fraction": 0.25,
            "reference__engine": "torch",
            "reference__calibration_pairs": 4,
            "train__num_workers": 1,
            "train__cpus_per_worker": 1,
            "train__tokens_per_microbatch": 1024,
            "train__global_batch_size": 8,
            "train__learning_rate": 1e-2,
            "publish__gate__accuracy_above": None,
            "evaluate__tasks": {"include_path": str(folder / "tasks"), **tasks},
            **more,
        }
        return one_ray(command, str(CONFIGS / "align_cpu.yaml"), *overrides(**values))

    return run, folder


NAMES = ["card_colours", "card_answers", "card_texts"]


@pytest.fixture(scope="module")
def done(job) -> Finished:
    run, _ = job
    found = run("run", {"names": NAMES, "num_fewshot": 2})
    assert found.code == 0, found.log
    return found


BY_ITSELF = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

model, folder, shots, names, template = sys.argv[1:]
found = simple_evaluate(
    model="hf", model_args={"pretrained": model, "dtype": "float32"}, tasks=names.split(","), batch_size=8,
    num_fewshot=int(shots), device="cpu", apply_chat_template=template == "True",
    fewshot_as_multiturn=template == "True", task_manager=TaskManager(include_path=folder),
)
print("RESULTS", json.dumps(found["results"]))
"""


def by_itself(
    model: str | Path, folder: Path, shots: int, names: list[str], template: bool = True
) -> dict[str, dict[str, Any]]:
    """What the harness tells in a process that has nothing of ours."""
    command = [sys.executable, "-c", BY_ITSELF, str(model), str(folder), str(shots), ",".join(names), str(template)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    found: dict[str, dict[str, Any]] = json.loads(line.removeprefix("RESULTS "))
    return found


def test_the_figures_of_both_models_are_those_that_the_harness_has_by_itself(job, done, tiny_model):
    _, folder = job
    summary = summary_of(folder / "out")
    rows = summary["eval"]["tasks"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("card_colours", "acc"),
        ("card_colours", "acc_norm"),
        ("card_answers", "exact_match"),
        ("card_texts", "bits_per_byte"),
    ]
    for side, model in (("base", tiny_model), ("tuned", summary["published"])):
        found = by_itself(model, folder / "tasks", 2, NAMES)
        for row in rows:
            of_task, figures = found[row["task"]], row[side]
            # As far as float32 goes: the two processes may sum in different orders.
            assert figures["value"] == pytest.approx(of_task[f"{row['metric']},none"], rel=1e-5)
            stderr = of_task[f"{row['metric']}_stderr,none"]
            assert figures["stderr"] == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-5))
            assert figures["n"] == DOCUMENTS and row["num_fewshot"] == 2
    assert rows[0]["base"]["stderr"] > 0 and rows[3]["base"]["stderr"] is None
    assert rows[3]["base"]["value"] != pytest.approx(rows[3]["tuned"]["value"], rel=1e-3), "training moves it"
    plain = by_itself(tiny_model, folder / "tasks", 2, ["card_colours"], template=False)["card_colours"]
    assert plain["acc,none"] != rows[0]["base"]["value"], "the chat template shows in the figures"


def test_what_a_person_sees_is_the_figures_and_nothing_of_the_harness(job, done):
    _, folder = job
    shown = done.lines("card_colours, acc:")
    assert any(line.startswith("[evaluation]") for line in shown)  # while it runs
    assert any(line.startswith("card_colours, acc: base 0.") and "(± standard error, n=120)" in line for line in shown)
    for noise in ("lm_eval", "Running loglikelihood", "it/s]", "num_fewshot"):
        assert noise not in done.log
    [run] = (folder / "out" / "runs").iterdir()
    report = (run / "report.md").read_text()
    section = report[report.index("## Benchmark tasks") :]
    assert "| card\\_colours | 2 | acc\\_norm | higher is better |" in section
    card = (Path(summary_of(folder / "out")["published"]) / "README.md").read_text()
    assert "| card_answers | exact_match | 2 | 0.0000 ± 0.0000 |" in card


def test_another_training_shares_the_base_models_figures_and_one_more_task_is_computed_alone(job, done):
    run, folder = job
    before = summary_of(folder / "out")
    again = run("evaluate", {"names": [*NAMES, "card_mean"], "num_fewshot": 2}, train__learning_rate=1e-3)
    assert again.code == 0, again.log
    assert again.lines("[task_measures] 3 of 4 shards are finished already, 1 to compute")
    third = run("evaluate", {"names": NAMES, "num_fewshot": 2}, train__learning_rate=1e-3)
    assert third.code == 0, third.log
    after = summary_of(folder / "out")
    assert after["stages"]["tasks_base"]["reused"]
    assert after["stages"]["tasks_base"]["fingerprint"] == before["stages"]["tasks_base"]["fingerprint"]
    assert after["stages"]["tasks_tuned"]["fingerprint"] != before["stages"]["tasks_tuned"]["fingerprint"]
    assert [row["base"] for row in after["eval"]["tasks"]] == [row["base"] for row in before["eval"]["tasks"]]


def test_groups_have_their_own_figures_where_they_have_any_and_limits_and_task_files_count(tmp_path, job, done):
    run, folder = job
    options = {"names": ["card_mean", "card_both"], "limit": 7}
    found = run("evaluate", options)
    assert found.code == 0, found.log
    rows = summary_of(folder / "out")["eval"]["tasks"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("card_mean", "acc"),
        ("card_colours", "acc"),
        ("card_colours", "acc_norm"),
        ("card_answers", "exact_match"),
    ]
    assert {row["base"]["n"] for row in rows} == {7} and {row["num_fewshot"] for row in rows} == {0}
    stages = summary_of(folder / "out")["stages"]
    other = write_tasks(tmp_path / "tasks")
    file = other / "card_colours.yaml"
    file.write_text(file.read_text().replace("{{question}}", "Say it: {{question}}"))
    changed = run("evaluate", {**options, "include_path": str(other)})
    assert changed.code == 0, changed.log
    assert summary_of(folder / "out")["stages"]["tasks_base"]["fingerprint"] != stages["tasks_base"]["fingerprint"]
    [artifact] = (folder / "out/artifacts/task_measures").glob(stages["tasks_base"]["fingerprint"])
    files = shards_of(folder / "out", "task_measures", artifact.name)
    assert [pq.read_table(file).num_rows for file in files] == [1, 3]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["card_colors"], ["no such task", "card_colours", "lm-eval ls tasks"]),
        (["no_task_at_all_of_anyones"], ["no such task", "include_path"]),
        (["card_tasks"], ["card_code (of card_tasks)", "runs code that the model writes"]),
        (["humaneval"], ["humaneval", "runs code that the model writes"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(tmp_path, names, told):
    folder = write_tasks(tmp_path / "tasks")
    with pytest.raises(ConfigError) as refused:
        require_tasks(Tasks(names=names, include_path=str(folder)))
    for text in told:
        assert text in str(refused.value)


def test_tasks_tags_and_groups_are_known_by_name(tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    require_tasks(Tasks(names=["card_both", "card_colours", "lost", "arc_easy", "mmlu"], include_path=str(folder)))


def test_a_refusal_comes_before_the_first_stage_and_a_lost_data_set_names_its_task(job, done):
    run, _ = job
    refused = run("run", {"names": ["card_colors"]})
    assert refused.code == 2 and "Did you mean card_colours" in refused.log
    assert not refused.lines("[ingest]")
    lost = run("run", {"names": ["card_lost"]})
    assert lost.code == 2 and "The task card_lost cannot be loaded" in lost.log
    assert "evaluate.tasks.names" in lost.log
