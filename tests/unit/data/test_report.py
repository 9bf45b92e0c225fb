"""The data report: counts of shards, added up, and what is said of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.duplicates import PairsShard
from dpo_ray.data.report import (
    MEASURES,
    measure_pairs,
    measure_reference,
    measure_tokens,
    merge,
    quantiles,
    report,
    report_lines,
    script_of,
    to_table,
)
from dpo_ray.data.tally import Tally
from dpo_ray.pairs import PAIRS, REFERENCE, TOKENIZED
from dpo_ray.shards.measure import MeasuredShard, MeasureShard, What
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from tests.left_out import Rows, left_out


def tokenized(*lengths: tuple[int, int, int], split: str = "train") -> pa.Table:
    """Rows with so many tokens of prompt, chosen and rejected."""
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{"split": split, **{p: [7] * n for p, n in zip(parts, of_row, strict=True)}} for of_row in lengths]
    return pa.Table.from_pylist(rows, schema=TOKENIZED)


def scored(*rows: tuple[list[float], list[float]]) -> pa.Table:
    """Rows with these log-probs of chosen and rejected."""
    return pa.Table.from_pylist(
        [
            {
                "chosen_ids": [7] * len(chosen),
                "rejected_ids": [7] * len(rejected),
                "chosen_ref_logprobs": chosen,
                "rejected_ref_logprobs": rejected,
            }
            for chosen, rejected in rows
        ],
        schema=REFERENCE,
    )


def texts(*rows: tuple[str, str | None, str | None]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"prompt": [{"role": "user", "content": p}], "chosen": c, "rejected": r} for p, c, r in rows], schema=PAIRS
    )


def reported(*tables: pa.Table, kept: int = 4, **counters: Any) -> dict[str, Any]:
    given = {"ingested": None, "left_out": None, "tokenized": {"read": kept, "kept": kept}, **counters}
    return report(merge(tables), **{name: counted and Tally.of(counted) for name, counted in given.items()})


def test_sources_and_judgements_are_counted_and_of_a_tie_no_answer_is_the_better_one():
    rows = [
        {"split": "train", "source": "math", "weight": 2.0},
        {"split": "eval", "source": "math", "preference": 0.5},
        {"split": "train", "source": "chat", "preference": 0.8},
    ]
    sides = {"prompt_ids": [7], "chosen_ids": [7, 7], "rejected_ids": [7]}
    found = reported(measure_to(pa.Table.from_pylist([row | sides for row in rows], schema=TOKENIZED)), kept=3)
    assert found["sources"] == {"chat/train": 1, "math/eval": 1, "math/train": 1}
    assert found["judged"] == {"preference": 2, "weight": 1}
    assert found["chosen_longer"]["n"] == 2
    lines = report_lines(found)
    assert "sources: chat/train 1, math/eval 1, math/train 1" in lines and "judged: preference 2, weight 1" in lines
    assert not {"sources", "judged"} & reported(measure_to(tokenized((1, 2, 1))), kept=1).keys()


def measure_to(table: pa.Table) -> pa.Table:
    return to_table(measure_tokens(table))


def test_lengths_are_counted_where_there_is_an_answer():
    assert measure_tokens(tokenized((3, 2, 2), (3, 4, 1), (5, 2, 0), (5, 0, 6))) == {
        ("split/train", 0): 4,
        ("tokens/prompt", 3): 2,
        ("tokens/prompt", 5): 2,
        ("tokens/chosen", 2): 2,
        ("tokens/chosen", 4): 1,
        ("tokens/rejected", 1): 1,
        ("tokens/rejected", 2): 1,
        ("tokens/rejected", 6): 1,
        ("longer/chosen", 0): 1,
        ("longer/tie", 0): 1,
    }


def test_the_reference_prefers_by_the_sum_or_by_the_mean():
    rows = scored(
        ([-1.0, -1.0], [-3.0]),  # sums −2 > −3, means −1 > −3
        ([-1.0, -1.0, -1.0], [-2.0]),  # sums −3 < −2, means −1 > −2
        ([-1.0, -3.0], [-2.0, -2.0]),  # equal
        ([-1.0], []),
        ([math.nan], [-1.0]),
    )
    assert measure_reference(rows) == {
        ("prefers_by_sum/chosen", 0): 1,
        ("prefers_by_sum/rejected", 0): 1,
        ("prefers_by_sum/tie", 0): 1,
        ("prefers_by_sum/not_finite", 0): 1,
        ("prefers_by_mean/chosen", 0): 2,
        ("prefers_by_mean/tie", 0): 1,
        ("prefers_by_mean/not_finite", 0): 1,
    }


def test_a_row_has_one_script_and_an_unpaired_one_that_of_its_answer():
    rows = texts(
        ("Why?", "Because.", "Потому что потому что."),
        ("Почему?", None, "Потому."),
        ("1 + 1?", "2", "3"),
        ("?", "ª", "b"),
    )
    assert measure_pairs(rows) == {
        ("script/Latin", 0): 1,
        ("script/Cyrillic", 0): 1,
        ("script/no letters", 0): 1,
        ("script/other", 0): 1,
    }


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Größe naïve", "Latin"),
        ("ＡＢＣ", "Latin"),
        ("Почему небо", "Cyrillic"),
        ("Γιατί", "Greek"),
        ("لماذا السماء", "Arabic"),
        ("מדוע", "Hebrew"),
        ("आसमान नीला क्यों", "Devanagari"),
        ("为什么天空是蓝色的？", "Han"),
        ("人々", "Han"),
        ("なぜ空は青いのですか", "Japanese"),
        ("東京都庁展望室の案内", "Japanese"),
        ("コンピュータ", "Japanese"),
        ("ｶﾀｶﾅ", "Japanese"),
        ("为什么「カ」这个字母在中文文本里出现了一次呢", "Han"),
        ("하늘은 왜", "Hangul"),
        ("ทำไม", "Thai"),
        ("რატომ", "other"),
        ("Use print(x) 吗", "Latin"),
        ("12:30 — ?!", "no letters"),
        ("", "no letters"),
    ],
)
def test_the_script_of_most_letters(text: str, script: str):
    assert script_of([text]) == script


def test_quantiles_are_nearest_ranks():
    # Of 1, 2, …, 100: the ⌈p⌉-th.
    assert quantiles(dict.fromkeys(range(1, 101), 1)) == {
        "p5": 5,
        "p50": 50,
        "p95": 95,
        "p99": 99,
        "max": 100,
        "n": 100,
    }
    # Ranks ⌈.05·3⌉ = 1, ⌈.5·3⌉ = 2, ⌈.95·3⌉ = 3.
    assert quantiles({4: 2, 9: 1}) == {"p5": 4, "p50": 4, "p95": 9, "p99": 9, "max": 9, "n": 3}
    assert quantiles({7: 1}) == {"p5": 7, "p50": 7, "p95": 7, "p99": 7, "max": 7, "n": 1}


@given(values=st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_quantiles_of_counts_are_those_of_the_values(values: list[int]):
    counts = {v: values.count(v) for v in sorted(set(values))}
    found = quantiles(counts)
    for p in (5, 50, 95, 99):
        assert found[f"p{p}"] == np.percentile(values, p, method="inverted_cdf")
    assert (found["max"], found["n"]) == (max(values), len(values))


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), max_size=20),
    cut=st.integers(0, 20),
)
def test_the_counts_of_shards_add_up_however_rows_are_cut_into_shards(lengths: list[Any], cut: int):
    parts = [to_table(measure_tokens(tokenized(*part))) for part in (lengths[:cut], lengths[cut:])]
    assert all(part.schema.equals(MEASURES) for part in parts)
    assert merge(parts) == merge([to_table(measure_tokens(tokenized(*lengths)))]) == measure_tokens(tokenized(*lengths))


def test_a_report_by_hand():
    found = reported(
        to_table(measure_tokens(tokenized((10, 4, 2), (10, 3, 3)))),
        to_table(measure_tokens(tokenized((20, 1, 5), (20, 9, 3), split="eval"))),
        to_table(measure_pairs(texts(("Why?", "Because.", "No."), ("Почему?", "Да", "Нет"), ("How?", "So.", "No.")))),
        ingested={"read": 9, "kept": 7, "null_field": 2},
        left_out={"read": 7, "kept": 5, "duplicate": 2},
        tokenized={"read": 7, "kept": 4, "duplicate": 2, "prompt_too_long": 1, "boundary_merge": 3},
    )
    assert (found["pairs"], found["read"], found["splits"]) == (4, 9, {"eval": 2, "train": 2})
    assert (found["quarantined"], found["left_out"]) == ({"null_field": 2}, {"duplicate": 2})
    assert (found["dropped"], found["noted"]) == ({"prompt_too_long": 1}, {"boundary_merge": 3})
    assert found["tokens"]["prompt"] == {"p5": 10, "p50": 10, "p95": 20, "p99": 20, "max": 20, "n": 4}
    assert found["tokens"]["chosen"] == {"p5": 1, "p50": 3, "p95": 9, "p99": 9, "max": 9, "n": 4}
    # 60 tokens of prompts, 17 of chosen and 13 of rejected answers.
    assert found["prompt_token_share"] == 60 / 90
    shown = found["token_histograms"]
    assert {name: sum(of) for name, of in shown["counts"].items()} == {n: q["n"] for n, q in found["tokens"].items()}
    assert {k: found["chosen_longer"][k] for k in ("value", "n", "tie")} == {"value": 2 / 3, "n": 3, "tie": 1}
    assert list(found["scripts"].items()) == [("Latin", 2), ("Cyrillic", 1)]
    assert "reference_prefers_chosen" not in found


def test_the_formats_of_the_files_are_told():
    tally = Tally.of({"read": 1, "kept": 1})
    found = report(merge([]), ingested=None, left_out=None, tokenized=tally, formats={"hh_rlhf": 2, "paired": 1})
    assert found["formats"] == {"hh_rlhf": 2, "paired": 1}
    assert "files by format: hh_rlhf 2, paired 1" in report_lines(found)
    assert "formats" not in reported()


def test_what_the_reference_prefers_is_a_share_with_its_interval():
    rows = scored(*[([-1.0], [-2.0])] * 3, ([-2.0], [-1.0]), ([-1.0], [-1.0]))
    found = reported(to_table(measure_reference(rows)))["reference_prefers_chosen"]
    for by in ("sum", "mean"):
        assert (found[by]["value"], found[by]["n"], found[by]["tie"]) == (0.75, 4, 1)
        assert found[by]["low"] < 0.75 < found[by]["high"]


def test_what_was_not_measured_is_absent():
    found = reported(to_table(measure_tokens(tokenized((2, 3, 0), (2, 0, 4)))), kept=2)
    assert not {"read", "quarantined", "left_out", "chosen_longer", "reference_prefers_chosen"} & set(found)
    assert found["scripts"] == {} and found["tokens"]["chosen"]["n"] == 1
    only_desirable = reported(to_table(measure_tokens(tokenized((2, 3, 0)))), kept=1)
    assert set(only_desirable["tokens"]) == {"prompt", "chosen"}
    nothing = reported(to_table(measure_tokens(tokenized())), kept=0)
    assert nothing["tokens"] == {} and not {"prompt_token_share", "token_histograms"} & nothing.keys()


def test_the_log_says_it_in_lines():
    found = reported(
        to_table(measure_tokens(tokenized((10, 4, 2), (10, 3, 3)))),
        to_table(measure_reference(scored(([-1.0], [-2.0])))),
        ingested={"read": 3, "kept": 2, "null_field": 1},
        left_out={"read": 2, "kept": 2},
        kept=2,
    )
    lines = report_lines(found)
    assert lines[:2] == ["2 pairs: train 2", "quarantined: null_field 1"]
    assert "tokens of prompt: p5 10, p50 10, p95 10, p99 10, max 10, n 2" in lines
    assert "62.5% of the tokens are prompts'" in lines
    assert any(line.startswith("the chosen answer is the longer one in 1.000 [") for line in lines)
    assert sum(line.startswith("the reference prefers chosen, by the ") for line in lines) == 2


def test_a_shard_is_measured_by_what_it_is_and_without_the_rows_left_out(tmp_path: Path):
    def measured(table: pa.Table, what: What, rows: Rows | None = None) -> pa.Table:
        location = Location.of(tmp_path) / f"{what}.parquet"
        write_shard(location, table, {})
        return MeasureShard()(MeasuredShard(what, PairsShard(location.uri, left_out(rows) if rows else None))).table

    pairs = texts(("Why?", "Because.", "No."), ("Почему?", "Да", "Нет"))
    assert measured(pairs, "pairs", {"duplicate": [0]}).to_pylist() == [
        {"measure": "script/Cyrillic", "value": 0, "count": 1}
    ]
    tokens, scores = tokenized((3, 2, 2)), scored(([-1.0], [-2.0]))
    assert measured(tokens, "tokens").equals(to_table(measure_tokens(tokens)))
    assert measured(scores, "reference").equals(to_table(measure_reference(scores)))
