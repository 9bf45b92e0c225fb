"""The commands of README.md and docs/ are the program's commands; tests/documented.py says which is tried how."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from dpo_ray.data.seen_rows import SEEN_ROWS, write_seen_rows
from dpo_ray.storage.lineage import PolicyLineage, ShardLineage, SourceFile, StartModel, ids_file, write_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import CARD, move
from pipelines.cli import app
from tests.documented import COMMANDS, PAGES, README, TRIED, beginning, blocks, commands, told, tried
from tests.shard_stages import age, stage
from tests.unit.cluster.manifests import parse

ROOT = Path(__file__).parents[2]
DRAFTED = "run.yaml"
"""What `dpo-ray init` writes."""


def test_every_command_is_tried_or_an_exception_with_its_reason():
    assert len(commands(README)) > 10 and len(COMMANDS) > 50
    for command in COMMANDS:
        tried(command)
    for one in TRIED:
        assert beginning(one.begins), f"{one.begins}: no page has such a command any more"
        if one.how == "exception":
            assert " " in one.where
        else:
            assert (ROOT / one.where).is_file()
    print(told())


@pytest.mark.parametrize("command", beginning("make "))
def test_make_targets_exist(command):
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


def _draft(folder: Path, model: Path) -> list[str]:
    """Writes the data and the model that `dpo-ray init` names, and returns its words."""
    [command] = beginning("dpo-ray init ")
    words = shlex.split(command)[1:]
    rows = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(20)]
    (folder / words[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = folder / words[words.index("--model") + 1]
    named.parent.mkdir(parents=True)
    named.symlink_to(model)
    return words


def test_a_configuration_is_written_as_it_says(monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, _draft(tmp_path, tiny_model))
    assert result.exit_code == 0 and (tmp_path / DRAFTED).is_file(), result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if tried(c).how == "dry run"])
def test_a_run_is_planned_as_it_says(command, monkeypatch, tmp_path, tiny_model):
    words = shlex.split(command)[1:]
    monkeypatch.chdir(ROOT)
    if words[1] == DRAFTED:
        monkeypatch.chdir(tmp_path)
        assert CliRunner().invoke(app, _draft(tmp_path, tiny_model)).exit_code == 0
    result = CliRunner().invoke(app, [*words, *([] if "--dry-run" in words else ["--dry-run"])])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", beginning("dpo-ray submit ", "dpo-ray doctor ", "dpo-ray plan ", "dpo-ray job "))
def test_what_needs_a_cluster_or_looks_at_the_machine_is_accepted(command: str):
    # Carried out in tests/on_ray/test_submit.py and tests/unit/pipelines.
    parse(shlex.split(command))
    file = shlex.split(command)[2]
    assert not file.endswith(".yaml") or file == DRAFTED or (ROOT / file).is_file()


def test_what_would_be_no_command_is_refused():
    for wrong in ("dpo-ray submit x.yaml --adress http://a", "dpo-ray job end a-1", "dpo-ray plan"):
        with pytest.raises(Exception, match=r"."):
            parse(shlex.split(wrong))
    with pytest.raises(LookupError, match=r"tests/documented.py"):
        tried("dpo-rai run x.yaml")


@pytest.mark.parametrize("command", beginning("python -m "))
def test_python_modules_run_as_it_says(command: str):
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_line_of_cron_runs_a_command():
    lines = [
        line for page in PAGES for block in blocks(page, "text") for line in block.splitlines() if "dpo-ray" in line
    ]
    nightly = [line for line in lines if re.match(r"[\d*/, -]+ +cd ", line)]
    assert len(nightly) == 2
    for line in nightly:
        parse(["dpo-ray", *shlex.split(line.partition("bin/dpo-ray ")[2].partition(" >> ")[0])])


def test_the_preview_of_data_is_what_is_printed(monkeypatch, tmp_path):
    [shown] = [block for page in PAGES for block in blocks(page, "text") if block.startswith("my_pairs.jsonl\n")]
    monkeypatch.chdir(tmp_path)
    dialogue = "\n\nHuman: Why is the sky blue?\n\nAssistant:"
    rows = [
        {"chosen": f"{dialogue} Air scatters blue light most.", "rejected": f"{dialogue} No idea."},
        {"chosen": None, "rejected": f"{dialogue} No."},
    ]
    Path("my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["data", "my_pairs.jsonl"])
    assert shown.strip() in result.output.replace(f"{tmp_path}/", "")


def test_commands_in_the_text_exist():
    found = {name for page in PAGES for name in re.findall(r"`dpo-ray ([a-z-]+)[ `]", page.read_text(encoding="utf-8"))}
    assert len(found) > 8
    for name in found:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, name


@pytest.mark.parametrize("command", beginning("dpo-ray data "))
def test_data_are_shown_as_it_says(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    Path(words[1]).write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n')
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "format    paired" in result.output, result.output


@pytest.mark.parametrize("command", beginning("dpo-ray schema"))
def test_the_schema_is_printed_as_it_says(command):
    result = CliRunner().invoke(app, shlex.split(command.partition(" > ")[0])[1:])
    assert result.exit_code == 0 and "train" in json.loads(result.output)["properties"]


@pytest.mark.parametrize("command", beginning("dpo-ray import-config "))
def test_a_configuration_of_others_is_read_as_it_says(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.partition(" > ")[0])[1:]
    Path(words[1]).write_text("model_name_or_path: m\ndataset_name: owner/pairs\nper_device_train_batch_size: 8\n")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "global_batch_size: 32" in result.output, result.output


@pytest.mark.parametrize("command", beginning("dpo-ray gc "))
def test_garbage_is_collected_as_it_says(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    artifact, _ = stage(Location.of(words[1]), [1, 2])
    age(tmp_path, 40)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert artifact.shards()[0].exists() != ("--delete" in words)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs that are asked, where a run has published a model made from a file of a partition."""
    folder = tmp_path_factory.mktemp("readme")
    for name in {shlex.split(command)[2] for command in beginning("dpo-ray show ", "dpo-ray lineage ")}:
        _published(Location.of(folder / name))
    return folder


