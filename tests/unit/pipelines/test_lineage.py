"""From a published model to its files, and from a row to the models that have seen it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import ConfigError, DataError
from dpo_ray.pairs import PreferencePair, split_of
from dpo_ray.storage.lineage import read_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import latest
from pipelines import lineage
from pipelines.gc import collect
from pipelines.ingest import FILES
from pipelines.lineage import lines, trace_back
from tests.command_line import in_process
from tests.object_store import BUCKET, object_store
from tests.shard_stages import age
from tests.whole_run import Job, number_rows, pair_id, word_model

ROWS = number_rows(0, 12)
DUPLICATE = ROWS[1]
TWISTED = {"prompt": "300", "chosen": "301", "rejected": "302"}
CONTRADICTION = {**TWISTED, "chosen": "302", "rejected": "301"}
TOO_LONG = {"prompt": "310", "chosen": " ".join(["311"] * 40), "rejected": "312"}
BAD = {"prompt": "x", "chosen": "", "rejected": ""}


def is_held_out(row: dict[str, Any]) -> bool:
    pair = PreferencePair(({"role": "user", "content": row["prompt"]},), row["chosen"], row["rejected"])
    return split_of(pair.prompt_id, 0.25, 0) == "eval"


HELD_OUT = next(row for row in ROWS if is_held_out(row))
TRAINED = next(row for row in ROWS if not is_held_out(row) and row != DUPLICATE)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Job:
    """Two nights: the second with a file more."""
    folder = tmp_path_factory.mktemp("lineage")
    data = {"max_completion_tokens": 20, "max_quarantined_fraction": 0.5}
    job = Job(folder, word_model(folder / "model", small_model), data=data)
    job.write("date=2026-11-01/a.parquet", ROWS)
    job.write("date=2026-11-01/bad.jsonl", [BAD, BAD])
    assert (first := job.run()).code == 0, first.log
    job.first = job.published()  # type: ignore[attr-defined]
    job.write("date=2026-11-02/b.jsonl", [DUPLICATE, TWISTED, CONTRADICTION, TOO_LONG, *number_rows(100, 4)])
    assert (second := job.run()).code == 0, second.log
    return job


@pytest.fixture(params=["with artifacts", "after gc"])
def output(request: pytest.FixtureRequest, job: Job, tmp_path: Path) -> Location:
    """What the job has left, whole or after all artifacts were removed."""
    shutil.copytree(job.output, tmp_path / "out")
    place = Location.of(tmp_path / "out")
    if request.param == "after gc":
        age(tmp_path / "out", 100)
        assert collect(place, delete=True).removals
        assert not list((tmp_path / "out/artifacts").rglob("*.parquet"))
    return place


def has_artifacts(output: Location) -> bool:
    return any(Path(output.uri, "artifacts").rglob("manifest.json"))


def fates(output: Location, row: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Of each version, the older first."""
    return [(one["fate"], one["reasons"]) for one in trace_back(output, pair_id(row))["models"]]


def test_what_became_of_a_row_in_each_model(output: Location):
    assert fates(output, TRAINED) == [("trained", [])] * 2
    assert fates(output, HELD_OUT) == [("held_out", [])] * 2
    assert fates(output, number_rows(100, 1)[0])[0] == ("absent", [])
    assert fates(output, number_rows(999, 1)[0]) == [("absent", [])] * 2
    [before, after] = fates(output, DUPLICATE)
    assert before == ("trained", []) and after[0] == "trained" and "duplicate" in after[1]


def test_why_a_row_was_left_out_is_known_row_by_row_as_long_as_the_artifacts_are_there(output: Location):
    whole = has_artifacts(output)
    for row, reason in (
        (CONTRADICTION, "contradiction"),
        (TWISTED, "contradiction"),
        (TOO_LONG, "completion_too_long"),
    ):
        fate, reasons = fates(output, row)[1]
        assert fate == "left_out" and reason in reasons
        assert not whole or reasons == [reason]


def test_the_files_that_a_row_is_from_are_named(output: Location):
    [first, second] = trace_back(output, pair_id(DUPLICATE))["models"]
    assert [Path(file).name for file in first["files"]] == ["a.parquet"]
    assert [Path(file).name for file in second["files"]] == ["a.parquet", "b.jsonl"]


