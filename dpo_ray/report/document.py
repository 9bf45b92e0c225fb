"""What a report says, before anything is known of how it looks: a first screen, and sections of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Tone = Literal["plain", "good", "bad", "warning"]


@dataclass(frozen=True)
class Paragraph:
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    code: frozenset[int] = frozenset()
    """Columns of paths, options and the like."""
    is_folded: bool = False
    """It is opened by who wants it."""


@dataclass(frozen=True)
class Chart:
    """A plot, and the figures in it as a table."""

    title: str
    says: str
    """How to read it, for those who see it and those who do not."""
    spec: Mapping[str, Any]
    """Vega-Lite, without size and without theme."""
    table: Table


@dataclass(frozen=True)
class Node:
    name: str
    label: str
    note: str = ""
    kind: Literal["given", "made", "end"] = "made"


@dataclass(frozen=True)
class Graph:
    """What was made of what."""

    nodes: Sequence[Node]
    arrows: Sequence[tuple[str, str]]
    """Names, from and to."""


@dataclass(frozen=True)
class Code:
    text: str
    caption: str = ""
    is_folded: bool = False


@dataclass(frozen=True)
class Links:
    links: Sequence[tuple[str, str]]
    """Text and address, relative to the report."""


Outcome = Literal["won", "lost", "tied"]


@dataclass(frozen=True)
class Sample:
    """The answers of two models to a held-out prompt."""

    prompt: str
    before: str
    after: str
    outcome: Outcome | None
    """Of the tuned model; None where the judge compares no single answers."""
    note: str = ""


@dataclass(frozen=True)
class Samples:
    samples: Sequence[Sample]
    other: str
    """What the other model is called."""

    def count(self, outcome: Outcome) -> int:
        return sum(one.outcome == outcome for one in self.samples)


Block = Paragraph | Table | Chart | Graph | Code | Links | Samples


@dataclass(frozen=True)
class Section:
    name: str
    """Its anchor."""
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Figure:
    """A figure of the first screen."""

    label: str
    value: str
    interval: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Document:
    title: str
    verdict: str
    """In a few words."""
    tone: Tone
    why: Sequence[str]
    figures: Sequence[Figure]
    facts: Sequence[tuple[str, str]] = ()
    """What it is a report on: label and value."""
    changes: Sequence[Block] = ()
    """Since the model that was published before."""
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def charts(self) -> list[Chart]:
        """In the order of the page."""
        blocks = [*self.changes, *(block for section in self.sections for block in section.blocks)]
        return [block for block in blocks if isinstance(block, Chart)]
