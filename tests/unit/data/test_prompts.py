"""Files of prompts: read as text or messages, split, each once; what is wrong is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.data.prompts import prompt_table, read_prompts
from dpo_ray.errors import DataError
from dpo_ray.pairs import PROMPTS, prompt_id, split_of
from tests.unit.data.raw.test_files import not_utf8


def question(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)


def prompts_file(folder: Path, content: bytes, name: str = "prompts.jsonl") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_prompts_are_read_as_text_or_messages_and_once(tmp_path: Path):
    lines = [
        {"prompt": "Why?"},
        {"prompt": [{"role": "user", "content": "Why?"}]},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "more": 1},
    ]
    content = b"\n" + b"\r\n".join(json.dumps(line).encode() for line in lines) + b"\n\n"
    sides = read_prompts(prompts_file(tmp_path, content), 0.0, 0)
    assert sides["eval"] == []
    assert [row["prompt"] for row in sides["train"]] == [list(question("Why?")), lines[2]["prompt"]]
    assert sides["train"][0]["prompt_id"] == prompt_id(list(question("Why?")))
    assert prompt_table(sides["train"]).schema.equals(PROMPTS)


def test_prompts_are_split_by_their_hash(tmp_path: Path):
    content = b"\n".join(json.dumps({"prompt": f"Question {i}?"}).encode() for i in range(40))
    sides = read_prompts(prompts_file(tmp_path, content), 0.5, 3)
    assert len(sides["train"]) + len(sides["eval"]) == 40
    for side, rows in sides.items():
        assert rows and all(row["split"] == side == split_of(row["prompt_id"], 0.5, 3) for row in rows)


def test_prompts_are_read_from_parquet_and_from_packages(tmp_path: Path):
    pq.write_table(pa.table({"prompt": ["Why?", "How?"]}), tmp_path / "p.parquet")
    assert len(read_prompts(str(tmp_path / "p.parquet"), 0.0, 0)["train"]) == 2
    demo = read_prompts("package://pipelines/configs/demo_prompts.jsonl", 0.25, 0)
    assert len(demo["train"]) > len(demo["eval"]) > 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON .*Mend it: each line is"),
        (b'{"prompt": "a"}\n\n\xff\xfe', "line 3 is not JSON"),
        (b'{"prompt": "a"}\n{"text": "b"}', r"row 2: not a prompt \(null_field\)"),
        (b'["a"]', r"row 1: not a prompt \(null_field\)"),
        (b'{"prompt": 3}', r"row 1: not a prompt \(non_string_content\)"),
        (b'{"prompt": ""}', r"row 1: not a prompt \(empty_prompt\)"),
        (b'{"prompt": [{"role": "assistant", "content": "x"}]}', r"row 1: not a prompt \(role_order\)"),
        (b'{"prompt": "\\ud800"}', r"row 1: not a prompt \(invalid_unicode\)"),
        (b"", "there is no prompt in it"),
        (b"\n \n", "there is no prompt in it"),
    ],
)
def test_a_bad_prompt_is_an_error_that_names_file_and_line(tmp_path: Path, content: bytes, said: str):
    with pytest.raises(DataError, match=rf"prompts\.jsonl.*{said}"):
        read_prompts(prompts_file(tmp_path, content), 0.0, 0)


def test_a_missing_prompts_file_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"generate\.prompts is .*none\.jsonl"):
        read_prompts(str(tmp_path / "none.jsonl"), 0.0, 0)
    with pytest.raises(DataError, match=r"generate\.prompts is "):
        read_prompts(str(tmp_path), 0.0, 0)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"no parquet"),
        lambda path: pq.write_table(pa.table({"text": ["a"]}), path),
        lambda path: pq.write_table(pa.table({"prompt": not_utf8(pa.string())}), path),
    ],
    ids=["not parquet", "no column prompt", "not utf-8"],
)
def test_a_bad_parquet_file_of_prompts_is_an_error_that_names_it(tmp_path: Path, write: Callable[[Path], None]):
    write(tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet"):
        read_prompts(str(tmp_path / "p.parquet"), 0.0, 0)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path):
    content = b"\xef\xbb\xbf" + b'{"prompt": "Why?"}\r\n{"prompt": "How?"}\r\n'
    assert len(read_prompts(prompts_file(tmp_path, content), 0.0, 0)["train"]) == 2
