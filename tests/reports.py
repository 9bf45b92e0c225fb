"""What a run leaves for its report: everything that can be measured, and texts that want to be markup."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_ray.config import Config, parse_config
from dpo_ray.histogram import histograms
from dpo_ray.report.curves import read_curves
from dpo_ray.report.facts import Before, Facts

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


def config_of(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "brief", "output": "o"},
        "model": {"path": "base"},
        "data": {"train": "pairs.jsonl"},
        "evaluate": {"win_rate": {}},
    }
    return parse_config(tree | sections)


def estimate(value: float, n: int = 120, half: float = 0.08) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def metrics_lines(num_steps: int, *, eval_every: int | None = 10) -> Iterator[bytes]:
    """metrics.jsonl of a training."""
    noise = random.Random(0)
    for step in range(1, num_steps + 1):
        done = step / num_steps
        found = {
            "step": step,
            "loss": 0.69 * math.exp(-2 * done) + 0.05 * noise.random(),
            "rewards/accuracies": min(1.0, 0.5 + 0.4 * done + 0.1 * noise.random()),
            "rewards/margins": 2 * done + 0.2 * noise.random(),
            "rewards/chosen": -done,
            "rewards/rejected": -3 * done,
            "logps/chosen": -40 - 10 * done,
            "grad_norm": 5 + noise.random(),
            "learning_rate": 1e-5 * (1 - done),
            "tokens_per_second": 200 + 20 * noise.random(),
            "skipped_pairs": ["not a number"],
        }
        if eval_every and step % eval_every == 0:
            found |= {"eval_loss": 0.7 - 0.2 * done, "eval_rewards/accuracies": 0.5 + 0.3 * done}
        yield json.dumps(found).encode()


def evaluation() -> dict[str, Any]:
    """Metrics of an evaluation with all that may be in them."""
    draw = np.random.default_rng(0)
    side = {"tokens": 48.0, "distinct_1": 0.3, "distinct_2": 0.7}
    side |= dict.fromkeys(("repetition", "refusals", "empty", "truncated"), estimate(0.1))
    return {
        "accuracy": estimate(0.8),
        "accuracy_by_length": {"chosen longer": estimate(0.6), "up to 76 tokens": estimate(0.9, 40)},
        "margin": {"mean": 3.0, "p50": 3.0, "p90": 6.0, "p99": 9.0, "max": 12.0},
        "chosen_logps": {"before": -40.0, "after": -47.0, "change": estimate(-7.0, half=1.0)},
        "win_rate": estimate(0.9),
        "verdict": "better",
        "greedy_win_rate": estimate(0.88),
        "length_controlled_win_rate": estimate(0.7),
        "win_rate_by_length": {"tuned shorter": estimate(0.9, 90), "opponent over 40 tokens": estimate(0.8, 30)},
        "mean_reward": {"base": 0.1, "tuned": 0.6},
        "kl_per_token": estimate(0.4),
        "drift": {"length_ratio": estimate(0.4), "base": side, "tuned": side},
        "against": "the base model",
        "sources": {"math": {"accuracy": estimate(0.85), "win_rate": estimate(0.7)}, "chat": {"accuracy": None}},
        "sets": {"bench": {"accuracy": estimate(0.7), "version": "v1", "published": None, "change": estimate(0.02)}},
        "histograms": {
            "margin": histograms({"after": draw.normal(3, 2, 400)}),
            "gap": histograms({"before": draw.normal(0, 2, 400), "after": draw.normal(3, 3, 400)}),
            "chosen_change": histograms({"after": draw.normal(-7, 3, 400)}),
            "tokens": histograms({"before": draw.integers(40, 49, 120), "after": draw.integers(8, 30, 120)}),
            "kl_per_token": histograms({"after": draw.normal(0.4, 0.1, 120)}),
        },
        "tasks": [
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
        ],
    }


def data() -> dict[str, Any]:
    """As a data report has it."""
    lengths = {name: np.random.default_rng(n).integers(5, 60, 200) for n, name in enumerate(("prompt", "chosen"))}
    return {
        "pairs": 41,
        "read": 49,
        "formats": {"paired": 2},
        "sources": {"math/train": 20, "chat/train": 10, "math/eval": 11},
        "quarantined": {"null_field": 5},
        "left_out": {"contradiction": 3},
        "dropped": {},
        "noted": {"boundary_merge": 17},
        "splits": {"eval": 11, "train": 30},
        "tokens": {name: {"p5": 12, "p50": 34, "p95": 56, "p99": 78, "max": 910, "n": 41} for name in lengths},
        "token_histograms": histograms(lengths, whole=True),
        "prompt_token_share": 0.4321,
        "chosen_longer": {**estimate(0.7), "tie": 6},
        "scripts": {"Latin": 40, "Han": 1},
        "reference_prefers_chosen": {"sum": estimate(0.625), "mean": estimate(0.375)},
    }


def stage(*, reused: bool = False, seconds: float = 9.0, **rows: Any) -> dict[str, Any]:
    rows = {"in": 49, "kept": 41, "dropped": {"role_order": 8}} | rows
    return {
        "fingerprint": "0123456789abcdef",
        "reused": reused,
        "seconds": seconds,
        "rows": rows,
        "workers": 2,
        "gpus": 0,
    }


def calibration() -> dict[str, Any]:
    measured = {"p50": 1e-6, "p90": 2e-6, "p99": 3e-6, "max": 4.5e-6}
    return {
        **dict.fromkeys(("token", "worst_token", "sequence"), measured),
        "bias_per_token": -1.5e-7,
        "bias_standard_error": 2e-8,
        "num_tokens": 500,
        "num_sequences": 8,
    }


def samples(count: int) -> list[dict[str, Any]]:
    """The first one wants to be markup; outcomes take turns."""
    return [
        {
            "prompt": HOSTILE if n == 0 else f"Question {n}?",
            "before": HOSTILE if n == 0 else f"Long answer {n}.",
            "after": HOSTILE if n == 0 else f"Short {n}.",
            "outcome": ("won", "lost", "tied")[n % 3],
            "rewards": [0.1, 0.5],
            "tokens": [48, 15],
            "source": "math" if n % 2 else None,
        }
        for n in range(count)
    ]


def summary_of_a_run() -> dict[str, Any]:
    """With everything in it."""
    names = ("ingest", "duplicates", "tokenize", "reference", "train", "score", "evaluate")
    return {
        "run_id": "run-1",
        "exit_code": 0,
        "began": "2026-11-27T06:04:31Z",
        "seconds": 853.9,
        "cost": {"hours": 0.24, "worker_hours": 0.31, "gpu_hours": 0.0},
        "command": "dpo-ray run o/runs/run-1/config.yaml",
        "versions": {"dpo-ray": "0.1.0", "torch": "2.13.0"},
        "stages": {name: stage(reused=n == 0, seconds=10.0 * n + 1.5) for n, name in enumerate(names)},
        "data": data(),
        "reference": {"engine": "vllm", "calibration": calibration()},
        "train": {
            "first_step_loss": 0.6931,
            "zero_margin_loss": 0.6931,
            "num_steps": 40,
            "planned_steps": 40,
            "published_step": 40,
            "tokens_per_second": 220.0,
            "seconds": 151.0,
            "started_from": "base",
            "sources": {"math": {"pairs": 300, "share": 0.5, "passes": 4.4, "loss": 0.4321}, "chat": {"pairs": 900}},
        },
        "eval": evaluation(),
        "published": "/models/brief/fedcba9876543210",
        "reasons": [],
    }


def nothing_done() -> dict[str, Any]:
    """Of a run that failed before its first stage."""
    return {"run_id": "run-2", "exit_code": 3, "stages": {}, "published": None, "reasons": ["No pairs were left."]}


def before() -> Before:
    theirs = {"data": {"pairs": 30}, "eval": {"accuracy": estimate(0.7), "against": "the base model"}}
    options = [("train.learning_rate", "1e-06", "2e-06"), ("data.train", json.dumps(HOSTILE), '"pairs.jsonl"')]
    return Before("0011223344556677", "2026-11-26T02:00:00+00:00", "run-0", theirs, options)


def facts_of(
    summary: dict[str, Any] | None = None, *, config: Config | None = None, num_steps: int = 40, num_samples: int = 60
) -> Facts:
    """All of a run, but for what another summary lacks."""
    config = config or config_of()
    most = min(num_samples, config.report.samples)
    return Facts(
        config=config,
        given=config,
        summary=summary or summary_of_a_run(),
        curves=read_curves(metrics_lines(num_steps)),
        samples=samples(most),
        before=before(),
    )
