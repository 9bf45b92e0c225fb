"""Benchmark tasks in the evaluation, the plan and the closing lines; lm-evaluation-harness is not needed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import load_config
from dpo_ray.pairs import REFERENCE, SCORES, TASK_MEASURES
from dpo_ray.storage.artifact import Artifact
from pipelines.context import RunContext
from pipelines.evaluate import _evaluate
from pipelines.show import closing_lines, plan_lines
from tests.command_line import CONFIGS
from tests.unit.pipelines.test_reward_identity import artifact

NAMES = ["colours", "sums"]


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    overrides = [f"run.output={tmp_path / 'out'}", f"evaluate.tasks={{names: {NAMES}}}"]
    return RunContext.start(load_config(CONFIGS / "align_cpu.yaml", overrides), "run")


def measured(folder: Path, side: str, values: dict[str, float]) -> Artifact:
    rows = [
        {
            "asked": name,
            "task": name,
            "num_fewshot": 0,
            "metric": "acc",
            "higher_is_better": True,
            "value": value,
            "stderr": 0.05,
            "n": 80,
        }
        for name, value in values.items()
    ]
    return artifact(folder / side, "task_measures", rows, TASK_MEASURES)


def test_the_evaluation_has_both_models_and_is_made_again_for_other_figures(context: RunContext, tmp_path: Path):
    scored = {"chosen_tokens": 1, "rejected_tokens": 1, "chosen_reward": 0.5, "rejected_reward": -0.5}
    logps = {"chosen_logps": -1.0, "chosen_ref_logps": -1.5}
    scores = artifact(tmp_path, "policy_scores", [{"pair_id": "0", **scored, **logps}], SCORES)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    reference = {"chosen_ref_logprobs": [-1.5], "rejected_ref_logprobs": [-1.5]}
    rows = artifact(
        tmp_path, "reference", [{"pair_id": "0", "prompt_id": "00ff", "split": "eval", **ids, **reference}], REFERENCE
    )
    base = measured(tmp_path, "base", {"sums": 0.25, "colours": 0.5})

    def evaluated(tuned: dict[str, float], name: str) -> tuple[list[Any], bool]:
        of_tasks = {"base": base, "tuned": measured(tmp_path, name, tuned)}
        made, reused = _evaluate(context, scores, rows, None, {}, None, of_tasks)
        return [(t["task"], t["base"]["value"], t["tuned"]["value"]) for t in made.manifest.metrics["tasks"]], reused

    first = [("colours", 0.5, 0.75), ("sums", 0.25, 0.125)]
    assert evaluated({"colours": 0.75, "sums": 0.125}, "first") == (first, False)
    assert evaluated({"colours": 0.75, "sums": 0.125}, "first") == (first, True)
    assert evaluated({"colours": 0.5, "sums": 0.5}, "second") == ([("colours", 0.5, 0.5), ("sums", 0.25, 0.5)], False)
    without, _ = _evaluate(context, scores, rows, None, {}, None)
    assert "tasks" not in without.manifest.metrics


def test_the_plan_names_the_tasks(context: RunContext):
    [line] = [line for line in plan_lines(context.config, "publish") if line.startswith("evaluate: ")]
    assert line == "evaluate: held-out accuracy; base and tuned model on colours, sums"


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (6, 6), (7, 0)])
def test_the_closing_lines_have_a_few_tasks_and_leave_many_to_the_report(context: RunContext, count: int, shown: int):
    figures = {"value": 0.5, "stderr": 0.05, "n": 80}
    tasks = [{"task": f"task{n}", "metric": "acc", "base": figures, "tuned": figures} for n in range(count)]
    summary = {"eval": {"tasks": tasks}, "stages": {}, "published": None}
    lines = [line for line in closing_lines(context, summary, Path("log.txt")) if line.startswith("task")]
    assert len(lines) == shown
    assert all(
        line.endswith("acc: base 0.5000 ± 0.0500, tuned 0.5000 ± 0.0500 (± standard error, n=80)") for line in lines
    )
