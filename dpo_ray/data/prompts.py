"""Files of prompts to sample for: read, canonical, on their side of the split, each once."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.data.canonical import canonical_prompt
from dpo_ray.data.rules import BadRow
from dpo_ray.errors import DataError
from dpo_ray.pairs import PROMPTS, Message, prompt_id, split_of
from dpo_ray.storage.location import Location
from dpo_ray.storage.packaged import PACKAGE, package_file


def read_prompts(
    uri: str, held_out_fraction: float, seed: int, system_prompt: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """A file of prompts (JSON lines or Parquet; columns `prompt` and, if there is one, `answer`), by side of the split,
    without duplicates.

    Args:
        system_prompt: put before prompts without a system turn of their own.

    Raises DataError naming the file and the first bad line.
    """
    location = Location.of(package_file(uri) if uri.startswith(PACKAGE) else uri)
    try:
        data = location.read_bytes()
    except (FileNotFoundError, OSError) as error:
        raise DataError(
            f"generate.prompts is {uri}, which cannot be read ({error}). Name a JSON lines or Parquet "
            "file with a `prompt` column."
        ) from error
    rows = _parquet_prompts(data, uri) if location.name.endswith(".parquet") else _json_prompts(data, uri)
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    seen = set()
    for number, row in rows:
        try:
            prompt = canonical_prompt(row.get("prompt"))
        except BadRow as error:
            raise DataError(
                f"{uri}, row {number}: not a prompt ({error.reason}). A row holds `prompt`: text, or "
                "messages that end with the user's turn."
            ) from error
        if system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [Message(role="system", content=system_prompt), *prompt]
        identifier = prompt_id(prompt)
        if identifier not in seen:
            seen.add(identifier)
            split = split_of(identifier, held_out_fraction, seed)
            answer = row.get("answer")
            if answer is not None and not isinstance(answer, str):
                answer = json.dumps(answer)  # of a number, what it is written as
            sides[split].append({"prompt_id": identifier, "split": split, "prompt": prompt, "answer": answer})
    if not seen:
        raise DataError(
            f"generate.prompts is {uri}, and there is no prompt in it. Name a file with a row for each, as in "
            '{"prompt": "Why is the sky blue?"}.'
        )
    return sides


def prompt_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of read_prompts as a shard."""
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def _json_prompts(data: bytes, uri: str) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{uri}, line {number} is not JSON ({error}). Mend it: each line is a JSON object with `prompt`."
            ) from error
        yield number, row if isinstance(row, dict) else {}


def _parquet_prompts(data: bytes, uri: str) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        yield from enumerate(pq.read_table(io.BytesIO(data)).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri} cannot be read as Parquet ({error}). Write it again, or name another file.") from error
