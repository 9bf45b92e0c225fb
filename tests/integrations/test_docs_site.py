"""The site of docs/ is built without a warning, its links lead somewhere, and pages fetch nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("DPO_RAY_DOCS_PYTHON")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(PYTHON is None, reason="mkdocs is in an environment of its own: make test-docs"),
]
_FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class _Page(HTMLParser):
    """What a page fetches, what it links to, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag in _FETCHED and (address := given.get(_FETCHED[tag])) and given.get("rel") not in {"next", "prev"}:
            self.fetched.append(address)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


def build(folder: Path, configuration: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    words = [str(PYTHON), "-m", "mkdocs", "build", "--strict", "-f", str(configuration), "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"WARNING|ERROR", done.stdout + done.stderr), done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page
    assert (site / "benchmarks" / "speed.html").is_file() and not (site / "make").exists()


def test_pages_fetch_nothing_from_elsewhere(site: Path, pages: dict[Path, _Page]):
    assert [(path, one) for path, page in pages.items() for one in page.fetched if urlsplit(one).netloc] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text(encoding="utf-8")), style


def test_links_lead_to_pages_and_anchors(site: Path, pages: dict[Path, _Page]):
    followed = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            anchor = unquote(parts.fragment)
            if anchor and target in pages:
                assert anchor in pages[target].anchors or anchor == "__top", f"{path.relative_to(site)}: {link}"
                followed += 1
    assert followed > 100


def test_a_link_to_nowhere_fails_the_build(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](nowhere.md)\n\n[c](#no-such-anchor)\n")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n  -")[0]
    (tmp_path / "mkdocs.yml").write_text(text.replace("hooks: [docs/make/site.py]\n", ""))
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr and "no-such-anchor" in done.stderr, done.stderr
