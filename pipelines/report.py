"""report.html and report.md of a run, and of each round, beside its summary."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

import yaml

from dpo_ray.errors import DataError
from dpo_ray.progress import say
from dpo_ray.report.curves import Curves, read_curves
from dpo_ray.report.facts import Before, Facts
from dpo_ray.report.page import html_page, markdown_page
from dpo_ray.report.run import run_document
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import last_other, published_folder
from dpo_ray.training.files import HISTORY
from pipelines.context import RunContext

REPORT = "report"
BEST = "best.yaml"
"""In the folder of a sweep: the configuration of the chosen trial."""


def write_report(context: RunContext, summary: dict[str, Any], name: str = REPORT) -> None:
    """Write the pages. Whatever goes wrong is said: the run has ended as it has, and an error of it comes first.

    Args:
        name: of the two files, without what tells their formats.
    """
    try:
        _write(context, summary, name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        say(
            "report",
            f"{name}.html could not be made: {type(error).__name__}: {error} ({where.filename}:{where.lineno}). The "
            f"run ended as it did without it; what it would show is in {context.folder}/summary.json",
        )


def _write(context: RunContext, summary: dict[str, Any], name: str) -> None:
    facts = Facts(
        config=context.shown.get("config", context.config),
        given=context.config,
        summary=summary,
        curves=_curves(context),
        samples=context.shown.get("samples", ()),
        before=before(context, summary),
        more=context.shown.get("more", ()),
    )
    document = run_document(facts)
    (context.folder / f"{name}.html").write_bytes(html_page(document).encode())
    (context.folder / f"{name}.md").write_bytes(markdown_page(document).encode())


def _curves(context: RunContext) -> Curves:
    metrics = context.folder / HISTORY
    return read_curves(metrics.read_bytes().splitlines()) if metrics.exists() else Curves({}, {})


def before(context: RunContext, summary: Mapping[str, Any]) -> Before | None:
    """What was published under the name before this run's model; None where nothing was, or nobody can tell."""
    folder = published_folder(context.output, context.config.run.name)
    try:
        standing = last_other(folder, (summary.get("published") or "").rpartition("/")[2])
    except DataError:  # a damaged pointer is the gate's to tell of; the report is of what is known
        return None
    if standing is None:
        return None
    run = context.output / "runs" / (standing.run_id or "")
    known = standing.run_id is not None and (run / "summary.json").exists()
    return Before(
        version=standing.version,
        since=standing.published,
        run_id=standing.run_id,
        summary=json.loads((run / "summary.json").read_bytes()) if known else {},
        options=_differences(_trained_by(run), _trained_by(context.folder)) if known else (),
    )


def _trained_by(run: Location) -> dict[str, str]:
    """Dotted path → value, of the configuration that a run's model was trained by: of a sweep the chosen trial's."""
    found = next((file for name in (BEST, "config.yaml") if (file := run / name).exists()), None)
    return dict(_flat("", yaml.safe_load(found.read_bytes()))) if found is not None else {}


def _differences(theirs: Mapping[str, str], mine: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Options that differ between two runs: dotted path, one's value, the other's."""
    paths = [*mine, *(path for path in theirs if path not in mine)]
    found = ((path, theirs.get(path, _ABSENT), mine.get(path, _ABSENT)) for path in paths)
    return [(path, a, b) for path, a, b in found if a != b] if theirs else []


_ABSENT = "–"


def _flat(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [one for key, inner in value.items() for one in _flat(f"{path}.{key}" if path else str(key), inner)]
    return [(path, json.dumps(value, ensure_ascii=False, default=str))]
