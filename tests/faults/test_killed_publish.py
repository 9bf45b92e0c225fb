"""SIGKILL while models are published, fifty times: the pointer never names a model that is not there as a whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ray.storage.location import Location
from dpo_ray.storage.published import CARD, LATEST, history, latest

pytestmark = pytest.mark.faults

KILLS = 50
FILES = {"config.json": 100, "model.safetensors": 3_000_000, "tokenizer.json": 200_000}
PUBLISHER = """
import json, os, sys
from pathlib import Path
from huggingface_hub import EvalResult, ModelCard, ModelCardData  # once, and not in each child
from dpo_ray.config import Config
from dpo_ray.storage import artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.files import KIND, MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.publish import publish

output, files = sys.argv[1], json.loads(sys.argv[2])
config = Config.model_validate({"run": {"name": "n", "output": output}, "model": {"path": "m"}, "data": {"train": "x"},
                                "publish": {"gate": {"accuracy_above": None}}})

def forever(attempt):
    for number in range(10_000):
        context = RunContext(config, f"run-{attempt}-{number}", Location.of(output))
        location = context.output / "artifacts" / KIND / f"policy-{attempt}-{number}"
        for name, size in files.items():
            (location / MODEL_FOLDER / name).write_bytes(name.encode() + b"x" * size)
        metrics = {"first_step_loss": 0.7, "num_steps": 3, "published_step": 3, "final": {"loss": 0.6}}
        entries = [artifact.describe_file(location / MODEL_FOLDER / name) for name in files]
        entries = [entry.model_copy(update={"name": f"{MODEL_FOLDER}/{entry.name}"}) for entry in entries]
        artifacts = context.output / "artifacts"
        artifact.publish(artifacts / "pairs" / "p", "pairs", identity={}, inputs={}, files=[])
        artifact.publish(artifacts / "tokenized" / "t", "tokenized", identity={}, inputs={"pairs": "p"}, files=[])
        identity = {"attempt": [attempt, number], "weights": "w"}
        policy = artifact.publish(location, KIND, identity=identity, inputs={"pairs": "t"}, files=entries,
                                  metrics=metrics)
        place = context.output / "artifacts" / "eval" / "e"
        measured = artifact.publish(place, "eval", identity={}, inputs={}, files=[])
        publish(context, policy, measured, lambda: measured)

for attempt, _ in enumerate(sys.stdin):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        forever(attempt)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""
"""Starts a process that publishes one model after the other for each line that it is given, and tells its id."""


def is_whole(version: Path) -> bool:
    return (version / CARD).exists() and all(
        (version / name).stat().st_size == size + len(name) for name, size in FILES.items()
    )


def test_the_pointer_never_names_what_is_half_written(tmp_path: Path):
    chance = random.Random(0)
    folder = tmp_path / "out" / "models" / "n"
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path / "out"), json.dumps(FILES)]
    published = set()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as publisher:
        assert publisher.stdin is not None and publisher.stdout is not None
        for _ in range(KILLS):
            publisher.stdin.write("go\n")
            publisher.stdin.flush()
            child = int(publisher.stdout.readline())
            time.sleep(chance.uniform(0.0, 1.2))
            os.kill(child, signal.SIGKILL)
            assert publisher.stdout.readline() == "dead\n"
            if not (folder / LATEST).exists():
                continue
            found = latest(Location.of(folder))
            assert found is not None
            assert is_whole(folder / found.version), found.version
            published.add(found.version)
        publisher.stdin.close()
    # Kills hit different places, and many publications came through in between.
    assert len(published) > KILLS / 10
    moves = history(Location.of(folder))
    standing = latest(Location.of(folder))
    assert standing is not None and standing.version in {one.version for one in moves[-2:]}
    assert all(is_whole(folder / one.version) for one in moves)