@pytest.mark.parametrize("asked", ["b.jsonl", "date=2026-11-02", "date=2026-11-02/b.jsonl"])
def test_a_file_or_a_partition_tells_how_many_of_its_rows_each_model_has_seen(output: Location, job: Job, asked: str):
    answer = trace_back(output, asked)
    [one] = answer["models"]
    assert (one["version"], one["read"]) == (job.published(), 8)
    kept = one["trained"] + one["held_out"]
    assert one["dropped"] == {"duplicate": 1, "contradiction": 2, "completion_too_long": 1} and kept == 4
    assert one["held_out"] == sum(map(is_held_out, number_rows(100, 4)))
    assert answer["published_models"] == 2 and answer["unknown"] == []


def test_a_file_of_which_all_rows_were_quarantined_says_so(output: Location):
    answer = trace_back(output, "bad.jsonl")
    assert [(one["read"], one["trained"], one["dropped"]) for one in answer["models"]] == [
        (2, 0, {"empty_response": 2})
    ] * 2
    if has_artifacts(output):
        assert {(row["row"], row["reason"]) for row in answer["quarantined"]} == {
            (1, "empty_response"),
            (2, "empty_response"),
        }


def test_a_file_that_was_moved_since_is_known_by_its_content(output: Location, job: Job, tmp_path: Path):
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(job.data / "date=2026-11-02/b.jsonl", moved)
    files = output / "artifacts" / "files"
    record = next(json.loads(f.read_bytes()) for f in files.children() if b"b.jsonl" in f.read_bytes())
    (files / "later.json").write_bytes(json.dumps(record | {"uri": str(moved)}).encode())
    assert [one["read"] for one in trace_back(output, "elsewhere.jsonl")["models"]] == [8]


def test_of_a_file_that_was_changed_in_place_all_that_it_held_is_looked_for(output: Location):
    [first] = [file for file in trace_back(output, "b.jsonl")["files"] if file["uri"].endswith("/b.jsonl")]
    # At another place, with what a model was trained on first and something else later.
    for name, sha256 in (("0", "0" * 64), ("1", first["sha256"]), ("2", "f" * 64)):
        record = json.dumps({"uri": "/elsewhere/c.jsonl", "sha256": sha256})
        (output / FILES / f"{name}.json").write_bytes(record.encode())
    answer = trace_back(output, "c.jsonl")
    assert len([file for file in answer["files"] if file["uri"] == "/elsewhere/c.jsonl"]) == 3
    assert [one["trained"] for one in answer["models"]] == [
        one["trained"] for one in trace_back(output, "b.jsonl")["models"]
    ]


def test_a_model_tells_its_artifacts_files_and_shards(output: Location, job: Job):
    answer = trace_back(output, "numbers")
    assert (answer["version"], answer["latest"], answer["present"]) == (job.published(), True, True)
    assert trace_back(output, f"numbers/{job.published()}") == trace_back(output, job.published()) == answer
    [policy] = answer["policies"]
    kinds = [one["kind"] for one in policy["artifacts"]]
    assert set(kinds) == {"pairs", "duplicates", "tokenized", "reference", "train"} and kinds[-1] == "train"
    there = has_artifacts(output)
    assert {one["present"] for one in policy["artifacts"]} == {there}
    assert policy["trained_from"] == {
        "weights": policy["trained_from"]["weights"], "path": str(job.model), "revision": None, "policy": None
    }  # fmt: skip
    assert [Path(one["uri"]).name for one in policy["sources"]] == ["a.parquet", "bad.jsonl", "b.jsonl"]
    for name in ("read", "trained", "held_out"):
        assert policy["rows"][name] == sum(one[name] for one in policy["sources"])
    assert policy["rows"]["read"] == 22 and all(one["shards"] for one in policy["sources"])
    older = trace_back(output, job.first)  # type: ignore[attr-defined]
    assert not older["latest"] and older["policies"][0]["rows"]["read"] == 14


