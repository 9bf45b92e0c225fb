"""The report and the model card."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.evaluation.card import model_card
from dpo_ray.evaluation.report import html_report

ESTIMATE = {"value": 0.75, "low": 0.5091, "high": 0.8938, "n": 16}
HISTORY = [
    {"step": s, "loss": 0.7 - 0.1 * s, "rewards/accuracies": 0.5, "rewards/margins": 0.1 * s} for s in range(1, 4)
]
FULL: dict[str, Any] = {
    "run_id": "run-1",
    "exit_code": 0,
    "stages": {
        "ingest": {
            "fingerprint": "0123456789abcdef",
            "reused": True,
            "seconds": 1.5,
            "rows": {"in": 32, "kept": 20, "dropped": {"role_order": 12}},
        },
        "train": {
            "fingerprint": "fedcba9876543210",
            "reused": False,
            "seconds": 9.0,
            "rows": {"in": None, "kept": None, "dropped": {}},
        },
    },
    "reference": {
        "calibration": {
            **{
                name: {"p50": 1e-6, "p90": 2e-6, "p99": 3e-6, "max": 4.5e-6}
                for name in ("token", "worst_token", "sequence")
            },
            "bias_per_token": -1.5e-7,
            "bias_standard_error": 2e-8,
            "num_tokens": 500,
            "num_sequences": 8,
        }
    },
    "eval": {"accuracy": ESTIMATE, "win_rate": None},
    "samples": [{"prompt": "Why?", "before": "Long.", "after": "Short."}],
    "published": "/models/r/1",
    "reasons": [],
}
DATA: dict[str, Any] = {
    "pairs": 41,
    "read": 49,
    "quarantined": {"null_field": 5},
    "left_out": {"contradiction": 3},
    "dropped": {},
    "noted": {"boundary_merge": 17},
    "splits": {"eval": 11, "train": 30},
    "tokens": {"prompt": {"p5": 12, "p50": 34, "p95": 56, "p99": 78, "max": 910, "n": 41}},
    "prompt_token_share": 0.4321,
    "chosen_longer": {**ESTIMATE, "tie": 6},
    "scripts": {"Latin": 40, "Han": 1},
    "reference_prefers_chosen": {"sum": {**ESTIMATE, "value": 0.625}, "mean": {**ESTIMATE, "value": 0.375}},
}
TASKS: list[dict[str, Any]] = [
    {
        "task": "arc_easy",
        "num_fewshot": 25,
        "metric": "acc_norm",
        "higher_is_better": True,
        "base": {"value": 0.5, "stderr": 0.0103, "n": 2376},
        "tuned": {"value": 0.625, "stderr": 0.0099, "n": 2376},
    },
    {
        "task": "<wikitext>",
        "num_fewshot": None,
        "metric": "bits_per_byte",
        "higher_is_better": False,
        "base": {"value": 1.25, "stderr": None, "n": 62},
        "tuned": {"value": None, "stderr": None, "n": 0},
    },
]
EMPTY: dict[str, Any] = {
    "run_id": "run-2",
    "exit_code": 3,
    "stages": {},
    "published": None,
    "reasons": ["No pairs were left."],
}


@pytest.fixture
def config() -> Config:
    return parse_config({"run": {"name": "brief", "output": "o"}, "model": {"path": "base"}, "data": {"train": "t"}})


def test_a_full_report_shows_what_was_measured(config: Config):
    html = html_report(config, FULL, HISTORY)
    for shown in ("run-1", "/models/r/1", "0.750", "0.509 to 0.894", "4.5e-06", "role_order: 12", "0123456789abcdef"):
        assert shown in html, shown
    assert "<svg" in html and "learning_rate: 1.0e-06" in html
    assert "Nothing was published" not in html


def test_a_win_rate_names_the_model_that_it_is_against(config: Config):
    side = {"tokens": 9, "distinct_1": 0.5, "distinct_2": 0.5}
    side |= dict.fromkeys(("repetition", "refusals", "empty", "truncated"), ESTIMATE)
    measured = {"win_rate": ESTIMATE, "verdict": "better", "drift": {"base": side, "tuned": side}}
    for against, named, column in (("the base model",) * 2 + ("base",), ("rival", "rival", "rival")):
        html = html_report(config, FULL | {"eval": measured | {"against": against}}, [])
        assert f"win rate against {named}" in html and f"better than</b> {named}" in html
        assert html.count(f"<th>{column}</th><th>tuned</th>") == 2  # of the answers' measures, and of the answers
    assert "the base model" not in html


def test_what_was_not_measured_is_absent_and_never_a_number(config: Config):
    assert "preference accuracy" in html_report(config, FULL, HISTORY)
    assert "win rate" not in html_report(config, FULL, HISTORY)
    html = html_report(config, EMPTY, [])
    for heading in ("On held-out prompts", "Reference log-probs", "Before and after", "<svg", "0.000", "None"):
        assert heading not in html.split("<h2>Configuration")[0], heading


def test_a_failed_run_says_why_and_that_nothing_was_published(config: Config):
    html = html_report(config, EMPTY, [])
    assert "No pairs were left." in html and "Nothing was published." in html


def test_the_data_are_described(config: Config):
    html = html_report(config, {**FULL, "data": DATA}, [])
    section = html[html.index("<h2>Data</h2>") : html.index("<h2>Reference log-probs")]
    for shown in ("41 pairs, of them 11 eval and 30 train", "49 rows were read", "43.2%", "<td>910</td>", "Han: 1"):
        assert shown in section, shown
    for shown in ("null_field: 5", "contradiction: 3", "boundary_merge: 17", "<td>6</td>", "0.625", "0.375"):
        assert shown in section, shown
    assert "dropped" not in section
    assert "<h2>Data</h2>" not in html_report(config, FULL, [])


def test_what_is_known_of_each_source_stands_in_one_row(config: Config):
    trained = {"math": {"pairs": 300, "share": 0.5, "passes": 4.4, "loss": 0.4321}, "chat": {"pairs": 900}}
    measured = {"math": {"accuracy": ESTIMATE, "win_rate": None}, "code": {"win_rate": {**ESTIMATE, "value": 0.625}}}
    html = html_report(config, FULL | {"train": {"sources": trained}, "eval": {"sources": measured}}, [])
    section = html[html.index("<h2>By source</h2>") :]
    rows = [line for line in section[: section.index("</table>")].splitlines() if line.startswith("<tr><td>")]
    assert [row.split("</td>")[0] for row in rows] == ["<tr><td>math", "<tr><td>chat", "<tr><td>code"]
    assert "<td>50.0%</td><td>4.40</td><td>0.4321</td><td>0.750 (0.509 to 0.894, n=16)</td><td></td>" in rows[0]
    assert "<td>900</td><td></td>" in rows[1] and "0.625 (0.509" in rows[2]
    assert "By source" not in html_report(config, FULL, [])


def test_of_the_data_nothing_is_said_that_was_not_measured(config: Config):
    few = {name: DATA[name] for name in ("pairs", "splits", "dropped", "noted", "scripts")} | {"tokens": {}}
    html = html_report(config, {**EMPTY, "data": few}, []).split("<h2>Configuration")[0]
    assert "41 pairs" in html
    for said in ("rows were read", "% of the tokens", "longer", "prefers", "None", "Undefined"):
        assert said not in html, said


@pytest.mark.parametrize("place", ["samples", "reasons", "config"])
def test_text_of_others_cannot_become_markup(place: str):
    attack = "<script>alert(1)</script>&"
    summary = {**FULL, "samples": [dict.fromkeys(("prompt", "before", "after"), attack)], "reasons": [attack]}
    if place != "samples":
        summary.pop("samples")
    if place != "reasons":
        summary["reasons"] = []
    path = attack if place == "config" else "base"
    config = parse_config({"run": {"name": "r", "output": "o"}, "model": {"path": path}, "data": {"train": "t"}})
    html = html_report(config, summary, HISTORY)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in html


def test_the_report_needs_nothing_from_elsewhere(config: Config):
    html = html_report(config, FULL, HISTORY)
    for reference in ("src=", "<link", "@import", "url(http"):
        assert reference not in html


def test_the_model_card_names_base_options_and_results(config: Config):
    train = {"first_step_loss": 0.693147, "final": {"loss": 0.51234}}
    card = model_card(config, "run-1", train, {"accuracy": ESTIMATE, "win_rate": None})
    assert card.startswith("---\nlibrary_name: transformers\n")
    for shown in ("# brief", "`base`", "sigmoid", "β = 0.1", "1e-06", "`run-1`", "0.6931", "0.5123"):
        assert shown in card, shown
    assert "| preference accuracy | 0.750 | 0.509 to 0.894 | 16 |" in card
    assert "win rate" not in card


def test_the_figure_shows_what_was_measured_where_it_was(config: Config):
    rewards = {"rewards/chosen": 0.2, "rewards/rejected": -0.1}
    history = [{"step": 1, "loss": 0.5, **rewards}, {"step": 2, "skipped_pairs": ["a"]}, {"step": 3, "loss": 0.4}]
    html = html_report(config, FULL, history)
    assert "<!-- rewards/chosen -->" in html and "<!-- rewards/rejected -->" in html
    assert "<!-- rewards/margins -->" not in html
    assert "<svg" not in html_report(config, FULL, history[1:2])


def test_the_card_of_a_loss_without_beta_names_none():
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}}
    train = {"first_step_loss": 0.5, "final": {"loss": 0.4}}
    orpo = parse_config({**tree, "train": {"loss": {"type": "orpo"}}})
    assert "orpo" in model_card(orpo, "run-1", train, {}) and "β" not in model_card(orpo, "run-1", train, {})
    assert "(β = 0.1," in model_card(parse_config(tree), "run-1", train, {})


def test_benchmark_tasks_are_a_table_of_both_models(config: Config):
    html = html_report(config, {**FULL, "eval": {**FULL["eval"], "tasks": TASKS}}, [])
    section = html[html.index("<h2>Benchmark tasks</h2>") : html.index("<h2>Reference log-probs")]
    assert "<td>arc_easy</td><td>25</td><td>acc_norm</td><td>higher is better</td>" in section
    assert "<td>0.5000 ± 0.0103</td><td>0.6250 ± 0.0099</td><td>2376</td>" in section
    assert "<td>&lt;wikitext&gt;</td><td></td><td>bits_per_byte</td><td>lower is better</td>" in section
    assert "<td>1.2500</td><td>none</td><td>62 and 0</td>" in section
    assert "Benchmark tasks" not in html_report(config, FULL, [])


def test_the_card_has_benchmark_tasks_where_they_are_measured(config: Config):
    train = {"first_step_loss": 0.693147, "final": {"loss": 0.51234}}
    card = model_card(config, "run-1", train, {"accuracy": ESTIMATE, "tasks": TASKS})
    assert "| preference accuracy | 0.750 | 0.509 to 0.894 | 16 |\n\n| benchmark task" in card
    assert "| arc_easy | acc_norm | 25 | 0.5000 ± 0.0103 | 0.6250 ± 0.0099 | 2376 |\n" in card
    assert "62 and 0 |\n\nLoss: 0.6931" in card
    assert "benchmark" not in model_card(config, "run-1", train, {"accuracy": ESTIMATE})
