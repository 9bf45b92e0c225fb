"""The model of benchmarks/scaling.py: its parts stand in the tables that it names, and its tables in its report."""

from __future__ import annotations

import math

import pytest

from benchmarks import scaling
from benchmarks.record import ROOT
from benchmarks.scaling import BEGIN, END, NODES, PARTS, REPORT, SIZES, WORDS, Time, part, stages, tables


@pytest.mark.parametrize("name", [name for name, one in PARTS.items() if one.quote is not None])
def test_what_is_called_measured_stands_in_its_table_under_its_date(name: str):
    one = PARTS[name]
    file, _, day = one.source.partition(", ")
    assert one.quote is not None
    before, found, _ = (ROOT / "benchmarks" / file).read_text().partition(one.quote)
    assert found
    # Dates are headings, and the figure is below its own.
    dates = [line for line in before.splitlines() if line.startswith("## ")]
    assert dates[-1].startswith(f"## {day}")


def test_the_report_has_the_tables_that_the_script_prints():
    text = REPORT.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == tables()


def test_what_saturates_is_explained():
    text = REPORT.read_text()
    names = {stages()[stage](rows, nodes).first for stage in stages() for rows in SIZES for nodes in NODES}
    assert names <= WORDS.keys()
    assert all(f"| {name} | {words} |" in text for name, words in WORDS.items())


def test_a_stage_takes_the_slowest_of_what_goes_on_at_once_and_what_is_done_alone():
    time = Time({"cpu": 3.0, "net": 2.0}, {"drv": 1.0, "hist": 4.0})
    assert time.seconds == 8 and time.first == "hist"


def test_one_node_is_the_measured_rate_of_its_cores_and_shards_bound_what_more_can_do():
    [ingest] = [time for name, time in stages().items() if name == "ingest"]
    alone = ingest(10**9, 1)
    assert alone.first == "cpu" and alone.seconds == pytest.approx(10**9 / (600_423 / 47 / 2 * 8), rel=0.01)
    few = ingest(10**6, 256)
    assert few.first == "few" and few.beside["few"] == pytest.approx(10**6 / (600_423 / 47 / 2) / 21)


def test_more_nodes_than_pairs_in_a_step_are_of_no_use():
    train = scaling.train(scaling.large())
    most = int(part("batch") / part("gpus"))
    assert train(10**9, most).seconds == train(10**9, 4 * most).seconds
    assert math.isclose(train(10**6, most).beside["feed"], 10**6 * part("block") / part("steps_per_group"))
