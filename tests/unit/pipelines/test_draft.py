"""`dpo-ray init`: a configuration for data, model and machine that runs as it is."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner, Result

from dpo_ray.config import Config, load_config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.machine import GPU
from pipelines.cli import app
from pipelines.draft import choices, hardware
from pipelines.draft.hardware import Hardware
from pipelines.plan import memory
from tests.command_line import dpo_ray

GIB = 2**30
LAPTOP = Hardware(cores=8, memory=16 * GIB, gpus=0, gpu_memory=None, gpu_name=None, vllm=True)
SERVER = Hardware(cores=64, memory=512 * GIB, gpus=4, gpu_memory=80 * GIB, gpu_name="NVIDIA H100", vllm=True)
REAL = os.environ.get("DPO_RAY_DATA")

ROWS: dict[str, list[dict[str, Any]]] = {
    "paired": [{"prompt": f"Why {n}?", "chosen": "So it is.", "rejected": "No."} for n in range(40)],
    "hh_rlhf": [
        {side: f"\n\nHuman: Why {n}?\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in range(40)
    ],
    "alpaca": [{"instruction": f"Add {n}", "input": "1", "chosen": "2", "rejected": "3"} for n in range(40)],
    "unpaired": [{"prompt": f"Why {n}?", "completion": "So.", "label": n % 2 == 0} for n in range(40)],
    "ranked": [{"prompt": f"Why {n}?", "completions": ["So.", "No."], "scores": [1.0, 0.0]} for n in range(40)],
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoked(*arguments: str) -> Result:
    with patch.object(sys, "argv", ["dpo-ray", *arguments]):
        result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    set_machine(monkeypatch, LAPTOP)
    return tmp_path


def set_machine(monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    monkeypatch.setattr(Hardware, "here", classmethod(lambda cls: machine))


def drafted(data: Path, model: Path, *options: str) -> Config:
    """What is written for data, once it is seen that it runs."""
    invoked("init", str(data), "--model", str(model), *options)
    invoked("run", "run.yaml", "--dry-run")
    return load_config("run.yaml")


@pytest.mark.parametrize("name", ROWS)
def test_data_of_any_format_get_a_configuration_that_runs(name: str, here: Path, tiny_model: Path):
    config = drafted(written(here / "some pairs.jsonl", ROWS[name]), tiny_model)
    assert config.data.layout == name and config.run.name == "some-pairs"
    assert config.train.loss.type == ("kto" if name == "unpaired" else "sigmoid")
    assert config.data.max_prompt_tokens % 64 == 0 and config.data.max_completion_tokens == 64
    assert config.data.held_out_fraction == 0.3 and config.train.global_batch_size == 8
    assert (config.train.num_workers, config.train.cpus_per_worker, config.train.use_gpu) == (4, 2, False)
    assert (config.model.dtype, config.reference.engine) == ("float32", "torch")


@pytest.mark.parametrize(("fast", "told"), [(True, "twice as fast in bfloat16"), (False, "would be slower in it")])
def test_a_cpu_computes_in_float32_and_is_told_what_bfloat16_would_be(
    fast: bool, told: str, here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    set_machine(monkeypatch, replace(LAPTOP, cores=2, fast_bfloat16=fast))
    config = drafted(written(here / "d.jsonl", ROWS["paired"]), tiny_model)
    assert (config.model.dtype, config.train.num_workers, config.train.cpus_per_worker) == ("float32", 1, 2)
    assert told in " ".join(Path("run.yaml").read_text().replace("#", "").split())


@pytest.mark.parametrize(("flag", "fast"), [("amx_bf16", True), ("avx512_bf16", True), ("avx512_f", False)])
def test_what_pytorch_finds_of_the_cpu_decides(flag: str, fast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": False, "cpu_name": "a CPU", flag: True})
    assert Hardware.here().fast_bfloat16 is fast


def test_gpus_count_that_pytorch_can_use(monkeypatch: pytest.MonkeyPatch):
    found = tuple(GPU("NVIDIA L4", memory, 0, "580") for memory in (24 * GIB, 22 * GIB, None))
    monkeypatch.setattr(hardware, "told_by_driver", lambda: (found, None))
    monkeypatch.setattr(hardware, "told_by_torch", lambda: ("13.0", 2))
    here = Hardware.here()
    assert (here.gpus, here.gpu_memory, here.most_workers) == (2, 22 * GIB, 2)
    monkeypatch.setattr(hardware, "told_by_torch", lambda: (None, 0))
    without = Hardware.here()
    assert (without.gpus, without.gpu_memory) == (0, None) and "no GPU that PyTorch can use" in str(without)
    assert without.cores >= 1 and without.memory > GIB


def test_every_value_has_its_reason(here: Path, tiny_model: Path):
    drafted(written(here / "d.jsonl", ROWS["paired"]), tiny_model)
    lines = Path("run.yaml").read_text().splitlines()
    assert lines[0].startswith(f"# Made by: dpo-ray init {here}/d.jsonl --model ")
    values = [
        number for number, line in enumerate(lines) if line.startswith("  ") and not line.lstrip().startswith("#")
    ]
    assert len(values) > 12 and all(lines[number - 1].startswith("  # ") for number in values)


def test_limits_are_by_the_lengths_and_say_what_is_over_them(here: Path, tiny_model: Path):
    rows = [{"prompt": "why " * (n % 50 + 1), "chosen": "so " * 90, "rejected": "no"} for n in range(300)]
    rows[7]["prompt"] = "why " * 900
    config = drafted(written(here / "d.jsonl", rows), tiny_model)
    assert 50 <= config.data.max_prompt_tokens < 300 and config.data.max_completion_tokens >= 90
    text = " ".join(Path("run.yaml").read_text().replace("#", "").split())
    assert (
        "the longest 931, of 300 measured; 0.3% of the pairs are longer and are dropped" in text
        and "Tokens of the longer answers: median" in text
    )


def test_a_machine_with_gpus_is_used(here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    set_machine(monkeypatch, SERVER)
    config = drafted(written(here / "d.jsonl", ROWS["paired"]), tiny_model)
    assert (config.model.dtype, config.train.use_gpu, config.train.num_workers) == ("bfloat16", True, 4)
    assert (config.vllm.num_actors, config.vllm.gpus_per_actor) == (4, 1) and config.model.lora is None
    assert "4 × NVIDIA H100 of 80 GiB, 64 cores" in Path("run.yaml").read_text()


def test_without_vllm_the_reference_is_torchs(here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    set_machine(monkeypatch, replace(SERVER, vllm=False))
    config = drafted(written(here / "d.jsonl", ROWS["paired"]), tiny_model)
    assert config.reference.engine == "torch"


def test_where_the_weights_have_no_room_it_takes_fewer_workers_and_then_adapters_and_says_so(
    here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    data = written(here / "d.jsonl", ROWS["paired"])
    set_machine(monkeypatch, Hardware(8, 1 << 20, 0, None, None, vllm=True))
    result = invoked("init", str(data), "--model", str(tiny_model))
    config = load_config("run.yaml")
    assert "This machine has no room for it: " in result.output
    assert config.train.num_workers == 1 and config.model.lora is not None and config.train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("told", "workers"), [("train.global_batch_size=2", 2), ("train.num_workers=1", 1), ("train.num_workers=2", 2)]
)
def test_what_is_told_is_reckoned_with(
    told: str, workers: int, here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    set_machine(monkeypatch, SERVER)
    reckoned: list[int] = []

    def of_training(config: Config, *arguments: Any) -> Any:
        reckoned.append(config.train.num_workers)
        return memory.of_training(config, *arguments)

    monkeypatch.setattr(choices, "of_training", of_training)
    config = drafted(written(here / "d.jsonl", ROWS["paired"]), tiny_model, "-o", told)
    assert config.train.num_workers == workers and set(reckoned) == {workers}


def test_a_person_sees_no_words_of_libraries(here: Path, tiny_model: Path):
    done = dpo_ray("init", str(written(here / "d.jsonl", ROWS["paired"])), "--model", str(tiny_model))
    assert done.code == 0 and "run.yaml is written" in done.log
    assert [line for line in done.log.splitlines() if "torch" in line and str(tiny_model) not in line] == []


def test_what_is_told_stands(here: Path, tiny_model: Path):
    rows = [{"question": r["prompt"], "better": r["chosen"], "worse": r["rejected"]} for r in ROWS["paired"]]
    data = written(here / "d.jsonl", rows)
    other = written(here / "e.jsonl", rows[:5])
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    told = [part for field, column in names.items() for part in ("-o", f"data.columns.{field}={column}")]
    told += ["-o", "train.loss.beta=0.3", "-o", f"data.eval={other}", "-o", "train.epochs=2"]
    config = drafted(data, tiny_model, *told, "--name", "mine", "--output", "there")
    assert config.data.columns.renamed() == names and config.data.eval == str(other)
    assert config.train.loss.model_dump()["beta"] == 0.3 and config.train.loss.type == "sigmoid"
    assert (config.run.name, config.run.output, config.train.epochs) == ("mine", "there", 2)


@pytest.mark.parametrize(
    "told", [("model.lora.quantization=nf4", "reference.engine=torch"), ("data.ties=keep",), ("reference.engine=vllm",)]
)
def test_what_goes_with_what_is_chosen_is_taken(here: Path, tiny_model: Path, told: tuple[str, ...]):
    data = written(here / "d.jsonl", ROWS["paired"])
    config = drafted(data, tiny_model, *(part for one in told for part in ("-o", one))).model_dump(mode="json")
    for key, value in (one.split("=") for one in told):
        found = config
        for name in key.split("."):
            found = found[name]
        assert found == value


@pytest.mark.parametrize(
    ("told", "loss"),
    [
        (("train.loss.type=orpo",), {"type": "orpo"}),
        (("train.loss={type: ipo}", "train.loss.beta=0.3"), {"type": "ipo", "beta": 0.3}),
        (("train.loss.beta=0.3",), {"type": "sigmoid", "beta": 0.3}),
    ],
)
def test_all_that_is_told_of_a_loss_is_taken_and_nothing_of_another_one(
    here: Path, tiny_model: Path, told: tuple[str, ...], loss: dict[str, Any]
):
    data = written(here / "d.jsonl", ROWS["paired"])
    found = drafted(data, tiny_model, *(part for one in told for part in ("-o", one))).train.loss.model_dump()
    assert {key: found[key] for key in loss} == loss


def test_a_file_that_is_there_is_left_alone(here: Path, tiny_model: Path):
    data = written(here / "d.jsonl", ROWS["paired"])
    Path("run.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"run.yaml is there already: .*--to, or .*--force"):
        invoked("init", str(data), "--model", str(tiny_model))
    assert Path("run.yaml").read_text() == "mine"
    drafted(data, tiny_model, "--force")
    with pytest.raises(ConfigError, match=r"no folder no/such: make it"):
        invoked("init", str(data), "--model", str(tiny_model), "--to", "no/such/run.yaml")


def test_what_cannot_be_read_leaves_no_file(here: Path, tiny_model: Path):
    data = written(here / "d.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(DataError, match=r"d\.jsonl"):
        invoked("init", str(data), "--model", str(tiny_model))
    with pytest.raises(DataError, match="nothing"):
        invoked("init", str(here / "nothing.jsonl"), "--model", str(tiny_model))
    with pytest.raises(ConfigError, match=r"generate.*demo_cpu"):
        invoked("init", str(data), "--model", str(tiny_model), "-o", "generate.prompts=p.jsonl")
    assert not Path("run.yaml").exists()


@pytest.mark.skipif(REAL is None, reason="DPO_RAY_DATA names no folder with real preference data")
@pytest.mark.parametrize("name", ["hh_helpful", "tldr_human", "dpo_en_demo", "polite_demo"])
def test_real_data_get_limits_that_hold_nearly_all_of_them(name: str, here: Path, tiny_model: Path):
    config = drafted(Path(str(REAL)) / name, tiny_model, "--rows", "200")
    assert config.run.name == name and config.data.layout == "paired"
    assert config.data.max_prompt_tokens >= 64
