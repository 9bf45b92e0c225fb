"""What the shell completes: commands, and after -o the keys of the configuration with their values."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dpo_ray.config import load_config
from pipelines.completion import mend_words, overrides
from tests.command_line import CONFIGS, DPO_RAY, LONGEST

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash here")


def begun(text: str) -> list[str]:
    return [value for value, _ in overrides(text) if value.startswith(text)]


def test_keys_are_those_of_the_tree():
    keys = begun("")
    assert {"run.name=", "train.learning_rate=", "train.loss.beta=", "generate.sampling.top_p="} <= set(keys)
    assert {"train.loss.target_margin=", "model.lora.rank=", "evaluate.win_rate.reward.path=", "tune.space="} <= set(
        keys
    )
    assert not [key for key in keys if key.startswith(("train=", "model.lora=", "data.train.name"))]
    assert begun("train.eval_") == ["train.eval_every_steps=", "train.eval_pairs=", "train.eval_fraction="]
    assert begun("no.such") == []


def test_of_one_key_the_values_are_told():
    assert begun("train.strategy=") == ["train.strategy=ddp", "train.strategy=fsdp"]
    assert begun("train.strateg") == ["train.strategy=ddp", "train.strategy=fsdp"]
    assert begun("train.strategy=f") == ["train.strategy=fsdp"]
    assert begun("train.use_gpu=") == ["train.use_gpu=false", "train.use_gpu=true"]
    assert begun("train.min_workers=") == ["train.min_workers=null"]
    assert begun("train.learning_rate=") == ["train.learning_rate=1.0e-06"]
    assert {"train.loss.type=sigmoid", "train.loss.type=weighted"} <= set(begun("train.loss.type="))
    assert begun("tune.scheduler=a") == ["tune.scheduler=asha"] and "data.layout=hh_rlhf" in begun("data.layout=")
    assert begun("model.path=") == ["model.path="]


def test_each_has_a_word_on_what_it_is():
    assert dict(overrides("train.warmup_f"))["train.warmup_fraction=0.1"].startswith("Share of the steps")


def test_a_value_that_is_completed_can_be_loaded():
    for key in ("train.strategy=f", "train.schedule=l", "data.ties=d", "publish.gate.accuracy_above=", "vllm.kv_cache"):
        for chosen in begun(key):
            load_config(CONFIGS / "align_cpu.yaml", [chosen])


@pytest.mark.parametrize(
    ("words", "at", "mended", "key"),
    [
        ("dpo-ray run c.yaml -o train.str", 4, "dpo-ray run c.yaml -o train.str", None),
        ("dpo-ray run c.yaml -o train.strategy =", 5, "dpo-ray run c.yaml -o ", "train.strategy"),
        ("dpo-ray run c.yaml -o train.strategy = f", 6, "dpo-ray run c.yaml -o f", "train.strategy"),
        ("dpo-ray run c.yaml -o a.b = 1 -o c", 8, "dpo-ray run c.yaml -o a.b=1 -o c", None),
        ("dpo-ray run c.yaml -o", 4, "dpo-ray run c.yaml -o ", None),
    ],
)
def test_what_bash_cuts_is_put_together(words: str, at: int, mended: str, key: str | None):
    environ = {"_DPO_RAY_COMPLETE": "complete_bash", "COMP_WORDS": words.replace(" ", "\n"), "COMP_CWORD": str(at)}
    mend_words(environ)
    assert environ["COMP_WORDS"] == mended.replace(" ", "\n")
    assert environ["COMP_CWORD"] == str(len(mended.split(" ")) - 1) and environ.get("_DPO_RAY_COMPLETED_KEY") == key


def in_bash(script: str, home: Path) -> str:
    """What a script says in a bash of its own, whose home is a folder."""
    path = f"{Path(DPO_RAY).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(BASH), "--norc", "-c", script],
        env={**os.environ, "HOME": str(home), "PATH": path, "SHELL": str(BASH)},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_bash
def test_it_is_shown_and_installed_and_completes_in_bash(tmp_path: Path):
    assert "complete -o default -F" in in_bash("dpo-ray --show-completion; true", tmp_path)
    in_bash("dpo-ray --install-completion; true", tmp_path)
    [script] = (tmp_path / ".bash_completions").iterdir()
    assert str(script) in (tmp_path / ".bashrc").read_text()
    asked = {
        "dpo-ray imp": "import-config",
        "dpo-ray run c.yaml -o train.strat": "train.strategy=ddp\ntrain.strategy=fsdp",
        "dpo-ray run c.yaml -o train.strategy = f": "fsdp",
        "dpo-ray plan c.yaml -o train.loss.type = w": "weighted",
    }
    function = "_dpo_ray_completion"
    for line, answer in asked.items():
        words = shlex.split(line)
        told = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function} dpo-ray; "
        assert in_bash(told + 'printf "%s\\n" "${COMPREPLY[@]}"', tmp_path).strip() == answer
