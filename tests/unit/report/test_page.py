"""The files: nothing of others' texts is markup, nothing is fetched, all is bounded."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from dpo_ray.evaluation.comparison import MOST_CHARACTERS, bounded
from dpo_ray.report.document import Code, Document, Section
from dpo_ray.report.facts import Facts
from dpo_ray.report.page import html_page, markdown_page
from dpo_ray.report.run import run_document
from tests.reports import HOSTILE, config_of, facts_of, nothing_done

VOID = {"meta", "link", "br", "img", "input"}


class Read(HTMLParser):
    """Elements and text of a page; scripts and styles apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return html_page(run_document(facts_of()))


@pytest.fixture(scope="module")
def read(page: str) -> Read:
    return Read(page)


def test_text_of_others_is_text_wherever_it_stands():
    summary = facts_of().summary | {"reasons": [HOSTILE], "command": HOSTILE, "published": f"/models/{HOSTILE}"}
    config = config_of(model={"path": HOSTILE})
    data = {**summary["data"], "formats": {HOSTILE: 1}, "sources": {HOSTILE: 3}, "quarantined": {HOSTILE: 5}}
    stages = {HOSTILE: summary["stages"]["train"], **summary["stages"]}
    read = Read(html_page(run_document(facts_of({**summary, "data": data, "stages": stages}, config=config))))
    assert len(read.of("script")) == 3 and not read.of("img")
    assert read.text.count(HOSTILE) > 8  # as it was written
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert all(isinstance(spec, dict) for spec in json.loads(read.scripts[0]))


def test_the_page_needs_nothing_from_elsewhere(read: Read):
    assert not [a for tag, a in read.elements if a.get("src")]
    assert [a["href"] for a in read.of("link")] == ["data:,"]
    addresses = [str(a.get("href")) for a in read.of("a")]
    assert all(re.match(r"#|\.\./run-0/report\.html$", address) for address in addresses), addresses


def test_who_runs_no_script_has_a_drawing_and_a_table_of_every_chart(read: Read):
    plots = [a for a in read.of("div") if a.get("class") == "plot"]
    drawings = [a for a in read.of("svg") if "marks" in str(a.get("class"))]
    assert len(plots) == len(drawings) == len(json.loads(read.scripts[0])) > 15
    assert len(read.of("summary")) >= len(plots)
    assert all(a["role"] == "img" and str(a["aria-label"]).endswith("in the table below.") for a in plots)
    assert len([a for a in read.of("tr") if "data-outcome" in a]) == 60  # none is hidden by the page itself
    assert not [a for a in read.of("tr") if "hidden" in a]


def test_no_two_parts_of_the_page_share_an_id(read: Read):
    ids = [a["id"] for _, a in read.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"]).removeprefix("#") for a in read.of("a") if str(a["href"]).startswith("#")}
    assert targets <= set(ids)


def test_headings_go_down_one_step_at_a_time(read: Read):
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= level + 1 for level, after in pairwise(levels))


def test_of_samples_that_are_not_wanted_nothing_is_in_the_files():
    facts = facts_of(config=config_of(report={"samples": 0}))
    document = run_document(Facts(facts.config, facts.given, facts.summary, facts.curves))
    for page in (html_page(document), markdown_page(document)):
        assert "Question 1?" not in page and "Short 1." not in page and "Left out: report.samples is 0." in page


def test_a_training_of_a_hundred_thousand_steps_and_the_longest_samples_stay_small():
    facts = facts_of(config=config_of(report={"samples": 200}), num_steps=100_000, num_samples=200)
    long = bounded("x" * 100_000)
    assert long.startswith("x" * MOST_CHARACTERS) and long.endswith("[… 98,000 more characters]")
    samples = [{**one, "prompt": long, "before": long, "after": long} for one in facts.samples]
    page = html_page(run_document(Facts(facts.config, facts.given, facts.summary, facts.curves, samples)))
    assert len(samples) == 200 and len(page.encode()) < 10e6
    assert "Each point stands for several of 100,000 steps" in page


def test_a_page_without_charts_has_nothing_to_draw_them_with():
    page = html_page(run_document(Facts(config_of(), config_of(), nothing_done())))
    assert "vegaEmbed=" not in page and len(page) < 40_000 and "No pairs were left." in page


def test_markdown_has_the_same_and_no_text_in_it_is_markup():
    text = markdown_page(run_document(facts_of()))
    for shown in ("# run-1", "**Published**", "| preference accuracy | 0.800 |", "## The gate", "### Loss", "won"):
        assert shown in text, shown
    assert "<script" not in text.replace("\\<", "") and "<img" not in text.replace("\\<", "")
    assert "\\&amp;" in text and "None" not in text and "Undefined" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    counts = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    dividers = [n for n, row in enumerate(rows) if set(row) <= set("| -")]
    for n, divider in enumerate(dividers):
        end = dividers[n + 1] - 1 if n + 1 < len(dividers) else len(rows)
        assert set(counts[divider - 1 : end]) == {counts[divider]}, rows[divider - 1]


def test_code_cannot_end_its_fence():
    text = markdown_page(Document("t", "v", "plain", [], [], sections=[Section("s", "S", [Code("a\n````\nb")])]))
    assert "`````\na\n````\nb\n`````" in text
