"""What a person gets to read for each mistake: the exit code and one paragraph, before any long work.

Most run in the process of the tests, which has loaded the libraries already; some as a process of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, Finished, dpo_ray, in_process, overrides

pytestmark = pytest.mark.usefixtures("no_ray")  # that somebody wants Ray is told by its start

GOOD = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.fixture
def arguments(tmp_path, tiny_model, write_preferences):
    """Arguments of the main job on one good row, but for what is given."""
    write_preferences(tmp_path / "data", [GOOD])

    def build(command: str = "run", *more: str, **values) -> list[str]:
        settings = {
            "run__output": str(tmp_path / "out"),
            "model__path": str(tiny_model),
            "data__train": str(tmp_path / "data" / "*.parquet"),
            **values,
        }
        return [command, str(CONFIGS / "align_cpu.yaml"), *more, *overrides(**settings)]

    return build


@pytest.fixture
def attempt(arguments):
    """Runs them in this process."""

    def run(*command: str, **values) -> Finished:
        return in_process(*arguments(*command, **values))

    return run


def readable(done: Finished, code: int, *words: str) -> None:
    """One paragraph with these words and no traceback; nothing that costs was started."""
    assert done.code == code, done.log
    assert "Traceback" not in done.log
    assert "starting Ray" not in done.log
    paragraph = done.log.strip().splitlines()[-1]
    for word in words:
        assert word in paragraph, paragraph


def test_missing_file(attempt):
    readable(attempt(data__train="/nowhere/*.parquet"), 3, "data.train", "/nowhere/*.parquet", "no file")


def test_the_traceback_of_an_error_of_ours_is_shown_where_it_is_asked_for(attempt, monkeypatch):
    monkeypatch.setenv("DPO_RAY_TRACEBACK", "1")
    done = attempt(data__train="/nowhere/*.parquet")
    assert done.code == 3, done.log
    assert "Traceback (most recent call last)" in done.log and "in check_inputs" in done.log
    assert done.log.strip().splitlines()[-1].startswith("DataError: data.train is /nowhere/*.parquet")


def test_an_unexpected_error_ends_in_its_paragraph_with_and_without_the_traceback(attempt, monkeypatch):
    def breaks(*arguments: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("pipelines.ingest.check_inputs", breaks)
    for asked in (False, True):
        if asked:
            monkeypatch.setenv("DPO_RAY_TRACEBACK", "1")
        done = attempt()
        assert done.code == 1, done.log
        assert ("Traceback (most recent call last)" in done.log) == asked
        assert done.log.strip().splitlines()[-1].startswith("Unexpected KeyError: 'lost' (")


def test_empty_shard(attempt, tmp_path, write_preferences):
    columns = {name: pa.array([], pa.string()) for name in ("prompt", "chosen", "rejected")}
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "empty" / "a.parquet")
    readable(attempt(data__train=str(tmp_path / "empty")), 3, "data.train", "not a single row")


def test_all_bad_files_are_told_at_once(attempt, tmp_path, write_preferences):
    (tmp_path / "data" / "broken.parquet").write_bytes(b"PAR1 this is not Parquet")
    (tmp_path / "data" / "half.jsonl.gz").write_bytes(b"not gzip")
    write_preferences(tmp_path / "data", [{"prompt": "a", "answer": "b"}], name="other.parquet")
    write_preferences(tmp_path / "data", [{"prompt": "a", "chosen": 1, "rejected": 2}], name="types.parquet")
    done = attempt(data__train=str(tmp_path / "data"))
    readable(
        done, 3, "4 files cannot be used", "broken.parquet is not", "half.jsonl.gz is not", "types.parquet", "int64"
    )
    assert "other.parquet has no column chosen" in done.log
    assert not (tmp_path / "out").exists()


def test_a_file_of_no_known_kind(attempt, tmp_path):
    (tmp_path / "data" / "notes.txt").write_text("read me")
    readable(attempt(data__train=str(tmp_path / "data" / "*")), 3, "notes.txt", ".parquet, .jsonl", "Rename")


def test_a_json_array_that_is_called_lines(attempt, tmp_path):
    (tmp_path / "data" / "a.jsonl").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    readable(attempt(data__train=str(tmp_path / "data" / "a.jsonl")), 3, "a.jsonl", "JSON lines", "call it .json")


def test_one_of_several_paths_is_missing(attempt, tmp_path):
    readable(attempt(data__train=[str(tmp_path / "data"), "/nowhere"]), 3, "data.train is /nowhere", "no file")


def test_missing_column(attempt, tmp_path, write_preferences):
    write_preferences(tmp_path / "data", [{"prompt": "a", "answer": "b"}], name="other.parquet")
    readable(attempt(), 3, "other.parquet", "no column chosen", "rename")


def test_single_answers_with_a_loss_that_compares_two(attempt, tmp_path, write_preferences):
    write_preferences(tmp_path / "data", [{"prompt": "a", "completion": "b", "label": True}], name="single.parquet")
    readable(attempt(), 3, "single.parquet", "train.loss.type=sigmoid", "train.loss.type=kto", "paired data")


def test_a_reference_of_a_loss_that_has_none(attempt, tmp_path):
    readable(attempt("reference", train__loss={"type": "simpo"}), 2, "train.loss.type=simpo", "without a reference")
    done = attempt("train", "--reference", str(tmp_path / "any"), train__loss={"type": "orpo"})
    readable(done, 2, "train.loss.type=orpo", "without --reference")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data__pairing": {"pairs_per_prompt": 2}}, "data.pairing is for ranked rows"),
        ({"data__columns": {"label": "good"}}, "data.columns.label=good"),
    ],
    ids=["pairing", "columns"],
)
def test_options_that_no_file_has_a_use_for(attempt, options, said):
    readable(attempt("ingest", model__path="not/needed", **options), 2, said)


def test_an_interruption_says_what_becomes_of_the_work(attempt, monkeypatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for place in ("pipelines.ingest.check_inputs", "pipelines.align.align"):
        monkeypatch.setattr(place, interrupted)
        readable(attempt("ingest", model__path="not/needed"), 130, "Interrupted: What is finished is kept")
        monkeypatch.undo()


def test_sigterm_says_what_becomes_of_the_work(attempt, monkeypatch):
    def terminated(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("pipelines.align.align", terminated)
    readable(attempt("ingest", model__path="not/needed"), 143, "Terminated: It got SIGTERM", "What is finished is kept")
    assert signal.getsignal(signal.SIGTERM) is before


def test_unknown_key(attempt):
    readable(attempt(train__learning_rat=1e-6), 2, "train.learning_rat", "learning_rate")


@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_that_is_not_positive(attempt, beta):
    readable(attempt(train__loss__beta=beta), 2, "train.loss", "beta", "greater than 0")


def test_model_without_chat_template(attempt, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    readable(attempt(model__path=str(bare)), 2, str(bare), "no chat template", "instruction-tuned")


def test_model_that_is_not_there(attempt):
    readable(attempt(model__path="/no/such/model"), 2, "model.path", "/no/such/model")


def test_vllm_that_is_not_installed(arguments, tmp_path):
    # A sitecustomize that hides vLLM is what a machine without it looks like to the program.
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'vllm' else _find(name, package)\n"
    )
    done = dpo_ray(*arguments(reference__engine="vllm"), env={"PYTHONPATH": str(tmp_path / "hide")})
    readable(done, 2, "reference.engine=vllm", "not installed", "reference.engine=torch")


def test_output_that_cannot_be_written(attempt, tmp_path):
    # A file where a folder is wanted: refused to every user, root included.
    (tmp_path / "taken").write_text("")
    readable(attempt(run__output=str(tmp_path / "taken")), 2, "run.output", "nothing can be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_write_access(attempt, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    readable(attempt(run__output=str(tmp_path / "locked" / "out")), 2, "run.output", "write access")


def test_missing_configuration_file(tmp_path):
    readable(in_process("run", str(tmp_path / "none.yaml")), 2, "none.yaml", "no configuration file")


def test_dry_run_prints_the_resolved_tree_and_the_plan_and_writes_nothing(tmp_path):
    done = in_process("run", str(CONFIGS / "demo_cpu.yaml"), "--dry-run", *overrides(run__output=str(tmp_path / "out")))
    assert done.code == 0
    assert "max_grad_norm: 1.0" in done.log
    assert done.lines("# train: sigmoid, beta 0.1")
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_loss_without_reference_and_beta_says_so(attempt):
    done = attempt("run", "--dry-run", train__loss={"type": "orpo"})
    assert done.code == 0, done.log
    assert done.lines("# reference: none, for orpo learns without")
    assert done.lines("# train: orpo, learning rate")


@pytest.mark.ray
def test_too_many_bad_rows_fail_with_the_reasons_and_keep_them_in_quarantine(arguments, tmp_path, write_preferences):
    same = {**GOOD, "rejected": GOOD["chosen"]}
    write_preferences(tmp_path / "data", [GOOD, same, same])
    done = dpo_ray(*arguments(reference__engine="torch"))
    assert done.code == 3, done.log
    paragraph = done.log.strip().splitlines()[-1]
    assert "2 of 3 rows" in paragraph and "identical_pair 2" in paragraph
    [quarantine] = (tmp_path / "out" / "artifacts" / "pairs").glob("*/quarantine/*.parquet")
    rows = pq.read_table(quarantine).to_pylist()
    assert [(row["row"], row["reason"]) for row in rows] == [(1, "identical_pair"), (2, "identical_pair")]
