"""The plan: what it counts is what the stages make, and each number says where it comes from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig

from dpo_ray.config import Config, parse_config
from dpo_ray.data.raw.parts import RowsPerShard
from dpo_ray.data.raw.scan import record_name, scan
from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import scan as scanning
from dpo_ray.on_ray.trainer import train_location
from dpo_ray.pairs import LENGTHS
from dpo_ray.storage.artifact import MANIFEST, Artifact, publish, read_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.flops import FORWARD, ModelShape, total_flops
from dpo_ray.training.index import index_of
from dpo_ray.training.plan import StepPlan
from dpo_ray.training.steps import Steps, execution
from pipelines.context import RunContext
from pipelines.deduplicate import deduplicate
from pipelines.ingest import ingest
from pipelines.plan.render import lines
from pipelines.plan.speeds import Stated
from pipelines.plan.stages import Plan, Stage, as_dict, make_plan
from pipelines.tokenize import tokenize
from tests.command_line import CONFIGS, in_process, overrides
from tests.shard_stages import without_ray
from tests.unit.data.raw.test_kinds import write as write_rows

ROWS = 240
GIB = 2**30


@pytest.fixture
def tree(tiny_model: Path, tmp_path: Path, write_preferences: Callable[..., Path]) -> dict[str, Any]:
    rows = [
        {
            "prompt": f"Say {n}{', please' * (n % 9)}.",
            "chosen": f"It is {n}." * (1 + n % 4),
            "rejected": "No. " * (n % 5 + 1),
        }
        for n in range(ROWS)
    ]
    return {
        "run": {"name": "n", "output": str(tmp_path / "out")},
        "model": {"path": str(tiny_model)},
        "data": {"train": str(write_preferences(tmp_path / "data", rows)), "rows_per_shard": 40},
        "reference": {"engine": "torch"},
        "train": {"global_batch_size": 8, "loss": {"type": "orpo"}, "tokens_per_microbatch": 512},
    }


def plan(tree: dict[str, Any], **more: Any) -> Plan:
    stated = {name: more.pop(name) for name in ("tokens_per_second", "mfu", "peak_tflops") if name in more}
    return make_plan(parse_config(tree), **{"rows": 2000, "stated": Stated(**stated), **more})


def stage_of(made: Plan, name: str) -> Stage:
    return next(stage for stage in made.stages if stage.name == name)


@contextmanager
def here() -> Iterator[None]:
    """Stages that only carry rows are done in this process."""

    def scan_here(folder: Location, stamps: Any, rows_per_shard: RowsPerShard, place: Any) -> None:
        for stamp in stamps:
            record = scan(stamp, rows_per_shard, folder)
            (folder / record_name(stamp, rows_per_shard)).write_bytes(record.model_dump_json().encode())

    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "_scan", scan_here)
        yield


def tokenized(tree: dict[str, Any]) -> tuple[Config, Artifact]:
    config = parse_config(tree)
    context = RunContext.start(config, "r")
    with here():
        pairs = ingest(context)
        return config, tokenize(context, pairs, deduplicate(context, pairs))


def lengths_of(rows: Artifact, split: str) -> np.ndarray:
    found = [row for shard in rows.shards() for row in read_shard(shard).to_pylist() if row["split"] == split]
    return np.array([[row[name] for name in LENGTHS] for row in found])


def test_before_anything_is_made_a_sample_of_the_source_tells(tree: dict[str, Any], tmp_path: Path):
    made = plan(tree, rows=80)
    assert not (tmp_path / "out").exists()
    assert not made.counts.exact and "estimated from 80 rows of 1 files" in made.counts.how
    assert "duplicates are not seen (--exact" in made.counts.how
    assert [stage.state for stage in made.stages] == ["to do"] * 4
    _, rows = tokenized(tree)
    for split, side in (("train", made.counts.train), ("eval", made.counts.held_out)):
        lengths = lengths_of(rows, split)
        # By 80 of 240 rows; their mean moves by its standard error, the split by that of a share.
        assert side.pairs == pytest.approx(len(lengths), rel=0.1 if split == "train" else 0.8)
        each = side.tokens / side.pairs
        wanted = (lengths.sum(axis=1) + lengths[:, 0]).mean()
        assert each == pytest.approx(
            wanted, rel=4 * lengths.sum(axis=1).std() / wanted / np.sqrt(80 * len(lengths) / 240)
        )
    assert plan(tree, rows=80).counts.how.startswith("counted on all")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_are_sampled_too_and_all_of_a_short_file(tree: dict[str, Any], tmp_path: Path, suffix: str):
    import gzip

    rows = b"".join(
        json.dumps({"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."}).encode() + b"\n"
        for n in range(5000)
    )
    file = tmp_path / f"lines{suffix}"
    file.write_bytes(gzip.compress(rows) if suffix.endswith("gz") else rows)
    tree["data"] = {"train": str(file)}
    made = plan(tree, rows=400)
    # Of plain lines they are counted by their length, which grows with the digits of n.
    assert made.counts.read == pytest.approx(5000, rel=0.02)
    assert made.counts.train.pairs + made.counts.held_out.pairs == pytest.approx(5000, rel=0.02)
    whole = plan(tree, rows=6000)
    assert whole.counts.read == 5000
    assert whole.counts.train.pairs + whole.counts.held_out.pairs == 5000


@pytest.mark.parametrize("suffix", [".json", ".csv", ".arrow"])
def test_other_kinds_of_files_are_sampled_too(tree: dict[str, Any], tmp_path: Path, suffix: str):
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(500)]
    file = write_rows(tmp_path / f"f{suffix}", rows)
    tree["data"] = {"train": str(file)}
    made = plan(tree, rows=100)
    assert made.counts.read == pytest.approx(500)
    assert made.counts.train.pairs + made.counts.held_out.pairs == pytest.approx(500)
    assert f"estimated from {96 if suffix == '.arrow' else 100} rows" in made.counts.how  # eight pieces of twelve
    assert plan(tree, rows=600).counts.read == 500


def test_what_is_tokenized_is_counted_to_the_token_and_taken_over(tree: dict[str, Any], tmp_path: Path):
    _, rows = tokenized(tree)
    before = sorted(tmp_path.rglob("*"))
    made = plan(tree)
    assert sorted(tmp_path.rglob("*")) == before, "a plan writes nothing"
    assert made.counts.exact and str(rows.location) in made.counts.how
    lengths = lengths_of(rows, "train")
    assert made.counts.train.pairs == len(lengths)
    assert made.counts.train.tokens == lengths.sum() + lengths[:, 0].sum()
    assert made.counts.train.tokens_once == lengths.sum()
    assert made.counts.train.longest == lengths.sum(axis=1).max()
    states = {stage.name: (stage.state, stage.seconds) for stage in made.stages}
    assert states["ingest"] == states["tokenize"] == ("reused", 0.0)
    assert states["train"] == ("to do", None)
    assert "state --tokens-per-second, or --mfu with --peak-tflops" in stage_of(made, "train").why
    steps = len(lengths) // 8
    assert stage_of(made, "train").rows == 8 * steps
    index, _ = index_of(Location.of(tree["run"]["output"]), rows)
    taken = np.concatenate([pairs for _, pairs in StepPlan(index, 8, 1, 0, 64).steps()])
    assert len(taken) < len(lengths)
    assert stage_of(made, "train").tokens == index.lengths[taken].sum() + index.lengths[taken][:, 0].sum()
    assert stage_of(plan(tree), "train").tokens == stage_of(made, "train").tokens  # of the index that is there now


def test_a_mixture_is_counted_by_its_shares(tree: dict[str, Any], tmp_path: Path):
    """Long pairs that have three quarters of the training, but a third of the rows."""
    file = Path(tree["data"]["train"])
    few = file if file.is_file() else next(file.rglob("*.*"))
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": f"Tell {n}.", "chosen": f"{n}. " * 40, "rejected": "No. " * 30} for n in range(120)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"short": (str(few), 1), "long": (str(long), 3)}
    tree["data"]["train"] = [{"name": n, "path": path, "weight": w} for n, (path, w) in named.items()]
    sampled = plan(tree, rows=90)
    config, rows_made = tokenized(tree)
    made = plan(tree)
    index, _ = index_of(Location.of(config.run.output), rows_made)
    steps = StepPlan(index, 8, 1, 0, 64, config.data.weights)
    every = np.concatenate([of_step for _, of_step in steps.steps()])
    lengths = index.lengths[every].astype(np.int64)
    # A source that is in the middle of a pass counts by its mean.
    assert stage_of(made, "train").tokens == pytest.approx(int((lengths.sum(axis=1) + lengths[:, 0]).sum()), rel=0.02)
    assert stage_of(made, "train").rows == len(every)
    assert sampled.counts.train.pairs == pytest.approx(len(index), rel=0.15)
    tree["data"]["train"][0]["max_rows"] = 24
    assert plan(tree, rows=90).counts.read == pytest.approx(24 + 120, rel=0.05)


def test_of_a_stage_that_was_killed_the_shards_that_are_left_count(tree: dict[str, Any]):
    _, rows = tokenized(tree)
    (rows.location / MANIFEST).remove()
    for shard in rows.shards()[:2]:
        shard.remove()
    made = plan(tree)
    assert stage_of(made, "tokenize").state == "2 of 6 shards"
    assert stage_of(made, "tokenize").left == pytest.approx(1 / 3)
    # The other shards of this very artifact told how fast it is; where no run did, nobody knows.
    assert stage_of(made, "tokenize").seconds is None and not made.counts.exact


def test_stages_that_carry_rows_take_as_long_as_they_did(tree: dict[str, Any], tmp_path: Path):
    tokenized(tree)
    [file] = Path(tmp_path / "out" / "artifacts" / "tokenized").glob("*/manifest.json")
    manifest = json.loads(file.read_text())
    assert manifest["metrics"]["computed"]["rows"] == ROWS
    manifest["metrics"]["computed"] |= {"seconds": 12.0, "workers": 1}
    file.write_text(json.dumps(manifest))
    tree["data"]["max_completion_tokens"] = 100  # of the same tokenizer; the rows are made anew
    stage = stage_of(plan(tree), "tokenize")
    assert stage.state == "to do"
    assert stage.seconds == pytest.approx(12.0 * stage.rows / ROWS / stage.processes)
    assert stage.why.startswith(f"measured: {ROWS} rows in 12 s, ") and str(file.parent) in stage.why


def trained(config: Config, rows: Artifact, **metrics: Any) -> Artifact:
    """A training that was, by what is recorded of it."""
    steps = Steps(metrics.pop("tokens"), metrics.pop("tokens_per_second"), execution(config.train))
    location = train_location(Location.of(config.run.output), config, rows)
    from dpo_ray.on_ray import trainer

    identity, inputs = trainer._known_by(config, rows)
    return publish(
        location, "train", identity=identity, inputs=inputs, files=[], metrics={"steps": steps.as_dict(), **metrics}
    )


def test_a_training_takes_as_long_as_an_earlier_one_tells(tree: dict[str, Any]):
    config, rows = tokenized(tree)
    calibration = trained(config, rows, tokens=10_000, tokens_per_second=500.0, seconds=50.0)
    made = plan(tree)
    assert (stage_of(made, "train").state, stage_of(made, "train").seconds) == ("reused", 0.0)
    tree["train"] |= {"learning_rate": 1e-4, "epochs": 3}
    stage = stage_of(plan(tree, price=2.0), "train")
    assert stage.seconds == pytest.approx(30 + stage.tokens / 500)
    assert "measured: 500 tokens/s with 1 workers" in stage.why and str(calibration.location) in stage.why
    assert stage.hours == pytest.approx(stage.seconds / 3600)
    tree["train"] |= {"num_workers": 2}
    stage = stage_of(plan(tree, price=2.0), "train")
    assert stage.seconds == pytest.approx(30 + stage.tokens / 1000)
    assert plan(tree, price=2.0).cost(stage) == pytest.approx(2 * 2 * stage.seconds / 3600)
    # Of another precision, or done otherwise, it says nothing.
    for other in ({"model": {**tree["model"], "dtype": "bfloat16"}}, {"train": {**tree["train"], "strategy": "fsdp"}}):
        assert stage_of(plan(tree | other), "train").seconds is None


def test_stated_speeds_are_worked_by_hand(tree: dict[str, Any], tiny_model: Path):
    _, rows = tokenized(tree)
    lengths = lengths_of(rows, "train")
    flops = (
        total_flops(ModelShape.of(AutoConfig.from_pretrained(tiny_model)), lengths)
        * 8
        * (len(lengths) // 8)
        / len(lengths)
    )
    stage = stage_of(plan(tree, mfu=0.5, peak_tflops=0.001), "train")
    assert stage.seconds == pytest.approx(flops / 0.5e9)
    assert "stated: --mfu 0.5 of --peak-tflops 0.001" in stage.why
    stage = stage_of(plan(tree, tokens_per_second=100.0), "train")
    assert stage.seconds == pytest.approx(stage.tokens / 100)
    held_out = total_flops(ModelShape.of(AutoConfig.from_pretrained(tiny_model)), lengths_of(rows, "eval"))
    evaluated = stage_of(plan(tree, mfu=0.5, peak_tflops=0.001), "evaluate")
    assert evaluated.seconds == pytest.approx(FORWARD * held_out / 0.5e9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mfu": 0.4}, "--mfu is given alone"),
        ({"peak_tflops": 989.0}, "--peak-tflops is given alone"),
        ({"mfu": 0.4, "peak_tflops": 989.0, "tokens_per_second": 1.0}, "give one of them"),
    ],
)
def test_half_a_speed_is_refused(given: dict[str, float], said: str):
    with pytest.raises(ConfigError, match=said):
        Stated(**given)


@pytest.fixture
def eight_billion(tree: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Llama 3.1 8B by its config.json alone, on 8 GPUs."""
    folder = tmp_path / "llama-8b"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not read")
    return tree | {
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "vllm": {"gpus_per_actor": 1, "num_actors": 8},
        "reference": {"engine": "vllm"},
        "train": {"use_gpu": True, "num_workers": 8, "global_batch_size": 16},
    }


