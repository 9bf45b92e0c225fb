"""Rows and tokens: of what is tokenized already exactly, else by a sample of the source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_ray.config import Config
from dpo_ray.storage.artifact import Artifact, Unfinished
from dpo_ray.storage.finished import only_finished
from dpo_ray.storage.location import Location
from dpo_ray.training.flops import ModelShape, total_flops
from dpo_ray.training.index import PlanIndex, index_of, write_index

_AT_ONCE = 1 << 20  # pairs


@dataclass(frozen=True)
class Side:
    """The pairs of one side of the split, or a sample of them."""

    lengths: np.ndarray
    """[n, 3] tokens of prompt, chosen and rejected."""
    each: float = 1.0
    """How many pairs each of them stands for."""

    @property
    def pairs(self) -> float:
        return len(self.lengths) * self.each

    @property
    def tokens(self) -> float:
        """As training counts them: a prompt once for each of its completions."""
        return self.each * sum(
            float(part.sum() + (part[:, 0] * ((part[:, 1] > 0) & (part[:, 2] > 0))).sum()) for part in self._parts()
        )

    @property
    def tokens_once(self) -> float:
        """A prompt counted once, as it is computed on the packed layout."""
        return self.each * sum(float(part.sum()) for part in self._parts())

    @property
    def longest(self) -> int:
        """Tokens of a prompt and both completions, at most; of a sample, the longest in it."""
        return max((int(part.sum(axis=1).max()) for part in self._parts()), default=0)

    def flops(self, shape: ModelShape) -> float:
        """Forward and backward over each pair once."""
        return self.each * sum(total_flops(shape, part) for part in self._parts())

    def _parts(self) -> Iterator[np.ndarray]:
        for begin in range(0, len(self.lengths), _AT_ONCE):
            yield np.asarray(self.lengths[begin : begin + _AT_ONCE], dtype=np.int64)


@dataclass(frozen=True)
class Counts:
    """What a run computes with."""

    read: float
    """Rows of the source, bad ones and duplicates included."""
    train: Side
    held_out: Side
    exact: bool
    how: str
    """Where the numbers come from, for a person."""
    index: PlanIndex | None = None
    """Of all the pairs to train on, where they are counted exactly."""


def exact(config: Config, rows: Artifact) -> Counts:
    """Of tokenized pairs, with or without reference scores."""
    output = Location.of(config.run.output)
    try:
        with only_finished(claims=False):
            train, held_out = index_of(output, rows)
    except Unfinished:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-plan-") as folder:
            sources = write_index(Location.of(folder), rows.shards()).metrics["sources"]
            train, held_out = (_loaded(Path(folder), split, rows, sources) for split in ("train", "eval"))
    read = rows.manifest.counters.get("read", rows.manifest.rows or 0)
    how = f"counted on all {rows.manifest.rows} rows of {rows.location}"
    return Counts(read, Side(train.lengths), Side(held_out.lengths), True, how, train)


def _loaded(folder: Path, split: str, rows: Artifact, sources: list[str]) -> PlanIndex:
    """One side of an index that lies in a folder of this process's own."""
    arrays = [np.load(folder / f"{split}-{name}.npy") for name in ("offsets", "row", "lengths", "source")]
    offsets, row, lengths, source = arrays
    shards, read = [shard.uri for shard in rows.shards()], rows.manifest.rows or 0
    return PlanIndex.of(shards, offsets, row, lengths, read, source=source, sources=sources)
