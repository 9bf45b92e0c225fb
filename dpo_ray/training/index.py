"""The index of the rows that are trained on: where each pair lies and how long it is, without its tokens.

An artifact of NumPy files, 16 bytes a pair. Whoever plans opens them memory-mapped, so that no process holds more of
them than it looks at.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config.losses import Judged
from dpo_ray.model.cache import held
from dpo_ray.pairs import CARRIED, JUDGED, LENGTHS, Split, steers
from dpo_ray.storage.artifact import (
    Artifact,
    Contents,
    FileEntry,
    describe_file,
    digest,
    make,
    open_artifact,
    read_shard,
)
from dpo_ray.storage.claim import CLAIM, Claim, kept_fresh
from dpo_ray.storage.location import Location

KIND = "index"
_VERSION = 3
_ARRAYS = {"offsets": np.int64, "row": np.int32, "lengths": np.int32, "source": np.int16}
_READERS = 8  # files that are waited for at once
_SHARDS_AHEAD = 64


@dataclass(frozen=True)
class Facts:
    """What is asked of all pairs of an index, so that nobody need look at each of them for it."""

    num_pairs: int
    num_unpaired: int
    """Rows that lack a side: no loss that compares two answers can learn from them."""
    tokens: tuple[int, int, int]
    """Over all pairs: of prompts, chosen and rejected completions."""
    longest: int | None
    """The pair with the most tokens, the first of equals; None: there is no pair."""
    longest_tokens: int
    """Of its prompt and both completions."""
    widest: int | None
    """The pair with the most tokens where each completion is a row with its prompt, padded; the first of equals."""
    widest_tokens: int
    judged: tuple[int, int, int] = (0, 0, 0)
    """Pairs with a weight, with a margin and with a preference of their own."""

    @classmethod
    def of(cls, lengths: np.ndarray, before: Facts | None = None, judged: Sequence[int] = (0, 0, 0)) -> Facts:
        """Of some pairs [n, 3], and of all pairs before them. judged: of these pairs, as the facts have it."""
        before = before or cls(0, 0, (0, 0, 0), None, 0, None, 0)
        if not len(lengths):
            return before
        longest, longest_tokens = _most(
            lengths.sum(axis=1, dtype=np.int64), before.num_pairs, before.longest, before.longest_tokens
        )
        completions = lengths[:, 1:]
        width = lengths[:, 0].astype(np.int64) + completions.max(axis=1)
        widest, widest_tokens = _most(
            width * (completions > 0).sum(axis=1), before.num_pairs, before.widest, before.widest_tokens
        )
        prompt, chosen, rejected = (
            int(a + b) for a, b in zip(before.tokens, lengths.sum(axis=0, dtype=np.int64), strict=True)
        )
        weighted, with_margin, with_preference = (a + b for a, b in zip(before.judged, judged, strict=True))
        return cls(
            num_pairs=before.num_pairs + len(lengths),
            num_unpaired=before.num_unpaired + int((lengths[:, 1:] == 0).any(axis=1).sum()),
            tokens=(prompt, chosen, rejected),
            longest=longest,
            longest_tokens=longest_tokens,
            widest=widest,
            widest_tokens=widest_tokens,
            judged=(weighted, with_margin, with_preference),
        )

    @property
    def says(self) -> list[Judged]:
        """Those of the columns of how pairs were judged that say something of any pair."""
        return [name for name, count in zip(get_args(Judged), self.judged, strict=True) if count]


_NO = np.zeros(0, dtype=np.int64)


def _most(tokens: np.ndarray, first: int, before: int | None, before_tokens: int) -> tuple[int, int]:
    """The pair with the most tokens, and how many: of these [n], from the pair `first` on, and the one before."""
    place = int(tokens.argmax())
    if before is not None and tokens[place] <= before_tokens:
        return before, before_tokens
    return first + place, int(tokens[place])


@dataclass(frozen=True)
class IndexFile:
    """One side of the split in an index artifact. It travels in place of what it opens."""

    folder: Location
    """Of the index artifact."""
    rows: Location
    """Of the artifact that is indexed."""
    split: Split

    def open(self) -> PlanIndex:
        """Its arrays memory-mapped: where they lie, or from a copy on this node of what lies in an object store."""
        return _opened(self)


@dataclass(frozen=True)
class PlanIndex:
    """Where each pair of one split lies, and its token counts. n pairs, in the order of the shards: 16 bytes each."""

    shards: tuple[str, ...]
    """URIs"""
    offsets: np.ndarray
    """[shards + 1] pairs in the shards before"""
    row: np.ndarray
    """[n] row in the shard"""
    lengths: np.ndarray
    """[n, 3] tokens of prompt, chosen and rejected; 0 for a side that an unpaired row lacks"""
    read: int
    """Rows seen, of both sides."""
    facts: Facts
    source: np.ndarray
    """[shards] which of the sources the pairs of each are of, -1 of none: a shard is of one source"""
    sources: tuple[str, ...] = ()
    """Names of the sources of a mixture."""
    file: IndexFile | None = None
    """Where the arrays are memory-mapped from; None: they are in memory."""

    @classmethod
    def of(
        cls,
        shards: Sequence[str],
        offsets: np.ndarray,
        row: np.ndarray,
        lengths: np.ndarray,
        read: int,
        *,
        source: np.ndarray | None = None,
        sources: Sequence[str] = (),
    ) -> PlanIndex:
        """In memory."""
        source = np.full(len(shards), -1, dtype=np.int16) if source is None else source
        return cls(tuple(shards), offsets, row, lengths, read, Facts.of(lengths), source, tuple(sources))

    def __len__(self) -> int:
        return len(self.row)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self.file is None else {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state if state.get("row") is not None else vars(state["file"].open()))

    @property
    def num_unpaired(self) -> int:
        """Rows that lack a side."""
        return self.facts.num_unpaired

    @property
    def mean_lengths(self) -> np.ndarray:
        """[3] mean tokens of prompt, chosen and rejected."""
        return np.array(self.facts.tokens) / len(self)

    def shards_of(self, source: str) -> np.ndarray:
        """Which of the shards are of a source, ascending."""
        return np.flatnonzero(np.asarray(self.source) == self.sources.index(source)) if source in self.sources else _NO

    def pairs_of(self, shards: np.ndarray) -> np.ndarray:
        """The pairs that lie in some shards, shard by shard."""
        spans = [np.arange(self.offsets[shard], self.offsets[shard + 1]) for shard in shards]
        return np.concatenate([_NO, *spans])

    def by_source(self) -> dict[str, int]:
        """Source → its pairs."""
        counts = np.diff(self.offsets)
        return {name: int(counts[self.shards_of(name)].sum()) for name in self.sources}

    def shard_of(self, pairs: np.ndarray) -> np.ndarray:
        """Which of the shards some pairs lie in."""
        return np.searchsorted(self.offsets, pairs, side="right") - 1

    def drawn(self, count: int) -> PlanIndex:
        """Of so many pairs only, or of all if there are fewer: drawn at random, for data may be sorted, but always the
        same ones, in the order of the shards.
        """
        if count >= len(self):
            return self
        pairs = np.sort(np.random.default_rng(0).choice(len(self), count, replace=False, shuffle=False))
        lengths = np.asarray(self.lengths[pairs])
        return replace(
            self,
            offsets=np.searchsorted(pairs, self.offsets),
            row=np.asarray(self.row[pairs]),
            lengths=lengths,
            facts=Facts.of(lengths),
            file=None,
        )


def index_of(output: Location, rows: Artifact, eval_fraction: float = 1.0) -> tuple[PlanIndex, PlanIndex]:
    """The pairs to train on, and the held-out ones; their index is an artifact, made once.

    Args:
        output: the folder run.output.
        rows: tokenized pairs, with or without reference scores.
        eval_fraction: of the held-out side, only the rows of this share of the prompts: those that steer.
    """
    artifact = _made(output, rows, eval_fraction)
    train, held_out = (IndexFile(artifact.location, rows.location, split).open() for split in get_args(Split))
    return train, held_out


@contextmanager
def index_in_use(index: PlanIndex, rows: Artifact) -> Iterator[None]:
    """Have `dpo-ray gc` spare an index for as long as the block goes on: no stage that runs names it."""
    assert index.file is not None
    claimed = Claim(inputs={rows.manifest.kind: rows.fingerprint})
    with kept_fresh(index.file.folder / CLAIM, claimed.model_dump_json().encode()):
        yield


def num_judging(output: Location, rows: Artifact, eval_fraction: float) -> int:
    """Held-out pairs of the prompts that training is not steered by; of all prompts where no part of them steers."""
    metrics = _made(output, rows, eval_fraction).manifest.metrics
    steering = metrics["facts"]["eval"]["num_pairs"] if eval_fraction < 1 else 0
    return int(metrics["held_out"] - steering)


def _made(output: Location, rows: Artifact, eval_fraction: float) -> Artifact:
    # One that has lost a shard gets another in its place, in which an engine may have set other rows aside.
    shards = digest([file.name for file in rows.manifest.files if file.rows is not None])
    artifact, _ = make(
        output,
        KIND,
        {"version": _VERSION, "eval_fraction": eval_fraction, "shards": shards},
        {rows.manifest.kind: rows.fingerprint},
        lambda location: write_index(location, rows.shards(), eval_fraction),
    )
    return artifact


def write_index(location: Location, shards: Sequence[Location], eval_fraction: float = 1.0) -> Contents:
    """Read the token counts of all rows, shard by shard, and write the arrays of both sides of the split."""
    columns = ["split", *LENGTHS, *(["prompt_id"] if eval_fraction < 1 else [])]
    names: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="dpo-ray-index-") as scratch:
        sides = {split: _Side(Path(scratch), split) for split in get_args(Split)}
        read = held_out = 0
        for table in _tables(shards, columns):
            read += table.num_rows
            held_out += int(np.sum(pc.equal(table["split"], "eval").to_numpy()))
            source = _source(table)
            number = -1 if source is None else names.setdefault(source, len(names))
            for split, side in sides.items():
                side.append(table, _wanted(table, split, eval_fraction), number)
        written = [name for side in sides.values() for name in side.close()]
        for name in written:
            Location.of(f"{scratch}/{name}").copy_to(location / name)
        files = [describe_file(Location.of(f"{scratch}/{name}")) for name in written]
    facts = {split: asdict(side.facts) for split, side in sides.items()}
    metrics = {"read": read, "held_out": held_out, "facts": facts, "sources": list(names)}
    return Contents(files=files, metrics=metrics)


def _source(table: pa.Table) -> str | None:
    """The one source that the rows of a shard are of. Raises ValueError where they are of several."""
    found = table["source"].unique().to_pylist() if "source" in table.column_names else []
    if len(found) > 1:
        raise ValueError(f"the rows of one shard are of {len(found)} sources: {found}")
    return found[0] if found else None


def _wanted(table: pa.Table, split: Split, eval_fraction: float) -> np.ndarray:
    """[rows] row numbers of a side, ascending."""
    rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())
    if split == "eval" and eval_fraction < 1:
        ids = table["prompt_id"].take(pa.array(rows)).to_pylist()
        rows = rows[np.array([steers(prompt, eval_fraction) for prompt in ids], dtype=bool)]
    return rows


def _tables(shards: Sequence[Location], columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of each shard, in order; some are fetched while one is looked at."""
    waiting = iter(shards)
    with ThreadPoolExecutor(_READERS) as threads:
        while some := list(itertools.islice(waiting, _SHARDS_AHEAD)):
            yield from threads.map(lambda shard: read_shard(shard, columns, where_there=CARRIED), some)


