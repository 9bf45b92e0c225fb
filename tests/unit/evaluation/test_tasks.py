"""Benchmark tasks of two models beside each other."""

from __future__ import annotations

from typing import Any

from dpo_ray.evaluation.tasks import beside, task_line


def row(
    task: str, value: float | None, *, asked: str | None = None, metric: str = "acc", n: int = 40
) -> dict[str, Any]:
    stderr = None if value is None else 0.0625
    figures = {"value": value, "stderr": stderr, "n": n}
    return {
        "asked": asked or task,
        "task": task,
        "num_fewshot": 5,
        "metric": metric,
        "higher_is_better": True,
        **figures,
    }


def test_both_models_stand_in_one_row_in_the_order_of_the_names():
    base = [row("a", 0.25), row("b1", 0.5, asked="b"), row("b2", 0.75, asked="b")]
    tuned = [row("b1", 0.625, asked="b"), row("b2", 0.75, asked="b"), row("a", 0.125)]
    found = beside(base, tuned, ["b", "a"])
    assert [(one["task"], one["base"]["value"], one["tuned"]["value"]) for one in found] == [
        ("b1", 0.5, 0.625),
        ("b2", 0.75, 0.75),
        ("a", 0.25, 0.125),
    ]
    assert found[0] == {
        "task": "b1",
        "num_fewshot": 5,
        "metric": "acc",
        "higher_is_better": True,
        "base": {"value": 0.5, "stderr": 0.0625, "n": 40},
        "tuned": {"value": 0.625, "stderr": 0.0625, "n": 40},
    }


def test_a_metric_that_only_one_model_has_is_no_number_of_the_other():
    [acc, em] = beside([row("a", 0.25)], [row("a", 0.5), row("a", 1.0, metric="em", n=3)], ["a"])
    assert acc["base"]["value"] == 0.25 and acc["tuned"]["value"] == 0.5
    assert em["base"] == {"value": None, "stderr": None, "n": 0} and em["tuned"]["n"] == 3
    assert task_line(em) == "a, em: base none, tuned 1.0000 ± 0.0625 (± standard error, n=0 and 3)"


def test_a_line_says_before_and_after():
    [found] = beside([row("a", 0.25)], [row("a", 0.5)], ["a"])
    assert task_line(found) == "a, acc: base 0.2500 ± 0.0625, tuned 0.5000 ± 0.0625 (± standard error, n=40)"