def test_eight_billion_parameters_on_eight_gpus(eight_billion: dict[str, Any]):
    made = plan(eight_billion, memory=80 * GIB, mfu=0.4, peak_tflops=989.0, price=3.0)
    [stage] = made.lacking
    assert stage.name == "train" and stage.memory is not None
    assert "a worker has 80.0 GiB, of which weights, gradients and optimizer take about 134.6" in stage.memory.lacking
    assert stage.memory.knob == "-o train.strategy=fsdp"
    said = "\n".join(lines(made))
    assert "train fits with: -o train.strategy=fsdp" in said
    assert "8 × 1 CPU and 1 GPU" in said
    eight_billion["train"]["strategy"] = "fsdp"
    made = plan(eight_billion, memory=80 * GIB, mfu=0.4, peak_tflops=989.0, price=3.0)
    assert made.lacking == []
    stage = stage_of(made, "train")
    # 8.03e9 parameters, 18 bytes each over 8 workers.
    assert stage.memory.bytes > 18 * 8.03e9 / 8
    assert stage.gpus == 8 and stage.hours == pytest.approx(8 * stage.seconds / 3600)
    assert made.cost(stage) == pytest.approx(3 * stage.hours)
    tokens = made.counts.train.tokens_once * stage.rows / made.counts.train.pairs
    assert stage.seconds == pytest.approx(6 * 7.5e9 * tokens / (0.4 * 989e12 * 8), rel=0.1)  # and the head
    assert stage_of(made, "reference").gpus == 8


