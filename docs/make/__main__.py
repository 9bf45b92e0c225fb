"""`python -m docs.make` writes the pages that are made from the code."""

from __future__ import annotations

from pathlib import Path

from docs.make.pages import MADE

for name, page in MADE.items():
    (Path(__file__).parents[1] / name).write_text(page(), encoding="utf-8")
