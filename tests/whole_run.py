"""Whole runs of the command line in this process, without Ray: workers run where they are asked for, and training is a
nudge to the weights. Everything else is what a run does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dpo_ray.config import Config
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.scan import record_name, scan
from dpo_ray.on_ray import calibrate, session, trainer
from dpo_ray.on_ray import scan as scanning
from dpo_ray.on_ray.pool import Pool
from dpo_ray.pairs import PreferencePair
from dpo_ray.storage.artifact import Artifact, Contents, FileEntry, describe_file
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import started, this_machine
from dpo_ray.training.files import HISTORY, MODEL_FOLDER
from tests.command_line import Finished, in_process
from tests.shard_stages import without_ray
from tests.training import VOCABULARY, one_thread


def word_model(folder: Path, model: Path) -> Path:
    """tests.training.small_model with a tokenizer that takes each word by itself: a number, and a space after it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder)
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(WordLevel({**special, **{str(i): i for i in range(3, VOCABULARY)}}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def no_cluster() -> Iterator[None]:
    """Within it no stage needs Ray, and one that asks for it fails."""

    def scan_here(folder: Location, stamps: list[Stamp], rows_per_shard: Any, place: Any) -> None:
        for stamp in stamps:
            record = scan(stamp, rows_per_shard, folder)
            (folder / record_name(stamp, rows_per_shard)).write_bytes(record.model_dump_json().encode())

    def alone(pool: Pool) -> Any:
        return pool.build(**pool.arguments)

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray is asked for")

    with without_ray(), one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "_scan", scan_here)
        patch.setattr(calibrate, "alone", alone)
        patch.setattr(trainer, "_train", nudge)
        patch.setattr(session, "connect", connect)
        yield


def nudge(output: Location, config: Config, rows: Artifact, location: Location, steering: Any) -> Contents:
    """In place of a training: the model's weights, moved by what is drawn for the artifact's fingerprint."""
    import torch
    from safetensors.torch import load_file, save_file

    source, target = Path(config.model.path), Path(location.uri) / MODEL_FOLDER
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "README.md").unlink(missing_ok=True)
    random = torch.Generator().manual_seed(int(location.name, 16) % 2**31)
    weights = load_file(source / "model.safetensors")
    moved = {name: value + 0.02 * torch.randn(value.shape, generator=random) for name, value in weights.items()}
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    final = {"step": 1, "loss": 0.6, "tokens_per_second": 100.0}
    metrics = json.dumps(final).encode()
    (location / HISTORY).write_bytes(metrics)
    files = [
        describe_file(Location.of(file)).model_copy(update={"name": f"{MODEL_FOLDER}/{file.name}"})
        for file in sorted(target.iterdir())
    ]
    told = FileEntry(name=HISTORY, bytes=len(metrics), sha256=hashlib.sha256(metrics).hexdigest())
    count = rows.manifest.rows or 0
    return Contents(
        files=[*files, told],
        counters={"read": count, "kept": count, "other_split": 0},
        metrics={
            "first_step_loss": 0.693,
            "zero_margin_loss": 0.693,
            "final": final,
            "num_steps": 1,
            "planned_steps": 1,
            "published_step": 1,
            "tokens_per_second": 100.0,
            "seconds": 1.5,
        },
    )


def number_rows(first: int, count: int) -> list[dict[str, Any]]:
    """Pairs in words that word_model knows, each with a prompt of its own."""
    return [
        {"prompt": f"{n + 10}", "chosen": f"{n + 11}", "rejected": f"{n + 12}"} for n in range(first, first + count)
    ]


def pair_id(row: dict[str, Any]) -> str:
    """Of a row of number_rows."""
    return PreferencePair(({"role": "user", "content": row["prompt"]},), row["chosen"], row["rejected"]).pair_id


class Job:
    """A folder of data, a configuration, and a command line over them.

    Args:
        model: of the configuration; small enough to compute with in a test.
    """

    def __init__(self, folder: Path, model: Path, **sections: Any):
        self.data, self.output, self.path = folder / "data", folder / "out", folder / "nightly.yaml"
        self.model = model
        self.configure(**sections)

    def configure(self, **sections: Any) -> None:
        """Write the configuration; sections are merged over those of a small run."""
        tree: dict[str, Any] = {
            "run": {"name": "numbers", "output": str(self.output)},
            "model": {"path": str(self.model)},
            "data": {"train": str(self.data), "held_out_fraction": 0.25, "rows_per_shard": 10},
            "reference": {"engine": "torch", "calibration_pairs": 2},
            "train": {"global_batch_size": 2},
            "publish": {"gate": {"accuracy_above": None}},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(yaml.safe_dump(tree))

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """A file of data."""
        target = self.data / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), target)
        else:
            target.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return target

    def run(self, *arguments: str, command: str = "run") -> Finished:
        """The command over the configuration, without Ray."""
        with no_cluster():
            return in_process(command, str(self.path), *arguments)

    def published(self) -> str:
        """The version that stands."""
        pointer = json.loads((self.output / "models/numbers/latest.json").read_text())
        return str(pointer["version"])


def without_an_end(job: Job, run_id: str, **process: Any) -> None:
    """As if a run of another process, of this machine unless told, had published nothing, written no summary, and just
    told of itself.

    Args:
        process: "0" of one that has ended.
    """
    run = job.output / "runs" / run_id
    (run / "summary.json").unlink(missing_ok=True)
    shutil.rmtree(job.output / "models", ignore_errors=True)
    (run / "progress.json").write_text(
        json.dumps({"process": {"by": "x", "pid": 1, "process": started(1), "machine": this_machine(), **process}})
    )
