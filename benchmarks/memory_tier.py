"""What a training learns and takes in fewer bytes: bytes for each weight, planned and held, and held-out accuracy.

    python -m benchmarks.memory_tier DATA --bytes
    python -m benchmarks.memory_tier DATA [--rows …] [--train 160] [--held-out 128] [--write]
    python -m benchmarks.memory_tier --plan

Trains the demo model on pairs of DATA (polite_demo: the same answer, polite and rude) in one process after the other:
adapters on a base in float32, bfloat16, 4 and 8 bits, and all weights with AdamW in float32, 8 bits and bfloat16. Seed,
pairs and their order are the same. The reference is scored as the reference stage does it. --bytes measures the
storages of weights, gradients and moments in a step. Each row is kept in --folder as it is measured; --write makes
memory_tier.md of those that are there. --plan prints what 8B and 70B take on GPUs, by dpo_ray.training.memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import ROOT, environment, table, versions, write_json
from benchmarks.side_by_side import MODEL, SEED, preference_pairs, token_ids

if TYPE_CHECKING:
    from dpo_ray.config import LoRA
    from dpo_ray.pairs import TokenizedPair

_GIB = 2**30
_BATCH = 8
_MOST_TOKENS = 120  # of a pair; 973 of the 992 have no more
_PACKAGES = ("torch", "transformers", "peft", "torchao", "bitsandbytes")

ADAPTERS = {"learning_rate": 5e-4}
WHOLE = {"learning_rate": 2e-5}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA, base in float32": ({"lora": {}}, ADAPTERS),
    "LoRA, base in bfloat16": ({"lora": {}, "dtype": "bfloat16"}, ADAPTERS),
    "LoRA, base in 4 bits (nf4)": ({"lora": {"quantization": "nf4"}}, ADAPTERS),
    "LoRA, base in 8 bits (int8)": ({"lora": {"quantization": "int8"}}, ADAPTERS),
    "all weights, adamw": ({}, WHOLE),
    "all weights, adamw_8bit": ({}, {**WHOLE, "optimizer": "adamw_8bit"}),
    "all weights, adamw_bf16": ({"dtype": "bfloat16"}, {**WHOLE, "optimizer": "adamw_bf16"}),
    "all weights, adamw_8bit_bf16": ({"dtype": "bfloat16"}, {**WHOLE, "optimizer": "adamw_8bit_bf16"}),
}
"""What is set of `model` and of `train`."""


def held_bytes(tensors: Iterable[Any]) -> int:
    """Of the tensors' storages on this process, each counted once; of one that is packed, of what it is made of."""
    from torch import nn
    from torch.distributed.tensor import DTensor

    found: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        packed = hasattr(local, "__tensor_flatten__") and type(local) is not nn.Parameter
        inner = [getattr(local, name) for name in local.__tensor_flatten__()[0]] if packed else [local]
        found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inner}
    return sum(found.values())


def pairs_of(data: Path, count: int) -> list[TokenizedPair]:
    """The first ones by the hash of their prompt, so that which are held out does not depend on the order of a file."""
    import hashlib

    from transformers import AutoTokenizer

    from dpo_ray.model.resolve import resolve
    from dpo_ray.pairs import TokenizedPair

    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    found: dict[str, TokenizedPair] = {}
    for pair in preference_pairs(data):
        name = hashlib.sha256(json.dumps(pair[0]).encode()).hexdigest()
        made = TokenizedPair(name, **token_ids(tokenizer, pair))
        if made.num_tokens <= _MOST_TOKENS:
            found.setdefault(name, made)
    return [found[name] for name in sorted(found)[:count]]


