"""`dpo-ray data`: what files are taken for, and pairs as the model sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from dpo_ray.data.rules import REASONS
from dpo_ray.errors import ConfigError, DataError
from pipelines.cli import app
from pipelines.preview.render import CLOSES, OPENS

TRANSCRIPT = "\n\nHuman: Why {}?\n\nAssistant: {}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of transcripts with a null and a row that is too long, and one of labels."""
    data = tmp_path / "data"
    data.mkdir()
    rows: list[dict[str, Any]] = [
        {"chosen": TRANSCRIPT.format(n, "So."), "rejected": TRANSCRIPT.format(n, "No."), "id": n} for n in range(4)
    ]
    rows[1]["chosen"] = None
    rows[2] = {side: TRANSCRIPT.format("on" * 900, side) for side in ("chosen", "rejected")}
    for name in ("a.jsonl", "b.jsonl"):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    single = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}], "label": True}
    ]
    (data / "c.json").write_text(json.dumps(single))
    return data


def said(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["data", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_folder_is_shown_by_format_with_what_is_dropped(folder: Path):
    text = said(str(folder / "*")).stdout
    assert f"{folder}/a.jsonl, {folder}/b.jsonl\n  format    hh_rlhf: chosen and rejected as transcripts" in text
    assert "columns   read: chosen, rejected; not read: id" in text
    assert "rows      all 8: 6 pairs, 2 rows dropped" in text
    assert f"dropped   null_field 2: a field, a role or a content is null; the first: row 2 of {folder}/a.jsonl" in text
    assert f"  user: Why 0?\n  chosen: {OPENS}So.{CLOSES}\n  rejected: {OPENS}No.{CLOSES}" in text
    assert "format    kto_messages: " in text and "-o 'train.loss={type: kto}'" in text
    assert f"  user: Who?\n  chosen: {OPENS}Me.{CLOSES}\n\nWithout a model no chat template" in text
    assert "[…" in text  # of the long prompt


def test_with_a_model_pairs_are_shown_as_its_template_writes_them_with_the_loss_marked(folder: Path, tiny_model: Path):
    text = said(str(folder / "a.jsonl"), "-o", f"model.path={tiny_model}", "-o", "data.max_prompt_tokens=100").stdout
    assert "rows      all 4: 2 pairs, 2 rows dropped" in text
    assert "dropped   prompt_too_long 1: the prompt is over data.max_prompt_tokens" in text
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [{"role": "user", "content": "Why 0?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = f"{prompt}{OPENS}So.<|im_end|>{CLOSES}"
    assert whole in "\n".join(line.removeprefix("    ") for line in text.splitlines())
    assert "with loss:" in text and "Without a model" not in text


def test_a_program_is_told_the_same(folder: Path, tiny_model: Path):
    options = ["-o", f"model.path={tiny_model}", "-o", "data.max_prompt_tokens=100", "--examples", "1"]
    [sheet] = json.loads(said(str(folder), *options, "--json").stdout)  # without c.json: there are other files
    assert (sheet["format"], sheet["layout"], sheet["rows"], sheet["pairs"]) == ("hh_rlhf", "paired", 8, 4)
    assert sheet["dropped"] == {"null_field": 2, "prompt_too_long": 2} and set(sheet["first"]) <= set(REASONS)
    [example] = sheet["examples"]
    assert example["messages"]["chosen"] == "So."
    prompt, answer = example["sequences"]["chosen"]
    assert not prompt["loss"] and answer["loss"] and answer["text"] == "So.<|im_end|>"
    assert answer["tokens"] == len(AutoTokenizer.from_pretrained(tiny_model)(answer["text"])["input_ids"])


def test_so_many_rows_are_looked_through_and_all_on_request(folder: Path):
    text = said(str(folder), "--rows", "5", "--examples", "0").stdout
    assert "rows      the first 5: 4 pairs, 1 rows dropped" in text and "pair 1" not in text
    assert "rows      all 8:" in said(str(folder), "--all", "--rows", "5").stdout
    assert "rows      all 4:" in said(str(folder / "a.jsonl"), "--rows", "4").stdout


def test_a_configuration_is_looked_at_by_its_own_options(folder: Path, tiny_model: Path, tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"run: {{name: n, output: {tmp_path}/out}}\nmodel: {{path: {tiny_model}}}\n"
        f"data: {{train: {folder}/a.jsonl, eval: {folder}/b.jsonl, layout: hh_rlhf}}\n"
    )
    [sheet] = json.loads(said(str(config), "--json").stdout)
    assert (sheet["format"], sheet["rows"], len(sheet["files"])) == ("hh_rlhf", 8, 2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no column completion"):
        said(str(config), "-o", "data.layout=unpaired")


def test_of_a_source_the_rows_are_shown_that_a_run_takes(folder: Path, tiny_model: Path, tmp_path: Path):
    row = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
    for name, count in (("many", 30), ("few", 5)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * count)
    sources = [
        {"name": "one", "path": [str(tmp_path / "few.jsonl"), str(tmp_path / "many.jsonl")], "max_rows": 12},
        {"name": "two", "path": str(folder / "a.jsonl"), "max_rows": 1},
    ]
    config = tmp_path / "mixed.yaml"
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": str(tiny_model)}, "data": {"train": sources}}
    config.write_text(json.dumps(tree))
    transcripts, plain = json.loads(said(str(config), "--json", "--all").stdout)
    assert (transcripts["format"], transcripts["rows"]) == ("hh_rlhf", 1)
    assert (plain["format"], plain["rows"], plain["is_all"]) == ("paired", 12, True)


def test_rows_that_are_joined_are_not_counted_by_max_rows(tmp_path: Path, tiny_model: Path):
    rows = [{"prompt": "Why?", "response": f"So {n}.", "helpfulness": n} for n in range(2)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "one", "path": str(tmp_path / "answers.jsonl"), "weight": 1.0}
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": str(tiny_model)}}
    config = tmp_path / "answers.yaml"
    config.write_text(json.dumps({**tree, "data": {"train": [source]}}))
    [sheet] = json.loads(said(str(config), "--json").stdout)
    assert sheet["format"] == "helpsteer"
    config.write_text(json.dumps({**tree, "data": {"train": [{**source, "max_rows": 1}]}}))
    with pytest.raises(ConfigError, match=r"data\.train\[one\]: max_rows=1 counts rows, and .* leave max_rows out"):
        said(str(config))


def test_what_cannot_be_shown_says_why(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no file is there"):
        said(str(tmp_path / "nowhere"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="not a single row"):
        said(str(tmp_path / "empty.jsonl"))
    sources = f"[{{name: a, path: {folder}/a.jsonl}}, {{name: b, path: {tmp_path}/empty.jsonl}}]"
    with pytest.raises(DataError, match=r"data\.train\[b\] names 1 readable files, but not a single row"):
        said(str(folder / "a.jsonl"), "-o", f"data.train={sources}")
    with pytest.raises(ConfigError, match=r"data\.pairing is for ranked rows .* these are hh_rlhf"):
        said(str(folder / "a.jsonl"), "-o", "data.pairing.pairs_per_prompt=2")
    (tmp_path / "g.yaml").write_text("run: {name: n, output: o}\nmodel: {path: m}\ngenerate: {prompts: p.jsonl}\n")
    with pytest.raises(ConfigError, match=r"g\.yaml makes its pairs with `generate`"):
        said(str(tmp_path / "g.yaml"))
