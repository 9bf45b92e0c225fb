"""From a file of preferences to an evaluated model, whole processes: `dpo-ray run` beside a script of TRL's.

    python -m benchmarks.end_to_end --trl-python <Python of the environment of requirements-trl.txt>

runs all of it in the project's environment, each row in a fresh process, in turn; what is finished is not run again.
Both sides get the same two Parquet files, of pairs to train on and of held-out ones, the same model, learning rate,
batch and epochs, those of pipelines/configs/align_cpu.yaml, and are timed from the start of their process to its end:

    ours, ours-…    dpo-ray run with align_cpu.yaml, as it is or with one of OVERRIDES, to its publication
    trl             load_dataset, DPOTrainer with the reference precomputed and activations kept, train, evaluate, save

TRL computes in bfloat16 at the batch size that a short trial (not counted) found fastest, gradients accumulated to the
same pairs a step. Held-out accuracy is that of one and the same scorer for all models: the project's forward pass in
float32. `--choose` runs only our rows, on --pairs few pairs: which configuration to ship.

The runs' folder:

    setting.json                            pairs, data and model
    <data>/train.parquet, held_out.parquet  what both sides read
    <data>/trial.json                       seconds of TRL's trial by batch size
    <data>/<row>.json                       one run, with the accuracy of its model
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from benchmarks.record import (
    OUR_PACKAGES,
    ROOT,
    TRL_PACKAGES,
    environment,
    table,
    versions,
    write_json,
)
from benchmarks.side_by_side import MODEL, SEED, longest, preference_pairs, token_ids
from benchmarks.speed.clock import machine_load

REPORT = ROOT / "benchmarks" / "end_to_end.md"
CONFIG = ROOT / "pipelines" / "configs" / "align_cpu.yaml"
TRL = "trl"
OURS = "ours"
OVERRIDES: dict[str, tuple[str, ...]] = {
    OURS: (),
    "ours-bfloat16": ("model.dtype=bfloat16",),
    "ours-two-workers": ("train.num_workers=2", "train.cpus_per_worker=1"),
    "ours-vllm": ("reference.engine=vllm", "vllm.cpus_per_actor=2"),
}
"""Row → what it sets otherwise than the shipped configuration."""
TRIAL_PAIRS = 32
_POLL = 1.0  # seconds between looks at who computes


# What both sides read


def write_pairs(folder: Path, data: str, num_pairs: int | None, num_held_out: int) -> None:
    """Two Parquet files, cut by prompt; of pairs within the configuration's limits alone, so that no side drops any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpo_ray.config.load import load_config
    from dpo_ray.model.folders import load_tokenizer

    limits = load_config(CONFIG, [f"run.output={folder}"]).data
    tokenizer = load_tokenizer(Path(setting_of(folder)["model"]))
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for pair in preference_pairs(Path(os.environ["DPO_RAY_DATA"]) / data):
        ids = token_ids(tokenizer, pair)
        completion = longest(ids) - len(ids["prompt_ids"])
        if len(ids["prompt_ids"]) > limits.max_prompt_tokens or completion > limits.max_completion_tokens:
            continue
        prompt, *answers = pair
        row = {"prompt": prompt, **dict(zip(("chosen", "rejected"), map(_said, answers), strict=True))}
        by_prompt.setdefault(json.dumps(prompt, sort_keys=True), []).append(row)
    groups = list(by_prompt.values())
    random.Random(SEED).shuffle(groups)
    held_out: list[dict[str, Any]] = []
    while len(held_out) < num_held_out:
        held_out += groups.pop()
    train = [row for group in groups for row in group][:num_pairs]
    if num_pairs is not None and len(train) < num_pairs:
        sys.exit(f"{data} has only {len(train)} pairs beside {len(held_out)} held-out ones; lower --pairs.")
    for name, rows in (("train", train), ("held_out", held_out)):
        place = folder / data / f"{name}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), place)


