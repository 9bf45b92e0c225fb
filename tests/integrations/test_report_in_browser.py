"""The report's pages as people have them: three widths, light and dark, with and without scripts, by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dpo_ray.report.document import Document
from dpo_ray.report.page import html_page
from dpo_ray.report.run import run_document
from tests.reports import before, config_of, facts_of, nothing_done, summary_of_a_run
from tests.unit.report.test_run import ROUNDS
from tests.unit.tuning.sweeps import GRID, LOSSES, TWO, grid_trials, random_trials
from tests.unit.tuning.test_report import page as sweep_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed: make test-browser has it"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
]

LARGE, SMALL = 3.0, 4.5  # least contrast of WCAG 2.2, level AA, of large and of other text

CONTRASTS = """
() => {
  const parsed = (colour) => {
    const found = colour.match(/rgba?\\(([^)]+)\\)/);
    if (!found) return null;
    const [r, g, b, a = 1] = found[1].split(/[ ,/]+/).map(Number);
    return { rgb: [r, g, b], a };
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = parsed(getComputedStyle(at).backgroundColor);
      if (found && found.a > 0.99) return found.rgb;
    }
    return [255, 255, 255];
  };
  const behind = (text) => {
    const box = text.getBoundingClientRect();
    for (const element of document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2)) {
      if (element instanceof SVGElement && !["text", "tspan", "svg", "g", "line"].includes(element.tagName)) {
        const style = getComputedStyle(element);
        const fill = parsed(style.fill);
        const opacity = Number(style.opacity) * Number(style.fillOpacity);
        if (fill && fill.a > 0.99 && opacity > 0.99) return fill.rgb;
      }
    }
    return ground(text.closest("svg").parentElement);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const element = node.parentElement;
    if (!node.textContent.trim() || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    if (!element.checkVisibility() || element.closest(".skip, .hidden, title")) continue;
    const style = getComputedStyle(element);
    const inDrawing = element.closest("svg");
    const colour = parsed(inDrawing ? style.fill : style.color);
    if (!colour || (inDrawing && Number(style.opacity) === 0) || (inDrawing && style.stroke !== "none")) continue;
    const back = inDrawing ? behind(element) : ground(element);
    const [high, low] = [luminance(colour.rgb), luminance(back)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    found.push({ text: node.textContent.trim().slice(0, 40), ratio: (high + 0.05) / (low + 0.05), isLarge });
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with everything, one that failed at once, rounds, and three sweeps."""
    sweeps = {"grid": (GRID, grid_trials()), "losses": (LOSSES, random_trials(LOSSES, 40))}
    sweeps["front"] = (TWO, random_trials(TWO, 24))
    facts = facts_of()
    failed = facts_of(nothing_done(), config=config_of())
    documents: dict[str, Document] = {
        "run": run_document(facts),
        "failed": run_document(type(failed)(failed.config, failed.given, failed.summary, before=before())),
        "rounds": run_document(facts_of(summary_of_a_run() | {"rounds": ROUNDS})),
        **{
            name: Document(name, "Published", "good", [], [], sections=sweep_page(config, trials))
            for name, (config, trials) in sweeps.items()
        },
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, document in documents.items():
        (folder / f"{name}.html").write_text(html_page(document))
    return {name: folder / f"{name}.html" for name in documents}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """opened(path, width, scheme) is the page, with what went wrong on it as `wrong`; nothing may be fetched."""
    contexts: list[BrowserContext] = []

    def open_page(path: Path, width: int = 1440, scheme: Any = "light", **options: Any) -> tuple[Page, list[str]]:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


def width_of(page: Page) -> tuple[int, int]:
    """Of what the page would take, and of what there is."""
    found = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    return found[0], found[1]


def with_all_in_view(page: Page, width: int) -> None:
    """So that every chart comes alive."""
    for _ in range(2):  # live charts may be of another height
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": width, "height": min(height, 30_000)})
        page.wait_for_function("!document.querySelector('.plot > svg')", timeout=60_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 360])
@pytest.mark.parametrize("name", ["run", "failed", "rounds", "grid", "losses", "front"])
def test_a_page_is_whole_and_readable(pages: dict[str, Path], opened: Any, name: str, width: int, scheme: str):
    page, wrong = opened(pages[name], width, scheme)
    assert width_of(page)[0] <= width
    with_all_in_view(page, width)
    assert width_of(page)[0] <= width
    charts = page.locator(".plot").count()
    assert page.locator(".plot .live svg").count() == charts and (charts > 3) == (name != "failed")
    if name == "run":
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
        assert width_of(page)[0] <= width
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = false })")
    texts = page.evaluate(CONTRASTS)
    assert len(texts) > 15
    dim = [one for one in texts if one["ratio"] < (LARGE if one["isLarge"] else SMALL)]
    assert dim == []
    assert wrong == []


@pytest.mark.parametrize("rule", [".note { color: #999 !important }", ".plot svg text { fill: #999 !important }"])
def test_text_that_is_too_dim_is_found(pages: dict[str, Path], opened: Any, rule: str):
    page, _ = opened(pages["run"])
    with_all_in_view(page, 1440)
    page.add_style_tag(content=rule)
    assert len([one for one in page.evaluate(CONTRASTS) if one["ratio"] < SMALL]) > 5


@pytest.mark.parametrize("width", [1440, 320])
@pytest.mark.parametrize("name", ["run", "front"])
def test_without_scripts_every_chart_is_drawn_and_every_answer_is_there(
    pages: dict[str, Path], opened: Any, name: str, width: int
):
    page, wrong = opened(pages[name], width, java_script_enabled=False)
    drawings = page.locator(".plot > svg")
    assert drawings.count() == page.locator(".plot").count() > 3
    for n in range(drawings.count()):
        box = drawings.nth(n).bounding_box()
        assert box is not None and 200 < box["width"] <= width and box["height"] > 60
    if name == "run":
        rows = page.locator(".samples tbody tr")
        assert rows.count() == 60 and all(rows.nth(n).is_visible() for n in range(60))
        assert page.locator(".filters").is_hidden()
    boxes = [page.locator(kind).first.bounding_box() for kind in ("header", "main", "nav")]
    assert all(box is not None and box["x"] + box["width"] <= width for box in boxes)
    assert wrong == []


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim()"))


def shown(page: Page) -> list[str]:
    """Outcomes of the answers that are shown."""
    rows = page.locator(".samples tbody tr:not([hidden])")
    found: list[str] = rows.evaluate_all("all => all.map(row => row.dataset.outcome)")
    return found


def test_answers_are_filtered_by_keyboard(pages: dict[str, Path], opened: Any):
    page, wrong = opened(pages["run"])
    page.keyboard.press("Tab")
    assert focused(page) == "To the content"
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page).startswith("all 60"):
            break
    assert len(shown(page)) == 10 and page.locator(".filters [role=status]").text_content() == "10 of 60 shown"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "lost 20"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Space")
    assert outline == "solid" and set(shown(page)) == {"lost"} and len(shown(page)) == 10
    pressed = page.locator("[aria-pressed=true]").all_text_contents()
    assert pressed == ["lost 20"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert set(shown(page)) == {"tied"}
    page.keyboard.press("Tab")
    page.keyboard.type("Question 11?")
    assert page.locator(".filters [role=status]").text_content() == "1 of 1 shown"
    assert wrong == []


def test_more_answers_are_shown_until_there_are_no_more(pages: dict[str, Path], opened: Any):
    page, _ = opened(pages["run"])
    for count in range(20, 70, 10):
        page.locator(".more").click()
        assert len(shown(page)) == count
    assert page.locator(".more").is_hidden()


def test_values_are_told_under_the_pointer(pages: dict[str, Path], opened: Any):
    page, wrong = opened(pages["run"])
    plot = page.locator(".chart", has_text="What is minimised").locator(".plot")
    plot.scroll_into_view_if_needed()
    plot.locator(".live svg").wait_for()
    box = plot.bounding_box()
    assert box is not None
    tooltip = page.locator("#vg-tooltip-element.visible")
    for share in (0.5, 0.52, 0.54):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        page.wait_for_timeout(100)
    tooltip.wait_for(timeout=5000)
    said = tooltip.text_content() or ""
    assert "step" in said and "smoothed" in said and "held out" in said
    assert wrong == []


def test_text_of_others_runs_nothing(pages: dict[str, Path], opened: Any):
    page, wrong = opened(pages["run"])
    asked: list[str] = []
    page.on("dialog", lambda dialog: asked.append(dialog.message))
    page.reload()
    page.locator(".more").click()
    assert page.locator("img").count() == 0 and asked == [] and wrong == []
    assert "<img src=x onerror=alert(2)>" in (page.locator(".samples tbody").text_content() or "")
