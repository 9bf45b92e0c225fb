"""Links of README.md and docs/ lead somewhere, their tables are whole, and the README is short."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from docs.make.pages import MADE
from dpo_ray import api, errors
from dpo_ray.formats.registry import formats
from tests.documented import BLOCK_LANGUAGES, PAGES, README, ROOT, blocks, languages

DOCS = ROOT / "docs"


def without_code(page: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`", text)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))


def anchors(page: Path) -> set[str]:
    """As GitHub has them, and the site."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: Counter[str] = Counter()
    made = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        made.add(f"{anchor}-{found[anchor]}" if found[anchor] else anchor)
        found[anchor] += 1
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_first():
    reached, ahead = set(), [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        named = [
            (page.parent / link.partition("#")[0]).resolve() for link in links(page) if not link.startswith("http")
        ]
        ahead += [one for one in named if one.suffix == ".md" and one.is_relative_to(DOCS) and one not in reached]
    assert reached == set(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path):
    assert languages(page) <= BLOCK_LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_spelled_right_and_uses_what_is_promised(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "api":
                assert node.attr in api.__all__


def test_the_readme_is_for_newcomers():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert {f"docs/{name}.md" for name in ("index", "data", "losses", "troubleshooting")} <= {
        link.partition("#")[0] for link in links(README)
    }


def test_the_file_map_names_what_exists():
    file_map = README.read_text(encoding="utf-8").partition("## File map")[2].partition("\n## ")[0]
    paths = re.findall(r"^\| (`[^|]+`) \|", file_map, re.M)
    assert len(paths) > 10
    for cell in paths:
        names = re.findall(r"`([^`]+)`", cell)
        folder = Path(names[0]).parent
        for name in names:
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name


def test_every_format_is_in_the_table():
    table = (DOCS / "data.md").read_text().partition("| format | columns |")[2].partition("\n\n")[0]
    told = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert {*told, "pku_saferlhf_safer"} == set(formats())


def test_every_exit_code_is_in_the_table():
    table = (DOCS / "results.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.DpoRayError)]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)} == {0, *(one.exit_code for one in kinds)}


def test_every_marker_is_in_the_table():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    rows = [f"| `{name}` | {about} |" for name, about in (one.split(": ", 1) for one in declared)]
    page = (DOCS / "contributing.md").read_text()
    assert [row for row in rows if row not in page] == []


def test_no_table_stands_twice():
    rows: Counter[str] = Counter()
    for page in (page for page in PAGES if page.name not in {*MADE, "configuration.md"}):
        tables = re.findall(r"^(\|.*\|\n\|[-|: ]+\|\n(?:\|.*\|\n)+)", page.read_text(encoding="utf-8"), re.M)
        rows.update(table for table in tables)
    assert [table for table, times in rows.items() if times > 1] == []
