"""A sample of the source, brought through ingest and tokenization here, in one process and without Ray."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_ray.config import Config
from dpo_ray.data.chat import ChatTokenizer
from dpo_ray.data.duplicates import PairsShard
from dpo_ray.data.prompts import read_prompts
from dpo_ray.data.raw.arrow import arrow_batches
from dpo_ray.data.raw.files import Stamp, encoding_of, in_lines, open_lines
from dpo_ray.data.raw.json_lines import is_blank, raw_lines
from dpo_ray.data.raw.parquet import open_parquet
from dpo_ray.data.raw.parts import Part, RawPart
from dpo_ray.data.raw.scan import peek
from dpo_ray.errors import DataError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import LENGTHS
from dpo_ray.shards.ingest import RawShard
from dpo_ray.shards.tokenize import TokenizeShard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from pipelines.ingest import Side, ingest_shard, sides, written_as
from pipelines.plan.counts import Counts
from pipelines.plan.counts import Side as Counted

_FILES = 64  # that a sample is drawn from, at most
_PIECES = 8  # places in a file that rows are taken from


@dataclass(frozen=True)
class _Drawn:
    """Rows of one file."""

    sources: list[RawPart]
    rows: int
    of: float
    """Rows of the whole file; of plain JSON lines by the length of those that were drawn."""


def sample(config: Config, rows: int) -> Counts:
    """Rows and tokens of data.train and data.eval by so many of their rows, drawn at places that are the same each
    time. Duplicates over the files, and rows whose prompts are on both sides, are not seen.

    Raises DataError where no row of the sample is kept.
    """
    dice = random.Random(0)
    found: dict[str, list[np.ndarray]] = {"train": [], "eval": []}
    each: dict[str, list[float]] = {"train": [], "eval": []}
    read, seen, num_files = 0.0, 0, 0
    tokenize = TokenizeShard(config.model, config.data)
    drawn_of = {one.key: _some(one.files, dice) for one in sides(config)}
    of_all = _shares(sides(config), drawn_of)
    with tempfile.TemporaryDirectory(prefix="dpo-ray-plan-") as scratch:
        for key, files, split, source_name, max_rows in sides(config):
            drawn_files = drawn_of[key]
            num_files += len(files)
            before = {side: len(each[side]) for side in each}
            of_side = 0.0
            sizes = {file: Stamp.of(file).size for file in drawn_files}
            for number, file in enumerate(drawn_files):
                # So each row of the sample stands for as many of the source.
                share = max(1, round(rows * of_all[key] * sizes[file] / max(1, sum(sizes.values()))))
                format_ = written_as(peek(file), str(file), config.data)
                if format_ is None:
                    continue
                folder = Path(scratch) / f"{key}-{number}"
                drawn = _draw(file, share, dice, folder)
                if not drawn.rows:
                    continue
                stands_for = drawn.of / drawn.rows * len(files) / len(drawn_files)
                of_side += drawn.of * len(files) / len(drawn_files)
                seen += drawn.rows
                for n, source in enumerate(drawn.sources):
                    pairs = ingest_shard(config)(RawShard(source, format_.name, split, source=source_name)).table
                    place = Location.of(folder / f"pairs-{n}.parquet")
                    write_shard(place, pairs, {})
                    table = tokenize(PairsShard(place.uri)).table
                    for side in found:
                        kept = table.filter(pc.equal(table["split"], side))
                        lengths = np.stack([kept[name].to_numpy() for name in LENGTHS], axis=1)
                        found[side].append(lengths.astype(np.int64))
                        each[side] += [stands_for] * len(lengths)
            taken = min(1.0, max_rows / of_side) if max_rows is not None and of_side else 1.0
            read += taken * of_side
            for side, first in before.items():
                each[side][first:] = [taken * stands_for for stands_for in each[side][first:]]
    if not each["train"]:
        raise DataError(
            f"Of a sample of {seen} rows none is kept to train on, so nothing can be counted. Run `dpo-ray tokenize`, "
            "which names the reasons, or sample more rows (--sample)."
        )
    counted = {
        side: Counted(np.concatenate(parts), sum(each[side]) / max(1, len(each[side]))) for side, parts in found.items()
    }
    how = (
        f"estimated from {seen} rows of {num_files} files, drawn at random places; duplicates are not seen "
        "(--exact tokenizes all rows)"
    )
    return Counts(read, counted["train"], counted["eval"], False, how)


def _some(files: list[Location], dice: random.Random) -> list[Location]:
    return files if len(files) <= _FILES else dice.sample(files, _FILES)


def _shares(found: list[Side], drawn_of: dict[str, list[Location]]) -> dict[str, float]:
    """Key → the share of its bytes in those of the data that are read for the same: of a mixture, in all sources'."""
    size = {
        one.key: sum(Stamp.of(file).size for file in drawn_of[one.key]) * len(one.files) / len(drawn_of[one.key])
        for one in found
    }
    together = {one.key: sum(size[other.key] for other in found if other.split == one.split) for one in found}
    return {key: size[key] / max(1.0, together[key]) for key in size}


