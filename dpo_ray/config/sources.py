"""Where preference data come from: paths, or a mixture of named sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from dpo_ray.config.section import Section


def _check_paths(value: Any) -> Any:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{value!r} is no path; name a file, a folder or a glob, or a list of these")
    return value


_Path = Annotated[str, Field(min_length=1)]
Paths = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_check_paths, json_schema_input_type=_Path | Annotated[tuple[_Path, ...], Field(min_length=1)]),
]


class DataSource(Section):
    """One of several sources that are mixed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What it is called where figures are told by source: letters, digits, dot, dash, underscore."""
    path: Paths
    """Its files: a file, a folder or a glob, local or a URI, or a list of these."""
    weight: float | None = Field(None, gt=0.0)
    """Its share of the pairs of each step, against the weights of the others. Left out, as it must then be for all:
    each pair comes once an epoch, so that sources have shares by their sizes."""
    max_rows: int | None = Field(None, ge=1)
    """Only its first so many rows, in the order of its files."""


def _is_mixture(value: Any) -> str:
    named = isinstance(value, list | tuple) and any(isinstance(one, dict | DataSource) for one in value)
    return "~sources" if named else "~paths"


_Mixture = Annotated[tuple[DataSource, ...], Field(min_length=1), Tag("~sources")]
TrainData = Annotated[Annotated[Paths, Tag("~paths")] | _Mixture, Discriminator(_is_mixture)]
"""data.train. The tags begin with a sign that no key has: pydantic puts them into the place of an error."""


def require_a_mixture(sources: Sequence[DataSource]) -> None:
    """Raises ValueError where sources contradict each other."""
    if twice := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise ValueError(f"data.train has two sources called {twice[0]}: figures are told by name, so name each apart")
    paths = Counter(path for source in sources for path in _paths(source))
    if both := [path for path, count in paths.items() if count > 1]:
        raise ValueError(
            f"data.train names {both[0]} twice, and a pair that comes again is left out as a duplicate: name it in one "
            "source, and give that a larger weight if it is to count more"
        )
    unweighted = [source.name for source in sources if source.weight is None]
    if unweighted and len(unweighted) < len(sources):
        raise ValueError(
            f"data.train gives weights to some sources, but none to {unweighted[0]}: give each a weight, or leave them "
            "all out for shares by size"
        )


def _paths(source: DataSource) -> Sequence[str]:
    return [source.path] if isinstance(source.path, str) else source.path