def _said(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def setting_of(folder: Path) -> dict[str, Any]:
    """What all runs of a folder have in common."""
    found: dict[str, Any] = json.loads((folder / "setting.json").read_text())
    return found


# A row


def run_ours(folder: Path, data: str, row: str) -> dict[str, Any]:
    """`dpo-ray run`, and what its summary says of its stages."""
    place = folder / data
    output = place / row
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "run.output": output, "run.name": "aligned", "model.path": setting_of(folder)["model"],
        "data.train": place / "train.parquet", "data.eval": place / "held_out.parquet",
        # Whatever the model has come to, its accuracy is to be told and not to end the run.
        "publish.gate.accuracy_above": 0.0,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in options.items()] + list(OVERRIDES[row])
    command = [sys.executable, "-m", "pipelines.cli", "run", str(CONFIG)]
    measured = timed([*command, *(word for option in given for word in ("-o", option))], place / f"{row}.log")
    [summary] = (output / "runs").glob("*/summary.json")
    told = json.loads(summary.read_text())
    [model] = (output / "artifacts" / "train").glob("*/model")
    stages = {name: stage["seconds"] for name, stage in told["stages"].items()}
    return {
        **measured,
        "model": str(model),
        "overrides": list(OVERRIDES[row]),
        "stages": {**stages, "beside the stages": round(measured["wall"] - sum(stages.values()), 1)},
        "environment": environment((*OUR_PACKAGES, "ray")),
    }


def run_trl(folder: Path, data: str, python: str, sizes: Sequence[int]) -> dict[str, Any]:
    """TRL's script, and how long each of its parts took."""
    place = folder / data
    size = fastest_batch(place, python, sizes)
    output = place / TRL
    shutil.rmtree(output, ignore_errors=True)
    measured = timed([*_script(python, place, output), "--batch-size", str(size)], place / f"{TRL}.log")
    told = json.loads((output / "told.json").read_text())
    return {**measured, "model": str(output / "model"), "batch_size": size, **told}


def fastest_batch(place: Path, python: str, sizes: Sequence[int]) -> int:
    """By the steps of a short trial, of several; found once for a data set."""
    if len(sizes) == 1:
        return sizes[0]
    kept = place / "trial.json"
    if not kept.is_file():
        seconds = {}
        for size in sizes:
            output = place / f"trial-{size}"
            timed(
                [*_script(python, place, output), "--batch-size", str(size), "--first", str(TRIAL_PAIRS)],
                place / "trial.log",
            )
            parts = json.loads((output / "told.json").read_text())["stages"]
            seconds[size] = parts["reference"] + parts["train"]
            shutil.rmtree(output)
        write_json(kept, seconds)
    found = {int(size): value for size, value in json.loads(kept.read_text()).items()}
    return min(found, key=lambda size: found[size])


def _script(python: str, place: Path, output: Path) -> list[str]:
    here = ["--folder", str(place.parent), "--data", place.name, "--output", str(output)]
    return [python, "-m", "benchmarks.end_to_end", "--side", TRL, *here]