def test_without_a_record_the_artifacts_are_asked_and_what_is_gone_is_said(output: Location):
    shutil.rmtree(Path(output.uri) / "lineage")
    there = has_artifacts(output)
    fate = fates(output, TRAINED)[0][0]
    assert fate == ("trained" if there else "unknown")
    answer = trace_back(output, "b.jsonl")
    assert answer["models"] == [] and len(answer["unknown"]) == 2
    said = "\n".join(lines(trace_back(output, "numbers")))
    assert ("its source files were not recorded" if there else "was removed") in said


def test_of_rows_ids_alone_are_read(output: Location, monkeypatch: pytest.MonkeyPatch):
    read = []
    real = lineage.read_shard

    def watched(location: Location, columns: list[str] | None = None, rows: Any = None):
        read.append(tuple(columns or ["all"]))
        return real(location, columns=columns, rows=rows)

    for module in ("pipelines.lineage", "dpo_ray.data.seen_rows"):
        monkeypatch.setattr(f"{module}.read_shard", watched)
    fates(output, TOO_LONG)
    assert set(read) <= {("row", "held_out"), ("reason",)} and read


def test_what_is_kept_is_shared_by_all_policies(job: Job):
    kept = [file.name for file in (job.output / "lineage/rows/pairs").iterdir()]
    shards = {f.name for f in (job.output / "artifacts/pairs/shards").glob("*.parquet")}
    assert set(kept) == shards
    first = read_policy(Location.of(job.output), job.first)  # type: ignore[attr-defined]
    assert first is not None and {shard.pairs for shard in first.shards} < shards


def test_a_damaged_id_or_a_wrong_name_is_refused_by_name(output: Location):
    with pytest.raises(ConfigError, match=r"nosuch\.parquet is no model, no pair id .* \(numbers\)"):
        trace_back(output, "nosuch.parquet")
    with pytest.raises(ConfigError, match="holds no published model"):
        trace_back(output / "artifacts", "numbers")


def test_a_models_folder_is_named_as_a_shell_completes_it(output: Location):
    assert trace_back(output, "numbers/")["asked"] == trace_back(output, "numbers")["asked"]
    assert trace_back(output, f"{output}/models/numbers/")["what"] == "model"


@pytest.mark.parametrize("asked", ["", " "])
def test_nothing_names_nothing(output: Location, asked: str):
    with pytest.raises(ConfigError, match="Nothing is asked for"):
        trace_back(output, asked)


def test_a_latest_version_of_which_nothing_else_is_left_is_still_known(output: Location):
    folder = output / "models" / "numbers"
    standing = latest(folder)
    assert standing is not None
    (folder / "history").remove_folder()
    (folder / standing.version).remove_folder()
    answer = trace_back(output, "numbers")
    assert (answer["version"], answer["latest"], answer["present"]) == (standing.version, True, False)


def test_a_damaged_record_of_a_file_is_named(output: Location):
    record = next(one for one in (output / FILES).children() if one.name.endswith(".json"))
    record.write_bytes(b'{"uri": ')
    with pytest.raises(DataError, match=rf"{record.name}, which says what was read from a file, is damaged"):
        trace_back(output, "b.jsonl")


def test_the_command_prints_words_or_json(job: Job):
    said = in_process("lineage", str(job.output), pair_id(HELD_OUT))
    assert said.code == 0 and "0 of 2 published models were trained on it" in said.log
    assert len(said.lines("held out: it was measured on this row, and not trained on it")) == 2
    told = in_process("lineage", str(job.output), "b.jsonl", "--json")
    assert json.loads(told.log)["what"] == "file"
    assert in_process("lineage", str(job.output), "nosuch").code == 2


def test_the_same_in_an_object_store(job: Job):
    with object_store():
        output = Location.of(f"s3://{BUCKET}/team/out")
        for folder in ("models", "lineage"):
            Location.of(job.output / folder).copy_folder_to(output / folder)
        assert fates(output, TRAINED) == [("trained", [])] * 2
        version = output / "models" / "numbers" / job.published()
        assert trace_back(output, version.uri)["version"] == job.published()
        assert [one["read"] for one in trace_back(output, "b.jsonl")["models"]] == [8]