def of_prompts(config: Config, rows: int) -> Counts:
    """Of a configuration with `generate`: the prompts are counted and a sample of them tokenized; completions and pairs
    are as many, and as long, as they can be at most."""
    options = config.generate
    assert options is not None
    chat = ChatTokenizer(ModelFolder.of(config.model).tokenizer(), config.model.template_arguments)
    by_side = read_prompts(options.prompts, config.data.held_out_fraction, config.run.seed, options.system_prompt)
    longest = min(options.sampling.max_tokens, config.data.max_completion_tokens)
    pairs_each = options.pairing.pairs_per_prompt
    counted, seen = {}, 0
    for side, prompts in by_side.items():
        drawn = prompts if len(prompts) <= rows else random.Random(0).sample(prompts, rows)
        seen += len(drawn)
        lengths = [len(prompt.ids) for prompt in chat.prompts([(row["prompt"], None) for row in drawn])]
        kept = [n for n in lengths if n <= config.data.max_prompt_tokens]
        each = len(prompts) / max(1, len(drawn)) * pairs_each
        counted[side] = Counted(np.array([(n, longest, longest) for n in kept], dtype=np.int64).reshape(-1, 3), each)
    total = sum(map(len, by_side.values()))
    how = (
        f"{total} prompts are counted, {seen} of them tokenized; at most {pairs_each} pairs of each, and completions "
        f"of up to {longest} tokens (generate.sampling.max_tokens): an upper bound"
    )
    return Counts(float(total), counted["train"], counted["eval"], False, how)


def _draw(file: Location, count: int, dice: random.Random, folder: Path) -> _Drawn:
    """About `count` rows of a file."""
    folder.mkdir(parents=True)
    form = encoding_of(file.uri)
    if form.kind == "parquet":
        with open_parquet(file) as parquet:
            total = parquet.metadata.num_rows
        parts = _places(total, count, dice)
        return _Drawn([RawPart(file.uri, Part(first, rows)) for first, rows in parts], sum(r for _, r in parts), total)
    if form.kind == "arrow":
        return _of_arrow(file, count, dice, folder / "rows.parquet")
    target = folder / "lines.jsonl"
    if form.codec is not None or in_lines(file) != "lines":
        lines, total = _reservoir(file, count, dice)
    else:
        lines, total = _at_places(file, count, dice)
    target.write_bytes(b"".join(line + b"\n" for line in lines))
    return _Drawn([RawPart(str(target))] if lines else [], len(lines), total)


def _places(total: int, count: int, dice: random.Random) -> list[tuple[int, int]]:
    """First row and number of rows of pieces that do not overlap; all rows where there are no more than asked for."""
    if total <= count:
        return [(0, total)] if total else []
    size = max(1, count // _PIECES)
    starts = sorted(dice.sample(range(total // size), min(_PIECES, total // size)))
    return [(start * size, size) for start in starts]


def _of_arrow(file: Location, count: int, dice: random.Random, target: Path) -> _Drawn:
    """Pieces of an Arrow file, which is read to its end, as a file of their own."""
    total = sum(batch.num_rows for _, batch in arrow_batches(file))
    places = _places(total, count, dice)
    drawn = [
        batch.slice(max(0, first - start), min(first + rows, start + batch.num_rows) - max(first, start))
        for start, batch in arrow_batches(file)
        for first, rows in places
        if first < start + batch.num_rows and first + rows > start
    ]
    if not drawn:
        return _Drawn([], 0, total)
    table = pa.Table.from_batches(drawn)
    pq.write_table(table, target)
    return _Drawn([RawPart(str(target))], table.num_rows, total)


def _reservoir(file: Location, count: int, dice: random.Random) -> tuple[list[bytes], float]:
    """Rows of a file that is read to its end, each as likely as any other; and how many it has."""
    kept: list[bytes] = []
    total = 0
    with open_lines(file) as lines:
        for row in _rows(lines):
            line = row.replace(b"\n", b" ")  # between the parts of an array's element
            total += 1
            if len(kept) < count:
                kept.append(line)
            elif (place := dice.randrange(total)) < count:
                kept[place] = line
    return kept, total


def _at_places(file: Location, count: int, dice: random.Random) -> tuple[list[bytes], float]:
    """Lines of a plain file at some places in it, and how many the whole file has, by their length."""
    size = Stamp.of(file).size
    fs, path = file.filesystem()
    kept: list[bytes] = []
    taken = 0
    with fs.open_input_file(path) as stream:
        first = list(itertools.islice(raw_lines(stream), count))
        if len(first) < count:
            return list(_rows(iter(first))), sum(not is_blank(line) for line, _ in first)
        per_piece = max(1, count // _PIECES)
        span = sum(n for _, n in first) // len(first) * per_piece
        for start in sorted(dice.randrange(max(1, size - 2 * span)) for _ in range(_PIECES)):
            stream.seek(start)
            lines = raw_lines(stream)
            if start:
                next(lines)  # the end of one that began before
            for line, num_bytes in itertools.islice(lines, per_piece):
                taken += num_bytes
                kept += [] if is_blank(line) else [line]
    return kept, size * len(kept) / max(1, taken)


def _rows(lines: Iterator[tuple[bytes, int]]) -> Iterator[bytes]:
    return (line for line, _ in lines if not is_blank(line))