def _published(place: Location) -> None:
    summary = {"run_id": "r", "exit_code": 0, "stages": {}, "published": "p/v", "reasons": []}
    (place / "runs/r/summary.json").write_bytes(json.dumps(summary).encode())
    (place / "models/aligned/v" / CARD).write_bytes(b"card")
    move(place / "models/aligned", "v", action="publish", why="it passed its gate", run_id="r")
    shard = ShardLineage(pairs="p.parquet", rows="t.parquet", source=0, read=1, trained=1, held_out=0)
    ids = pa.table({"pair": [0x2CFFB58E0B76C737], "row": [0], "held_out": [False]}, schema=SEEN_ROWS)
    for kind, name in (("pairs", shard.pairs), ("tokenized", shard.rows)):
        write_seen_rows(ids, ids_file(place, kind, name))
    write_policy(
        place,
        PolicyLineage(
            policy="v",
            run_id="r",
            model=StartModel(weights="w", path="m"),
            rows_kind="tokenized",
            sources=[SourceFile(uri="/data/date=2026-11-01/a.parquet", key="data.train", sha256="s")],
            artifacts=[],
            shards=[shard],
        ),
    )


@pytest.mark.parametrize("command", beginning("dpo-ray show ", "dpo-ray lineage "))
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["words", "json"])
def test_what_is_asked_of_an_output_folder_is_answered(command: str, as_json: list[str], output: Path, monkeypatch):
    monkeypatch.chdir(output)
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *as_json])
    assert result.exit_code == 0, result.output
    assert "aligned" in result.output and ("trained" in result.output or " show " in command)
    assert not as_json or json.loads(result.output)


@pytest.mark.parametrize("command", beginning("dpo-ray watch "))
def test_how_a_run_stands_is_shown(command: str, output: Path, monkeypatch):
    monkeypatch.chdir(output)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert "r" in result.output.split()
