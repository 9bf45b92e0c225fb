"""The cards of all formats, by the format's name."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.unit.formats.card import Card

CARDS: dict[str, list[Card]] = {
    path.stem.removeprefix("test_"): importlib.import_module(f"tests.unit.formats.known.{path.stem}").CARDS
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
}
