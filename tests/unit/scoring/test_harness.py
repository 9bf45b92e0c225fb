"""What lm-evaluation-harness returns, as our rows; it is not needed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dpo_ray.pairs import TASK_MEASURES
from dpo_ray.scoring.harness import measures

MATHS = {
    "name": "maths",
    "alias": "maths",
    "sample_len": 30,
    "exact_match,strict-match": np.float64(0.5),
    "exact_match_stderr,strict-match": 0.0928,
    "exact_match,none": 0.6,
    "exact_match_stderr,none": "N/A",
}
SPELLING = {
    "name": "spelling",
    "alias": "spelling",
    "sample_len": 20,
    "ter,none": float("nan"),
    "ter_stderr,none": 0.1,
}


def results(of_tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "results": of_tasks,
        "n-shot": {"maths": 5, "spelling": 0},
        "higher_is_better": {"maths": {"exact_match": True}, "spelling": {"ter": False}, "school": {"acc": None}},
    }


def test_each_metric_of_a_task_is_a_row_with_its_standard_error_and_documents():
    rows = measures("maths", results({"maths": MATHS}))
    assert rows == [
        {
            "asked": "maths",
            "task": "maths",
            "num_fewshot": 5,
            "metric": "exact_match,strict-match",
            "higher_is_better": True,
            "value": 0.5,
            "stderr": 0.0928,
            "n": 30,
        },
        {
            "asked": "maths",
            "task": "maths",
            "num_fewshot": 5,
            "metric": "exact_match",
            "higher_is_better": True,
            "value": 0.6,
            "stderr": None,
            "n": 30,
        },
    ]
    assert pa.Table.from_pylist(rows, schema=TASK_MEASURES).to_pylist() == rows


def test_a_group_with_figures_of_its_own_has_these_and_another_those_of_its_tasks():
    own = {"name": "school", "alias": "school", "sample_len": 50, "acc,none": 0.25, "acc_stderr,none": 0.05}
    of_tasks = {"maths": MATHS, "spelling": SPELLING}
    [row] = measures("school", results({"school": own, **of_tasks}))
    assert (row["task"], row["n"], row["num_fewshot"], row["higher_is_better"]) == ("school", 50, None, None)
    without = {"name": "school", "alias": "school"}
    for found in ({"school": without, **of_tasks}, of_tasks):
        rows = measures("school", results(found))
        assert [(row["asked"], row["task"]) for row in rows] == [
            ("school", name) for name in ("maths", "maths", "spelling")
        ]


def test_what_is_no_finite_number_is_null():
    [row] = measures("spelling", results({"spelling": SPELLING}))
    assert row["value"] is None and row["stderr"] == 0.1 and row["higher_is_better"] is False
