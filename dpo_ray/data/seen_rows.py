"""Ids of the rows of a shard, kept when the shard itself has gone: sorted, so that one id costs a part of the file."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.data.row_ids import id_numbers
from dpo_ray.storage.artifact import encoded, read_shard
from dpo_ray.storage.location import Location

SEEN_ROWS = pa.schema([("pair", pa.uint64()), ("row", pa.int64()), ("held_out", pa.bool_())])
"""pair_id as a number, the row's place in the shard, and its side of the split."""


class SeenRow(NamedTuple):
    """A row of a shard."""

    row: int
    """0-based."""
    held_out: bool


def is_pair_id(text: str) -> bool:
    """Whether it is spelled like the id of a pair."""
    return re.fullmatch("[0-9a-f]{16}", text) is not None


def seen_rows(shard: Location) -> pa.Table:
    """The ids of a shard of pairs, canonical, tokenized or scored, as SEEN_ROWS by id. Raises as read_shard does."""
    table = read_shard(shard, columns=["pair_id", "split"])
    pairs = id_numbers(table["pair_id"])
    order = np.argsort(pairs, kind="stable")
    held_out = pc.equal(table["split"], "eval").combine_chunks().take(pa.array(order))
    return pa.table({"pair": pairs[order], "row": order, "held_out": held_out}, schema=SEEN_ROWS)


def write_seen_rows(table: pa.Table, place: Location) -> None:
    """Keep the ids of a shard."""
    place.write_bytes(encoded(table, {}))


def find_in_ids(place: Location, pair_id: str) -> list[SeenRow]:
    """The rows with this id in a file of ids. Raises FileNotFoundError, and DataError where it is damaged."""
    wanted = pc.field("pair") == pa.scalar(int(pair_id, 16), pa.uint64())
    table = read_shard(_there(place), columns=["row", "held_out"], rows=wanted)
    return [SeenRow(row["row"], row["held_out"]) for row in table.to_pylist()]


def find_in_shard(shard: Location, pair_id: str) -> list[SeenRow]:
    """The same of the shard itself, of which two columns are read."""
    table = read_shard(_there(shard), columns=["pair_id", "split"])
    places = np.flatnonzero(pc.equal(table["pair_id"], pair_id).to_numpy(zero_copy_only=False))
    return [SeenRow(int(place), table["split"][int(place)].as_py() == "eval") for place in places]


def _there(place: Location) -> Location:
    """read_shard takes a file that is missing for a damaged one."""
    if not place.exists():
        raise FileNotFoundError(str(place))
    return place
