"""What a run's report says, whatever the run has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dpo_ray.report.curves import Curves
from dpo_ray.report.document import Chart, Graph, Paragraph, Samples, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.run import run_document
from tests.reports import config_of, estimate, facts_of, nothing_done, stage, summary_of_a_run


def section(facts: Facts, name: str) -> Section | None:
    return next((one for one in run_document(facts).sections if one.name == name), None)


def words(section: Section | None) -> str:
    """All that its paragraphs, tables and charts say."""
    assert section is not None
    found = []
    for block in section.blocks:
        if isinstance(block, Paragraph):
            found.append(block.text)
        table = block if isinstance(block, Table) else block.table if isinstance(block, Chart) else None
        if table is not None:
            found += [" | ".join(row) for row in [table.head, *table.rows]]
        if isinstance(block, Chart):
            found += [block.title, block.says]
    return "\n".join(found)


def without(*keys: str) -> Facts:
    """The facts of a run that did not measure these."""
    summary = summary_of_a_run()
    for key in keys:
        place, _, name = key.rpartition(".")
        (summary[place] if place else summary).pop(name)
    return facts_of(summary)


def test_the_first_screen_has_the_verdict_three_figures_and_what_changed():
    document = run_document(facts_of())
    assert (document.verdict, document.tone) == ("Published", "good") and "hold" in document.why[0]
    assert [one.label for one in document.figures] == [
        "win rate against the base model",
        "preference accuracy",
        "KL from the base model, nats a token",
    ]
    assert document.figures[0].interval == "[0.820, 0.980], n=120" and "0.700" in document.figures[0].note
    changed = words(Section("changes", "", document.changes))
    assert "Before it stood 0011223344556677" in changed
    assert "preference accuracy | 0.700 [0.620, 0.780] | 0.800 [0.720, 0.880] | +0.100" in changed
    assert "pairs of preference data | 30 | 41 | +11" in changed and "train.learning_rate | 1e-06 | 2e-06" in changed


def test_of_a_gate_that_fails_each_reason_is_on_the_first_screen_and_each_condition_in_its_table():
    summary = summary_of_a_run() | {"published": None, "exit_code": 4, "reasons": ["The gate does not hold."]}
    config = config_of(publish={"gate": {"win_rate_above": 0.95, "kl_below": 0.6}})
    facts = facts_of(summary, config=config)
    document = run_document(facts)
    assert (document.verdict, document.tone, document.why) == ("Not published", "bad", ["The gate does not hold."])
    gate = words(section(facts, "gate"))
    assert "accuracy | holds | above 0.5 | 0.800 | [0.720, 0.880] | 120 | publish.gate.accuracy_above" in gate
    assert "win rate | does not hold | above 0.95 | 0.900 | [0.820, 0.980]" in gate
    assert "kl per token | holds | below 0.6 | 0.400 | [0.320, 0.480]" in gate


def test_a_run_that_failed_says_why_and_shows_nothing_that_was_not_measured():
    facts = Facts(config_of(), config_of(), nothing_done())
    document = run_document(facts)
    assert (document.verdict, document.why) == ("The run did not come to its end", ["No pairs were left."])
    assert [one.name for one in document.sections] == ["reproduce"] and not document.figures and not document.charts


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (("data",), {"data"}),
        (("reference",), {"calibration"}),
        (("eval",), {"gate", "win-rate", "samples", "held-out", "drift", "tasks"}),
        (("eval.win_rate",), {"win-rate", "samples"}),
        (("eval.tasks",), {"tasks"}),
    ],
)
def test_what_was_not_measured_has_no_section(missing: tuple[str, ...], gone: set[str]):
    every = {one.name for one in run_document(facts_of()).sections}
    assert every == {
        *("gate", "win-rate", "samples", "held-out", "drift", "tasks", "training", "data"),
        *("calibration", "lineage", "cost", "reproduce"),
    }
    assert every - {one.name for one in run_document(without(*missing)).sections} == gone


@pytest.mark.parametrize(
    "path", ["eval.histograms", "eval.drift", "eval.chosen_logps", "eval.sources", "data.token_histograms", "cost"]
)
def test_records_of_runs_that_measured_less_make_a_report_too(path: str):
    document = run_document(without(path))
    assert document.verdict == "Published"
    assert all(chart.table.rows and chart.spec["data"]["values"] for chart in document.charts)


def test_no_chart_is_empty_and_each_has_its_figures_as_a_table():
    charts = run_document(facts_of()).charts
    assert len(charts) > 15 and len({chart.title for chart in charts}) == len(charts)
    for chart in charts:
        assert chart.says and chart.table.rows and chart.spec["data"]["values"], chart.title


def test_an_accuracy_that_is_undefined_is_said_to_be():
    summary = summary_of_a_run()
    summary["eval"] |= {"accuracy": None, "accuracy_by_length": None, "sources": {}}
    facts = facts_of(summary)
    assert "undefined" in [one.value for one in run_document(facts).figures]
    assert "The accuracy is undefined" in words(section(facts, "held-out"))
    assert "no margin is above the noise" in words(section(facts, "held-out"))
    assert "undefined" in words(section(facts, "gate"))


def test_a_held_out_set_of_which_nothing_was_left_is_told_as_such():
    summary = summary_of_a_run()
    summary["eval"] |= {"accuracy": None, "accuracy_by_length": None, "sources": {}, "margin": None}
    facts = facts_of(summary)
    assert "no held-out pair was left" in words(section(facts, "held-out"))


@pytest.mark.parametrize(("share", "is_told"), [(0.9, True), (0.3, False)])
def test_margins_that_scoring_alone_could_have_made_are_told_of(share: float, is_told: bool):
    summary = summary_of_a_run()
    summary["eval"]["within_noise"] = {"share": share, "nats": 2.2}
    told = "90% of the margins are no larger than what scoring alone makes of them (2.2 nats"
    assert (told in words(section(facts_of(summary), "held-out"))) is is_told


def test_a_training_whose_first_step_was_not_logged_says_nothing_of_its_loss():
    summary = summary_of_a_run()
    assert "The loss of the first step was" in words(section(facts_of(summary), "training"))
    summary["train"]["first_step_loss"] = None
    assert "first step" not in words(section(facts_of(summary), "training"))


def test_training_and_held_out_are_on_the_same_axes_raw_and_smoothed():
    found = section(facts_of(num_steps=40), "training")
    assert found is not None
    loss = next(block for block in found.blocks if isinstance(block, Chart) and block.title == "Loss")
    series = {value["of"] for value in loss.spec["data"]["values"]}
    assert series == {"each step", "smoothed", "held out"}
    margin = next(block for block in found.blocks if isinstance(block, Chart) and block.title == "Margin")
    assert "held out" not in {value["of"] for value in margin.spec["data"]["values"]}


def test_a_training_without_held_out_evaluations_says_how_to_have_them():
    facts = facts_of()
    alone = Facts(facts.config, facts.given, facts.summary, Curves(facts.curves.trained, {}))
    assert "train.eval_every_steps" in words(section(alone, "training"))


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.8, "the longer answer is the chosen one"), (0.2, "the shorter answer is"), (0.5, "Length does not tell")],
)
def test_length_bias_is_said_in_words(share: float, said: str):
    summary = summary_of_a_run()
    summary["data"]["chosen_longer"] = estimate(share)
    assert said in words(section(facts_of(summary), "data"))


def test_samples_have_their_outcomes_and_report_samples_keeps_them_out():
    found = section(facts_of(), "samples")
    assert found is not None
    [block] = [block for block in found.blocks if isinstance(block, Samples)]
    assert len(block.samples) == 60 and [block.count(one) for one in ("won", "lost", "tied")] == [20, 20, 20]
    assert block.samples[1].note == "math, 48 → 15 tokens, reward 0.100 → 0.500"
    facts = facts_of(config=config_of(report={"samples": 0}))
    assert "report.samples is 0" in words(section(facts, "samples")) and not facts.samples


def graph_of(facts: Facts) -> Graph:
    found = section(facts, "lineage")
    assert found is not None
    [graph] = [block for block in found.blocks if isinstance(block, Graph)]
    return graph


def test_the_lineage_goes_from_the_data_to_what_was_published():
    graph = graph_of(facts_of())
    assert [node.name for node in graph.nodes] == [
        *("data", "model", "pairs", "tokens", "reference", "policy", "measured", "published"),
    ]
    assert ("model", "reference") in graph.arrows and ("measured", "published") in graph.arrows
    summary = summary_of_a_run()
    summary["train"]["started_from"] = "/models/brief/0011"
    assert ("start", "policy") in graph_of(facts_of(summary)).arrows


ROUNDS: list[dict[str, Any]] = [
    {
        "round": n,
        "pairs": 100 * n,
        "policy": f"{n:016x}",
        "accuracy": estimate(0.6 + n / 10) if n > 1 else None,
        "win_rate": estimate(0.5 + n / 10),
        "kl_per_token": estimate(n / 10),
        "best": n == 2,
        "report": f"round-{n}.html",
    }
    for n in (1, 2)
]


def test_rounds_come_first_with_links_to_their_reports_and_are_the_lineage():
    summary = summary_of_a_run() | {"rounds": ROUNDS}
    summary["stages"] = {f"{name} (round {n})": stage() for n in (1, 2) for name in ("generate", "train")}
    facts = facts_of(summary)
    found = run_document(facts).sections[0]
    assert found.name == "rounds"
    assert "2, the best | 200 | 0.700 [0.620, 0.780] (n=120) | 0.800" in words(found)
    links = next(block for block in found.blocks if type(block).__name__ == "Links")
    assert links.links == [("Report of round 1", "round-1.html"), ("Report of round 2", "round-2.html")]  # type: ignore[union-attr]
    graph = graph_of(facts)
    assert ("round 1", "round 2") in graph.arrows and ("round 2", "measured") in graph.arrows


def test_runs_that_end_early_or_find_nothing_new_say_so():
    summary = summary_of_a_run() | {"published": None}
    assert "was to end with the stage evaluate" in run_document(facts_of(summary)).why[0]
    summary["nothing_new"] = {"version": "fedcba9876543210", "published": "2026-11-26T02:00:00"}
    assert run_document(facts_of(summary)).verdict == "Nothing new"


def test_a_training_that_ended_is_not_said_to_have_died_where_the_run_failed_after_it():
    facts = without("train")
    assert "train" in facts.summary["stages"]
    assert "did not come to its end" not in words(section(facts, "training"))
    stages = {name: one for name, one in facts.summary["stages"].items() if name != "train"}
    died = replace(facts, summary={**facts.summary, "stages": stages})
    assert "did not come to its end" in words(section(died, "training"))
    rounds = replace(
        died, summary={**died.summary, "stages": {**stages, "train (round 1)": facts.summary["stages"]["train"]}}
    )
    assert "did not come to its end" not in words(section(rounds, "training"))
