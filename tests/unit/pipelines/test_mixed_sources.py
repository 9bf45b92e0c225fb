"""Runs over a mixture of sources, without Ray: what comes from where, which duplicate stays, and figures by source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.config import parse_config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.storage.artifact import open_artifact, read_shard
from dpo_ray.storage.location import Location
from pipelines.ingest import check_inputs, sides
from tests.command_line import summary_of
from tests.whole_run import Job, number_rows, word_model

MATH, CHAT, SAFETY = number_rows(0, 40), number_rows(100, 60), number_rows(200, 20)


def sources(folder: Path, **more: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the three files, with weights."""
    weights = {"math": 0.5, "chat": 0.3, "safety": 0.2}
    return [
        {"name": name, "path": f"{folder}/data/{name}.jsonl", "weight": weight, **more.get(name, {})}
        for name, weight in weights.items()
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    return word_model(tmp_path_factory.mktemp("words") / "model", small_model)


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    """Two pairs of math stand in chat too, and one of chat in safety."""
    job = Job(tmp_path, model)
    job.write("math.jsonl", MATH)
    job.write("chat.jsonl", [*MATH[:2], *CHAT])
    job.write("safety.jsonl", [CHAT[0], *SAFETY])
    job.configure(data={"train": sources(tmp_path)}, evaluate={"sets": {}})
    return job


def rows_of(job: Job, stage: str) -> list[dict[str, Any]]:
    fingerprint = summary_of(job.output)["stages"][stage]["fingerprint"]
    kind = {"ingest": "pairs", "tokenize": "tokenized"}.get(stage, stage)
    artifact = open_artifact(Location.of(job.output) / "artifacts" / kind / fingerprint)
    return pa.concat_tables([read_shard(shard) for shard in artifact.shards()]).to_pylist()


def test_each_row_has_its_source_and_of_duplicates_that_of_the_first_one_stays(job: Job):
    done = job.run(command="tokenize")
    assert done.code == 0, done.log
    pairs = rows_of(job, "ingest")
    assert [sum(row["source"] == name for row in pairs) for name in ("math", "chat", "safety")] == [40, 62, 21]
    kept = rows_of(job, "tokenize")
    assert [sum(row["source"] == name for row in kept) for name in ("math", "chat", "safety")] == [40, 60, 20]
    told = summary_of(job.output)["data"]
    assert told["left_out"] == {"duplicate": 3}
    assert sum(told["sources"].values()) == 120
    # A part of each source is held out, by the hash of the prompt.
    assert all(told["sources"][f"{name}/eval"] > 0 for name in ("math", "chat", "safety"))
    assert done.lines("sources: chat/eval"), done.log


def test_the_order_of_the_list_is_the_priority(job: Job, tmp_path: Path):
    job.configure(data={"train": sources(tmp_path)[::-1]})
    assert job.run(command="tokenize").code == 0
    kept = rows_of(job, "tokenize")
    assert [sum(row["source"] == name for row in kept) for name in ("math", "chat", "safety")] == [38, 61, 21]


def test_held_out_accuracy_is_told_by_source_in_summary_and_report(job: Job):
    done = job.run()
    assert done.code == 0, done.log
    summary = summary_of(job.output)
    by_source = summary["eval"]["sources"]
    held_out = summary["data"]["sources"]
    assert list(by_source) == ["chat", "math", "safety"]
    for name, told in by_source.items():
        assert told["accuracy"]["n"] == held_out[f"{name}/eval"]
        assert done.lines(f"held-out accuracy of source {name} ")
    assert summary["eval"]["accuracy"]["n"] == sum(told["accuracy"]["n"] for told in by_source.values())
    [report] = job.output.glob("runs/*/report.html")
    assert "By source</caption>" in report.read_text() and '<th scope="row">safety</th>' in report.read_text()
    assert {file["key"] for file in lineage(job)} == {f"data.train[{name}]" for name in ("math", "chat", "safety")}


def lineage(job: Job) -> list[dict[str, Any]]:
    [record] = (job.output / "lineage/policies").glob("*.json")
    found: list[dict[str, Any]] = json.loads(record.read_text())["sources"]
    return found


def test_other_weights_have_another_policy_of_the_same_rows(job: Job, tmp_path: Path):
    assert job.run(command="train").code == 0
    first = summary_of(job.output)["stages"]
    job.configure(data={"train": sources(tmp_path, math={"weight": 5})})
    assert job.run(command="train").code == 0
    second = summary_of(job.output)["stages"]
    assert {name for name, stage in second.items() if not stage["reused"]} == {"train"}
    assert first["train"]["fingerprint"] != second["train"]["fingerprint"]


@pytest.mark.parametrize("limit", [1, 10, 25, 40, 99])
def test_of_a_source_its_first_rows_can_be_taken_alone(job: Job, tmp_path: Path, limit: int):
    job.configure(data={"train": sources(tmp_path, chat={"max_rows": limit})})
    assert job.run(command="ingest").code == 0
    prompts = [row["prompt"][0]["content"] for row in rows_of(job, "ingest") if row["source"] == "chat"]
    assert prompts == [row["prompt"] for row in [*MATH[:2], *CHAT][:limit]]


def check(train: Any, loss: dict[str, Any] | None = None, **data: Any) -> None:
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": train, **data}}
    check_inputs(parse_config({**tree, "train": {"loss": loss or {"type": "sigmoid"}}}))


def test_sources_that_cannot_be_meant_fail_at_the_start(job: Job, tmp_path: Path):
    check(sources(tmp_path))
    with pytest.raises(DataError, match=r"data\.train\[math\] is .*nothing\.jsonl, and no file is there"):
        check(sources(tmp_path, math={"path": str(tmp_path / "nothing.jsonl")}))
    job.write("empty.jsonl", [])
    with pytest.raises(DataError, match=r"data\.train\[math\] names 1 readable files, but not a single row is in them"):
        check(sources(tmp_path, math={"path": f"{tmp_path}/data/empty.jsonl"}))
    with pytest.raises(DataError, match=r"math\.jsonl is a file of data\.train\[math\] and of data\.train\[chat\]"):
        check(sources(tmp_path, chat={"path": f"{tmp_path}/data/[cm]*.jsonl"}))


def test_what_the_data_say_of_pairs_and_the_loss_does_not_use_fails_at_the_start(job: Job, tmp_path: Path):
    file = str(job.write("judged.jsonl", [{**row, "gap": 0.5, "weight": 2} for row in MATH]))
    check(file, columns={"margin": "gap"})
    with pytest.raises(DataError, match=r"has a margin for each pair, and train\.loss\.type=hinge does not use it"):
        check(file, {"type": "hinge"}, columns={"margin": "gap"})
    check(file, {"type": "hinge"})  # nobody has said what a gap is
    with pytest.raises(DataError, match=r"has a weight for each pair, and train\.loss\.type=aot does not"):
        check(file, {"type": "aot"})
    check(file, {"type": "aot"}, ignore=["weight"])
    with pytest.raises(DataError, match="has both a margin and a preference"):
        check(file, columns={"margin": "gap", "preference": "weight"}, ignore=[])
    with pytest.raises(
        ConfigError, match=r"data\.ties=keep makes pairs with a preference of \.5, which train\.loss\.type"
    ):
        check(file, {"type": "hinge"}, ties="keep")
    with pytest.raises(ConfigError, match=r"data\.columns\.margin=gap names a column that data\.ignore leaves aside"):
        check(file, columns={"margin": "gap"}, ignore=["margin"])


def test_judgements_go_from_the_file_to_the_tokenized_rows(job: Job, tmp_path: Path):
    rows = [{**row, "weight": 2, "p": 0.25 if n % 2 else 0.5} for n, row in enumerate(MATH)]
    job.write("judged.jsonl", rows)
    data = {"train": f"{tmp_path}/data/judged.jsonl", "columns": {"preference": "p"}, "max_quarantined_fraction": 0.5}
    job.configure(data=data)
    assert job.run(command="tokenize").code == 0
    kept = rows_of(job, "tokenize")
    assert {(row["source"], row["weight"], row["margin"], row["preference"]) for row in kept} == {(None, 2, None, 0.75)}
    assert len(kept) == 20 and summary_of(job.output)["data"]["quarantined"] == {"tie": 20}
    job.configure(data={**data, "ties": "keep", "ignore": ["weight"]})
    assert job.run(command="tokenize").code == 0
    kept = rows_of(job, "tokenize")
    assert len(kept) == 40 and {row["preference"] for row in kept} == {0.5, 0.75}
    assert summary_of(job.output)["data"]["judged"] == {"preference": 40}


def test_held_out_ties_are_no_part_of_the_accuracy(job: Job, tmp_path: Path):
    rows = [{**row, "preference": 0.9 if n % 2 else 0.5} for n, row in enumerate([*MATH, *CHAT])]
    job.write("judged.jsonl", rows)
    job.configure(data={"train": f"{tmp_path}/data/judged.jsonl", "ties": "keep"})
    assert (done := job.run()).code == 0, done.log
    held_out = [row for row in rows_of(job, "tokenize") if row["split"] == "eval"]
    apart = sum(row["preference"] == 0.9 for row in held_out)
    assert summary_of(job.output)["eval"]["accuracy"]["n"] == apart < len(held_out)


def test_the_plan_of_a_run_names_the_sources_and_their_shares(job: Job, tmp_path: Path):
    done = job.run("--dry-run")
    assert done.code == 0, done.log
    assert f"pairs of math ({tmp_path}/data/math.jsonl, 50%) and chat ({tmp_path}/data/chat.jsonl, 30%)" in done.log


def test_a_plain_path_is_one_side_as_ever(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": str(tmp_path)}}
    [side] = sides(parse_config(tree))
    assert side == ("data.train", [Location.of(tmp_path / "a.jsonl")], None, None, None)