def measure(name: str, data: Path, num_train: int, num_held_out: int) -> dict[str, Any]:
    """Train in this process, on one thread."""
    import numpy as np
    import torch

    from benchmarks.side_by_side import with_reference
    from dpo_ray.config import Model, Train
    from dpo_ray.evaluation.margins import preference_accuracy
    from dpo_ray.model.pair_scorer import TorchScorer
    from dpo_ray.model.resolve import ModelFolder
    from dpo_ray.training.batch import Share
    from dpo_ray.training.checkpoint import TrainState
    from dpo_ray.training.memory import shape_of, state_of
    from dpo_ray.training.optim import learning_rate, make_optimizer
    from dpo_ray.training.parallel import Rank, forget_gathered
    from dpo_ray.training.start import start_policy
    from dpo_ray.training.step import Learner

    torch.set_num_threads(1)
    of_model, of_train = ROWS[name]
    model = Model.model_validate({"path": MODEL, **of_model})
    options = Train.model_validate({"global_batch_size": _BATCH, "entropy_every_steps": None, **of_train})
    pairs = pairs_of(data, num_train + num_held_out)
    pairs = with_reference(pairs, TorchScorer(model).score(pairs))
    held_out, trained = pairs[:num_held_out], pairs[num_held_out:]
    me = Rank(0, 1, torch.device("cpu"))
    scorer, forward = start_policy(ModelFolder.of(model), model, options, me, seed=SEED)
    optimizer = make_optimizer(scorer.model, options, seed=SEED)
    learner = Learner(forward, scorer, optimizer, None, options, me, TrainState())
    weights = [p for p in scorer.parameters() if p.requires_grad]
    gradients: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(held_bytes(p.grad for p in weights)))
    began, losses = time.monotonic(), []
    num_steps = len(trained) // _BATCH
    for number in range(num_steps):
        batch = trained[number * _BATCH : (number + 1) * _BATCH]
        result = learner.step(Share([batch[:4], batch[4:]], batch[0]), learning_rate(number, num_steps, options), None)
        losses.append(result.metrics["loss"])
    seconds = time.monotonic() - began
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    scorer.eval()
    margins = []
    with torch.no_grad():
        for pair in held_out:
            values = scorer(scorer.collate([pair])).logprobs - torch.tensor(
                [*(pair.chosen_ref_logprobs or ()), *(pair.rejected_ref_logprobs or ())]
            )
            cut = len(pair.chosen_ids)
            margins.append(float(values[:cut].sum() - values[cut:].sum()))
    accuracy = preference_accuracy(np.array(margins))
    assert accuracy is not None
    forget_gathered(forward)  # copies that were computed with are no weights of their own
    shape = shape_of(ModelFolder.of(model))
    planned = state_of(shape, model, options, 1)
    return {
        "planned": {part: getattr(planned, part) for part in ("weights", "gradients", "moments")},
        "held": {
            "weights": held_bytes(scorer.parameters()),
            "gradients": gradients[-1],
            "moments": held_bytes(moments),
        },
        "parameters": shape.parameters,
        "losses": losses,
        "accuracy": [accuracy.value, accuracy.low, accuracy.high],
        "margin": sum(margins) / len(margins),
        "pairs": [len(trained), len(held_out)],
        "seconds": seconds,
        "environment": environment(_PACKAGES),
    }


def plan() -> str:
    """8B (Llama 3.1) and 70B in bfloat16 with activation checkpointing: GiB of a GPU by part, and tokens that fit."""
    from dpo_ray.config import LoRA, Model, Train
    from dpo_ray.errors import ConfigError
    from dpo_ray.model.logprobs import TILE_TOKENS
    from dpo_ray.training.memory import Shape, bytes_per_token, gathered_bytes, state_of, tokens_that_fit

    def shape(layers: int, hidden: int, wide: int, heads: int) -> Shape:
        narrow = hidden * 8 // heads  # of keys and values
        linear = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, wide)] * 3
        inside, ends = sum(a * b for a, b in linear), 2 * 128256 * hidden + hidden
        return Shape(
            layers * (inside + 2 * hidden) + ends, layers, hidden, wide, 128256, heads, outside=ends, tied=False,
            linear=layers * inside, sides=layers * sum(a + b for a, b in linear),
        )  # fmt: skip

    eight, seventy = shape(32, 4096, 14336, 32), shape(80, 8192, 28672, 64)
    lora = {kind or "": LoRA(rank=16, quantization=kind) for kind in (None, "int8", "nf4")}
    whole: list[dict[str, Any]] = [
        {},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adamw_bf16"},
        {"optimizer": "adamw_8bit_bf16"},
        {"offload": True},
    ]
    ways: list[tuple[str, LoRA | None, dict[str, Any]]] = [
        *((", ".join(f"{k}={v}" for k, v in more.items()) or "all weights", None, more) for more in whole),
        *((f"LoRA{f', {kind}' if kind else ''}", options, {}) for kind, options in lora.items()),
    ]
    tokens, rows = 4096, []
    for (size, of, gpus), (name, adapters, more) in itertools.product(
        (("8B", eight, 1), ("8B", eight, 8), ("70B", seventy, 8), ("70B", seventy, 64)), ways
    ):
        model = Model(path="m", dtype="bfloat16", lora=adapters)
        train = Train(use_gpu=True, num_workers=gpus, strategy="fsdp", activation_checkpointing=True, **more)
        state = state_of(of, model, train, gpus)
        gathered, batch = gathered_bytes(of, model, train, gpus), tokens * bytes_per_token(of, model, train)
        logits = 3 * TILE_TOKENS * 4 * of.vocabulary
        parts = [state.weights, state.gradients, state.moments, gathered, batch, logits]
        on_gpu = sum(parts[3:] if state.on_host else parts)
        fits = []
        for memory in (80, 141):
            try:
                fits.append(str(tokens_that_fit(of, model, train, memory=memory * _GIB, num_workers=gpus)))
            except ConfigError:
                fits.append("–")
        host = f"{gpus * state.all / _GIB:.0f}" if state.on_host else "0"
        rows.append(
            [size, str(gpus), name, *(f"{part / _GIB:.1f}" for part in parts), f"{on_gpu / _GIB:.1f}", host, *fits]
        )
    head = ["model", "GPUs", "how", "weights", "gradients", "moments", "gathered", f"{tokens} tokens", "logits"]
    return table([*head, "a GPU, together", "on hosts, all GPUs", "tokens in 80 GiB", "in 141 GiB"], rows)