class _Side:
    """The arrays of one side, written as they grow."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.arrays = {
            name: _Growing(folder / _file_name(split, name), dtype, (len(LENGTHS),) if name == "lengths" else ())
            for name, dtype in _ARRAYS.items()
        }
        self.facts = Facts.of(np.zeros((0, len(LENGTHS)), dtype=np.int32))
        self.arrays["offsets"].append(np.zeros(1))

    def append(self, table: pa.Table, rows: np.ndarray, source: int) -> None:
        lengths = np.stack([table[name].to_numpy()[rows] for name in LENGTHS], axis=1)
        self.facts = Facts.of(lengths, self.facts, [_said(table, name, rows) for name in JUDGED])
        values = {"offsets": [self.facts.num_pairs], "row": rows, "lengths": lengths, "source": [source]}
        for name, array in self.arrays.items():
            array.append(np.asarray(values[name]))

    def close(self) -> list[str]:
        """Names of the files."""
        return [array.close() for array in self.arrays.values()]


def _said(table: pa.Table, name: str, rows: np.ndarray) -> int:
    """How many of some rows have a value in a column."""
    if name not in table.column_names or table[name].null_count == table.num_rows:
        return 0
    return int(np.sum(pc.is_valid(table[name]).to_numpy()[rows]))


class _Growing:
    """A NumPy file whose number of rows is known at its end: its header has room for it."""

    def __init__(self, path: Path, dtype: type, width: tuple[int, ...]) -> None:
        self.path, self.dtype, self.width, self.rows = path, np.dtype(dtype), width, 0
        self.file = path.open("wb")
        self._header()
        self.begins = self.file.tell()

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.rows += len(values)

    def close(self) -> str:
        self.file.seek(0)
        self._header()
        if self.file.tell() != self.begins:
            raise ValueError(f"NumPy's header of {self.path} takes {self.file.tell()} bytes, and was {self.begins}")
        self.file.close()
        return self.path.name

    def _header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)  # type: ignore[no-untyped-call]


def _file_name(split: Split, name: str) -> str:
    return f"{split}-{name}.npy"


@lru_cache(maxsize=8)
def _opened(file: IndexFile) -> PlanIndex:
    manifest = open_artifact(file.folder).manifest
    folder = _here(file.folder, manifest.files)
    arrays = [np.load(folder / _file_name(file.split, name), mmap_mode="r") for name in _ARRAYS]
    offsets, row, lengths, source = arrays
    facts = manifest.metrics["facts"][file.split]
    return PlanIndex(
        shards=tuple(shard.uri for shard in open_artifact(file.rows).shards()),
        offsets=offsets,
        row=row,
        lengths=lengths,
        read=manifest.metrics["read"],
        facts=Facts(**{**facts, "tokens": tuple(facts["tokens"]), "judged": tuple(facts["judged"])}),
        source=source,
        sources=tuple(manifest.metrics["sources"]),
        file=file,
    )


def _here(folder: Location, files: Sequence[FileEntry]) -> Path:
    """Where these files of an artifact can be memory-mapped."""
    if folder.is_local:
        return Path(folder.uri)

    def copy(target: Path) -> None:
        for file in files:
            (folder / file.name).copy_to(Location.of(target / file.name))

    return held(f"index-{folder.name}", copy, num_bytes=sum(file.bytes for file in files))
