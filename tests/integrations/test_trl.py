"""What is known of TRL here against TRL itself, in the environment that benchmarks keep for it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipelines.foreign.trl import KNOWN
from tests.command_line import LONGEST
from tests.unit.formats.test_like_trl import GOLDEN, given

TRL_PYTHON = os.environ.get("DPO_RAY_TRL_PYTHON", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not TRL_PYTHON, reason="DPO_RAY_TRL_PYTHON names no Python with TRL: make test-integrations does"
    ),
]


def test_what_is_written_down_of_trl_is_what_it_makes(demo_model: Path):
    command = [TRL_PYTHON, str(Path(__file__).with_name("trl_rows.py")), str(demo_model)]
    rows = json.dumps(given())
    done = subprocess.run(command, input=rows, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(GOLDEN.read_text())


OPTIONS = """
import dataclasses, json
from trl import DPOConfig, ModelConfig, ScriptArguments
kinds = (DPOConfig, ModelConfig, ScriptArguments)
print(json.dumps(sorted({field.name for kind in kinds for field in dataclasses.fields(kind)})))
"""


def test_every_option_of_trl_is_known_to_import_config():
    done = subprocess.run([TRL_PYTHON, "-c", OPTIONS], capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    named = set(json.loads(done.stdout.splitlines()[-1]))
    assert len(named) > 100 and named - KNOWN == set()
