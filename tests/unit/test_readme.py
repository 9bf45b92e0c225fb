"""The README's commands are the program's commands, and its file map is the tree."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from dpo_ray.data.seen_rows import SEEN_ROWS, write_seen_rows
from dpo_ray.formats.registry import formats
from dpo_ray.storage.lineage import PolicyLineage, ShardLineage, SourceFile, StartModel, ids_file, write_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import CARD, move
from pipelines.cli import app
from tests.shard_stages import age, stage
from tests.unit.cluster.manifests import parse

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("    #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_the_readme_has_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("dpo-ray") and ".yaml" in c and "import-config" not in c]
)
def test_dpo_ray_commands_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[0] == "submit":  # what it ships and runs is tried on a real head in tests/on_ray/test_submit.py
        words = ["submit", "--help"]
    elif words[0] in {"doctor", "plan"}:  # what they find is tried in tests/unit/pipelines
        words.append("--help")
    elif "--dry-run" not in words:
        words.append("--dry-run")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray data ")])
def test_data_are_shown_as_it_says(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    Path(words[1]).write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n')
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "format    paired" in result.output, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray schema")])
def test_the_schema_is_printed_as_it_says(command):
    result = CliRunner().invoke(app, shlex.split(command.partition(" > ")[0])[1:])
    assert result.exit_code == 0 and "train" in json.loads(result.output)["properties"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray init ")])
def test_a_configuration_is_written_as_it_says(command, monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    rows = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(20)]
    Path(words[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Path(words[words.index("--model") + 1])
    model.parent.mkdir(parents=True)
    model.symlink_to(tiny_model)
    for asked in (words, ["run", "run.yaml", "--dry-run"]):
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray import-config ")])
def test_a_configuration_of_others_is_read_as_it_says(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.partition(" > ")[0])[1:]
    Path(words[1]).write_text("model_name_or_path: m\ndataset_name: owner/pairs\nper_device_train_batch_size: 8\n")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "global_batch_size: 32" in result.output, result.output


def test_every_format_is_in_the_table():
    table = README.partition("| format | columns |")[2].partition("\n\n")[0]
    told = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert {*told, "pku_saferlhf_safer"} == set(formats())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray gc ")])
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
    """A folder with out/align, where a run has published a model that was made from a file of a partition."""
    folder = tmp_path_factory.mktemp("readme")
    place = Location.of(folder / "out/align")
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
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("dpo-ray show ", "dpo-ray lineage "))])
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["words", "json"])
def test_what_is_asked_of_an_output_folder_is_answered(command: str, as_json: list[str], output: Path, monkeypatch):
    monkeypatch.chdir(output)
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *as_json])
    assert result.exit_code == 0, result.output
    assert "aligned" in result.output and ("trained" in result.output or " show " in command)
    assert not as_json or json.loads(result.output)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dpo-ray job ")])
def test_commands_on_jobs_are_accepted(command: str):  # and carried out in tests/on_ray/test_submit.py
    parse(shlex.split(command))


def test_no_command_goes_untried():
    # ray job submit in tests/on_ray/test_submit.py, the last three in tests/unit/cluster/test_commands.py, and
    # completion in tests/unit/pipelines/test_completion.py
    tried = ("make ", "dpo-ray ", "ray job submit ", "kubectl ", "ray up ", "sbatch ")
    assert [c for c in COMMANDS if not c.startswith(tried)] == []


def test_the_file_map_names_what_exists():
    file_map = README.partition("## File map")[2].partition("\n## ")[0]
    paths = re.findall(r"^\| (`[^|]+`) \|", file_map, re.M)
    assert len(paths) > 10
    for cell in paths:
        names = re.findall(r"`([^`]+)`", cell)
        folder = Path(names[0]).parent
        for name in names:
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