def report(folder: Path) -> str:
    """Of the rows that have been measured."""
    held, found = (
        {name: json.loads(path.read_text()) for name in ROWS if (path := _kept(folder, name, kind)).is_file()}
        for kind in ("bytes", "learned")
    )
    made = environment(_PACKAGES)
    bytes_rows, learned = [], []
    for name, row in held.items():
        cells = [
            f"{row['planned'][part] / row['parameters']:.2f} / {row['held'][part] / row['parameters']:.2f}"
            for part in ("weights", "gradients", "moments")
        ]
        total = [sum(row[side].values()) / row["parameters"] for side in ("planned", "held")]
        bytes_rows.append([name, *cells, f"{total[0]:.2f} / {total[1]:.2f}", f"{total[0] / total[1]:.3f}"])
    for name, row in found.items():
        value, low, high = row["accuracy"]
        last = sum(row["losses"][-4:]) / len(row["losses"][-4:])
        pairs = [str(count) for count in row["pairs"]]
        learned.append([name, *pairs, f"{value:.3f} ({low:.3f}–{high:.3f})", f"{row['margin']:.2f}", f"{last:.3f}"])
    parts = [
        "# Memory, in fewer bytes",
        f"`python -m benchmarks.memory_tier`, {datetime.now(UTC):%Y-%m-%d}, commit {made['commit']}; "
        f"{made['hardware']}; {versions(made)}.",
        f"## Bytes for each weight of {MODEL.rpartition('/')[2]}, planned / held in a step",
        _measured(table(["", "weights", "gradients", "moments", "together", "planned / held"], bytes_rows), held),
        "Quantized bases are computed with in float32 here. Adapters of rank 16 on all linear layers are counted, over "
        "all weights of the model; so is the embedding, a fifth of this model, which stays in model.dtype.",
        f"## Held-out accuracy on polite_demo, after steps of {_BATCH} pairs",
        _measured(table(["", "pairs", "held out", "accuracy (95%)", "margin, nats", "last losses"], learned), found),
        "The same seed, pairs and order for all, learning rates 5e-4 for adapters and 2e-5 for all weights. Accuracy "
        "is of the policy as it was trained, quantized weights and adapters.",
        "## Plan: Llama 3.1 8B and 70B in bfloat16, strategy=fsdp, activation_checkpointing=true, GiB",
        plan(),
    ]
    return "\n\n".join(parts)


def _measured(rows: str, found: dict[str, Any]) -> str:
    """The table, and which rows it lacks."""
    missing = [name for name in ROWS if name not in found]
    told = f"Not measured: {'; '.join(missing)}."
    return "\n\n".join([*([rows] if found else []), *([told] if missing else [])])


def _kept(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{kind}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a folder of Parquet shards of preference pairs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=Path("memory_tier"), help="where rows are kept")
    parser.add_argument("--alone", action="store_true", help="measure the rows in this process")
    parser.add_argument("--bytes", action="store_true", help="measure bytes alone, in a step")
    parser.add_argument("--plan", action="store_true", help="print the plan for large models alone")
    parser.add_argument(
        "--write", action="store_true", help="make benchmarks/memory_tier.md of the rows that are there"
    )
    options = parser.parse_args()
    if options.plan:
        print(plan())
        return
    if options.data is not None and options.bytes:
        for name in options.rows:
            write_json(_kept(options.folder, name, "bytes"), measure(name, options.data, _BATCH, _BATCH))
            print(name, flush=True)
    elif options.data is not None:
        for name in options.rows:
            kept = _kept(options.folder, name, "learned")
            if options.alone:
                write_json(kept, measure(name, options.data, options.train, options.held_out))
            elif not kept.is_file():
                arguments = [str(options.data), "--alone", "--rows", name, "--folder", str(options.folder)]
                sizes = ["--train", str(options.train), "--held-out", str(options.held_out)]
                command = [sys.executable, "-m", "benchmarks.memory_tier", *arguments, *sizes]
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                row = json.loads(kept.read_text())
                print(f"{name}: accuracy {row['accuracy'][0]:.3f}, {math.ceil(row['seconds'])} s", flush=True)
    if options.write:
        (ROOT / "benchmarks" / "memory_tier.md").write_text(f"{report(options.folder)}\n")


if __name__ == "__main__":
    main()