def test_the_knob_is_tried_and_makes_it_fit(eight_billion: dict[str, Any]):
    eight_billion["train"] |= {"num_workers": 1}
    [stage] = plan(eight_billion, memory=80 * GIB).lacking
    for override in stage.memory.knob.replace("-o ", "").split():
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        section = eight_billion
        for one in sections:
            section = section.setdefault(one, {})
        section[name] = json.loads(value) if value[0].isdigit() or value in ("true",) else value
    assert plan(eight_billion, memory=80 * GIB).lacking == []


def test_where_nobody_knows_the_memory_it_says_so(eight_billion: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    said = list(lines(plan(eight_billion)))
    assert said[-1].startswith("fits: unknown") and "--memory-gib" in said[-1]


def test_prompts_to_sample_for_are_an_upper_bound(tree: dict[str, Any], tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {n}."}}\n' for n in range(50)))
    sampling = {"samples": 4, "max_tokens": 20}
    made = plan({**tree, "data": {}, "generate": {"prompts": str(file), "sampling": sampling}})
    assert "50 prompts are counted" in made.counts.how and "upper bound" in made.counts.how
    assert stage_of(made, "generate").rows == 200
    assert made.counts.train.pairs + made.counts.held_out.pairs == 50


def run(tree: dict[str, Any], *more: str) -> Any:
    values = {f"{section}__{key}": value for section, part in tree.items() for key, value in part.items()}
    return in_process("plan", str(CONFIGS / "align_cpu.yaml"), *overrides(**values), *more)


def test_a_person_reads_a_table_and_a_program_json(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    speed = ("--tokens-per-second", "100", "--price-per-hour", "1.5")
    done = run(tree, *speed)
    assert done.code == 0, done.log
    assert re.search(r"^train +to do +~\d+ +~\d+ +[\d.]+ GiB +1 × 1 CPU|^train +to do", done.log, re.M)
    assert "fits: train needs about" in done.log
    told = json.loads(run(tree, *speed, "--json").log)
    assert [stage["stage"] for stage in told["stages"]] == ["ingest", "tokenize", "train", "evaluate"]
    [train] = [stage for stage in told["stages"] if stage["stage"] == "train"]
    assert train["fits"] is True and train["cost"] == pytest.approx(1.5 * train["hours"])
    assert run(tree, "--mfu", "0.4").code == 2


def test_all_that_is_printed_is_in_the_dictionary(tree: dict[str, Any]):
    made = plan(tree, tokens_per_second=100.0)
    told = as_dict(made)
    assert {stage["stage"]: stage["rows"] for stage in told["stages"]} == {s.name: s.rows for s in made.stages}
    assert json.loads(json.dumps(told)) == told