def timed(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Wall seconds of a process, from its start to its end, CPU seconds of it and all that descends from it, and the
    cores that others took meanwhile.

    Ends where the process fails, naming its log.
    """
    load = machine_load()
    began = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment())
        with watched(child.pid) as watch:
            code = child.wait()
    wall = time.monotonic() - began
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}; {log} says why.")
    return {"wall": wall, "cpu": watch.cpu, "load": load, "others": watch.others / wall}


def _environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": path}


Processes = Mapping[int, tuple[int, float]]
"""Process id → that of its parent, and its CPU seconds."""


class Watch:
    """Adds up what is computed from look to look; what a process computes after the last look at it is not known."""

    def __init__(self, pid: int, first: Processes):
        self.cpu = 0.0
        """CPU seconds of `pid` and of what descends from it."""
        self.others = 0.0
        """Of what descends neither from it nor from this process, and was there at two looks."""
        self._row, self._before = pid, first

    def look(self, now: Processes) -> None:
        for pid, (_, spent) in now.items():
            known = self._before.get(pid)
            if _descends(pid, {self._row}, now):
                self.cpu += spent - (known[1] if known is not None else 0.0)
            elif known is not None and not _descends(pid, {os.getpid()}, now):
                self.others += spent - known[1]
        self._before = now


def _descends(pid: int, ancestors: set[int], processes: Processes) -> bool:
    while pid in processes and pid not in ancestors:
        pid = processes[pid][0]
    return pid in ancestors


@contextmanager
def watched(pid: int) -> Iterator[Watch]:
    """Inside, looks are taken."""
    watch, ended = Watch(pid, cpu_seconds()), Event()

    def look() -> None:
        while not ended.wait(_POLL):
            watch.look(cpu_seconds())

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def cpu_seconds(proc: Path = Path("/proc")) -> Processes:
    """Of all processes of the machine."""
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found[int(stat.parent.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / tick
    return found


# TRL's script


def trl_script(folder: Path, data: str, output: Path, batch_size: int, first: int | None) -> None:
    """What a user of TRL would write, in its environment; the times of its parts are kept beside the model."""
    began = time.monotonic()
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    options = setting_of(folder)["options"]
    place = folder / data
    files = {"train": str(place / "train.parquet"), "test": str(place / "held_out.parquet")}
    pairs = load_dataset("parquet", data_files=files, cache_dir=str(output / "datasets"))
    if first is not None:
        pairs = {name: part.select(range(min(first, len(part)))) for name, part in pairs.items()}
    model = setting_of(folder)["model"]

    class Trainer(DPOTrainer):
        spent = 0.0

        def compute_ref_log_probs(self, *arguments: Any, **keywords: Any) -> Any:
            at = time.monotonic()
            found = super().compute_ref_log_probs(*arguments, **keywords)
            Trainer.spent += time.monotonic() - at
            return found

    trainer = Trainer(
        model=model,
        args=DPOConfig(
            output_dir=str(output / "trainer"),
            model_init_kwargs={"dtype": "float32"},
            bf16=True,
            use_cpu=True,
            beta=options["beta"],
            learning_rate=options["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=options["warmup_fraction"],  # below 1 it is a share of the steps
            max_grad_norm=options["max_grad_norm"],
            num_train_epochs=options["epochs"],
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=max(1, options["global_batch_size"] // batch_size),
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            max_length=options["max_length"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    loaded = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    told = trainer.evaluate()
    evaluated = time.monotonic()
    trainer.save_model(str(output / "model"))
    stages = {
        "imports, loading, tokenizing": loaded - began - Trainer.spent,
        "reference": Trainer.spent,
        "train": trained - loaded,
        "evaluate": evaluated - trained,
        "save": time.monotonic() - evaluated,
    }
    stages = {name: round(seconds, 1) for name, seconds in stages.items()}
    own = {"own_accuracy": told.get("eval_rewards/accuracies")}
    write_json(output / "told.json", {"stages": stages, **own, "environment": environment(TRL_PACKAGES)})


# The one scorer


def accuracy(folder: Path, data: str, model: str) -> dict[str, Any]:
    """Of a trained model on the held-out pairs against the model that it was made from, with a 95% interval."""
    import pyarrow.parquet as pq

    from dpo_ray.config import Model
    from dpo_ray.evaluation.agreement import NONE
    from dpo_ray.evaluation.margins import preference_accuracy
    from dpo_ray.model.folders import load_tokenizer
    from dpo_ray.model.pair_scorer import TorchScorer
    from dpo_ray.pairs import TokenizedPair

    base = setting_of(folder)["model"]
    tokenizer = load_tokenizer(Path(base))
    rows = pq.read_table(folder / data / "held_out.parquet").to_pylist()
    pairs = [
        TokenizedPair(
            f"{n}",
            **token_ids(tokenizer, (row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])),
        )
        for n, row in enumerate(rows)
    ]
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        [[sum(tokens) for tokens in side] for side in TorchScorer(Model(path=path)).score(pairs)]
        for path in (model, base)
    )
    import numpy as np

    margins = np.array(chosen) - np.array(ref_chosen) - (np.array(rejected) - np.array(ref_rejected))
    found = preference_accuracy(margins, NONE)
    return {**(found.as_dict() if found else {}), "mean_margin": float(margins.mean())}


# The report


def report(folder: Path, data: Sequence[str], rows: Sequence[str]) -> str:
    """The tables of what is finished."""
    parts = []
    for name in data:
        runs = {row: json.loads(path.read_text()) for row in rows if (path := folder / name / f"{row}.json").is_file()}
        if runs:
            parts.append(_of_data(folder, name, runs))
    return "\n\n".join(parts)


def _of_data(folder: Path, data: str, runs: Mapping[str, dict[str, Any]]) -> str:
    import pyarrow.parquet as pq

    counts = {name: pq.read_metadata(folder / data / f"{name}.parquet").num_rows for name in ("train", "held_out")}
    trl = runs.get(TRL)
    lines, stages = [], []

    def times(what: str, run: Mapping[str, Any]) -> str:
        return f"{trl[what] / run[what]:.2f}" if trl is not None and run is not trl else ""

    for row, run in runs.items():
        found = run["accuracy"]
        at = run["load"]["busy_cores"]
        lines.append(
            [
                row,
                ", ".join(run.get("overrides", [])) or (f"batches of {run['batch_size']}" if run is trl else ""),
                f"{run['wall']:.0f}",
                f"{run['cpu']:.0f}",
                times("wall", run),
                times("cpu", run),
                f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if "value" in found else "undefined",
                f"{found['mean_margin']:.2f}",
                f"{'' if at is None else f'{at:.2f}'}, {run['others']:.2f}",
            ]
        )
        stages.append(f"- {row}: {', '.join(f'{k} {v:.1f}' for k, v in run['stages'].items())}")
    head = ["row", "set otherwise", "wall s", "CPU s", "TRL's wall over it", "TRL's CPU", "held-out accuracy"]
    head += ["margin, nats", "others' cores"]
    told = f"{data}: {counts['train']} pairs, {counts['held_out']} held out"
    return "\n".join([f"### {told}", "", table(head, lines), "", "Seconds of each part:", "", *stages])


def heading(folder: Path, data: Sequence[str]) -> str:
    """When, where and on what the newest rows ran."""
    found = [json.loads(path.read_text()) for name in data for path in sorted((folder / name).glob("*.json"))]
    environments = {tuple(run["environment"]["versions"]): run["environment"] for run in found if "environment" in run}
    last = next(run["environment"] for run in found if "environment" in run)
    options = ", ".join(f"{key} {value}" for key, value in setting_of(folder)["options"].items())
    return (
        f"## {datetime.now(UTC):%Y-%m-%d} (commit {last['commit']})\n\n"
        f"{last['hardware']}; {versions(*environments.values())}. {options}. `others' cores`: in use at a row's start, "
        "and taken meanwhile by processes that are not the row's."
    )


def settle(folder: Path) -> None:
    """Write down the model and the options of the shipped configuration, once for a folder."""
    from dpo_ray.config.load import load_config
    from dpo_ray.model.resolve import resolve

    if (folder / "setting.json").is_file():
        return
    config = load_config(CONFIG, [f"run.output={folder}"])
    train = config.train
    options = {
        "beta": train.loss.beta,
        "learning_rate": train.learning_rate,
        "warmup_fraction": train.warmup_fraction,
        "max_grad_norm": train.max_grad_norm,
        "global_batch_size": train.global_batch_size,
        "epochs": train.epochs,
        "max_length": config.data.max_prompt_tokens + config.data.max_completion_tokens,
    }
    write_json(folder / "setting.json", {"model": str(resolve(MODEL)), "options": options})


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "end_to_end")
    parser.add_argument("--data", nargs="+", default=["polite_demo", "hh_helpful"])
    parser.add_argument("--pairs", type=int, help="to train on; default: all")
    parser.add_argument("--held-out", type=int, default=200, help="pairs at least; default 200")
    parser.add_argument("--rows", nargs="+", choices=[*OVERRIDES, TRL], default=[OURS, TRL])
    parser.add_argument("--choose", action="store_true", help="all rows of ours instead, and not TRL")
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"), help="Python of TRL's environment")
    parser.add_argument("--trl-batch-sizes", type=int, nargs="+", default=[2, 4, 8], help="one: it is not tried out")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--write", action="store_true", help=f"put the report at the end of {REPORT.name}")
    parser.add_argument("--side", choices=[TRL], help="run TRL's script itself")
    script = parser.add_argument_group("with --side")
    script.add_argument("--output", type=Path)
    script.add_argument("--batch-size", type=int)
    script.add_argument("--first", type=int)
    arguments = parser.parse_args()
    folder, data = arguments.folder.absolute(), arguments.data
    if arguments.side == TRL:
        trl_script(folder, data[0], arguments.output, arguments.batch_size, arguments.first)
        return
    rows = list(OVERRIDES) if arguments.choose else arguments.rows
    if TRL in rows and arguments.trl_python is None and not arguments.report:
        parser.error("name the Python of TRL's environment with --trl-python, or leave the row out with --rows ours")
    if not arguments.report:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        for name in data:
            if not (folder / name / "held_out.parquet").is_file():
                write_pairs(folder, name, arguments.pairs, arguments.held_out)
            for row in rows:
                kept = folder / name / f"{row}.json"
                if not kept.is_file():
                    trl = row == TRL
                    sizes = arguments.trl_batch_sizes
                    run = run_trl(folder, name, arguments.trl_python, sizes) if trl else run_ours(folder, name, row)
                    write_json(kept, {**run, "accuracy": accuracy(folder, name, run["model"])})
                    print(f"{name}, {row}: {run['wall']:.0f} s", flush=True)
    text = f"{heading(folder, data)}\n\n{report(folder, data, rows)}\n"
    print(text)
    if arguments.write:
        REPORT.write_text(f"{REPORT.read_text().rstrip()}\n\n{text}" if REPORT.is_file() else text)


if __name__ == "__main__":
    main()
