"""Host memory of each worker of a sharded model: loading, a training step, a checkpoint, resuming, scoring, export.

    python -m benchmarks.sharding [--model 1b] [--workers 1 2 4] [--lora 16] [--whole] [--write]

Processes that exchange by gloo train a random model that is built from a configuration, whose files are written weight
by weight and removed afterwards. Measured from outside, some hundred times a second, is a process's anonymous memory
(RssAnon: pages of mapped files do not count), less what it holds once everything is imported. --whole has each worker
load the whole model and shard it then. Prints a table; --write puts it at the end of sharding.md. --plan prints what 8B
and 70B take on GPUs, by dpo_ray.training.memory, and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions

_MIB = 2**20
MODELS: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 19, "vocab_size": 64000},
    "300m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "vocab_size": 32000},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 24000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
}
STAGES = ("load", "try", "train", "checkpoint", "resume", "score", "export")
_HEADS = 8
_PART = 8  # tokens of a prompt, and of each answer
_PAIRS = 2  # of a worker in a step, a micro-batch each


def write_model(folder: Path, sizes: dict[str, int]) -> int:
    """Random weights in bfloat16, in one file, of which one at a time is in memory. Returns their number."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dpo_ray.model.safetensors_file import SafetensorsFile

    config = LlamaConfig(**sizes, num_attention_heads=_HEADS, num_key_value_heads=_HEADS, max_position_embeddings=256)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    state = model.state_dict()
    with SafetensorsFile.create(folder / "model.safetensors", state) as file:
        for name, like in state.items():
            drawn = torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=0.02)
            file.write(name, drawn if like.ndim > 1 else torch.ones_like(drawn))
    words = Tokenizer(WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return sum(like.numel() for like in state.values())


def work(rank: int, world: int, folder: Path, options: dict[str, Any], stage: Any, baseline: Any) -> None:
    """One worker: says in `stage` which of STAGES it is at, and in `baseline` what it held before."""
    import torch
    import torch.distributed as dist

    from dpo_ray.config import Model, Train
    from dpo_ray.model.policy import CompletionScorer, load_policy, torch_dtype
    from dpo_ray.pairs import TokenizedPair
    from dpo_ray.storage.location import Location
    from dpo_ray.training.batch import Share
    from dpo_ray.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
    from dpo_ray.training.export import export_policy
    from dpo_ray.training.optim import make_optimizer
    from dpo_ray.training.parallel import Rank, forget_gathered, parallelize
    from dpo_ray.training.step import Learner

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    lora = {"rank": options["lora"]} if options["lora"] else None
    model = Model.model_validate({"path": str(folder / "model"), "dtype": options["dtype"], "lora": lora})
    train = Train.model_validate(
        {"strategy": "fsdp", "num_workers": world, "global_batch_size": world * _PAIRS, "tokens_per_microbatch": 1,
         "loss": {"type": "orpo"}, "entropy_every_steps": None, "activation_checkpointing": True}
    )  # fmt: skip
    me = Rank(rank, world, torch.device("cpu"))
    ids = list(range(5, 5 + _PART))
    pairs = [TokenizedPair(str(n), ids, ids[1:] + ids[:1], ids[2:] + ids[:2]) for n in range(_PAIRS)]
    warm_up(me)

    @contextmanager
    def at(name: str) -> Iterator[None]:
        dist.barrier()
        stage.value = STAGES.index(name)
        yield
        dist.barrier()
        gc.collect()
        stage.value = -1
        dist.barrier()

    def load() -> tuple[CompletionScorer, Any]:
        how: dict[str, Any] = {"lora": model.lora, "activation_checkpointing": True}
        if options["whole"]:
            scorer = CompletionScorer(load_policy(folder / "model", **how)).train()
            return scorer, parallelize(scorer, "fsdp", me, torch_dtype(model.dtype))
        from dpo_ray.model.policy import load_part_of_policy
        from dpo_ray.training.parallel import part_of

        found = load_part_of_policy(folder / "model", part_of(me, train.sharding), **how)
        scorer = CompletionScorer(found.model).train()
        return scorer, parallelize(scorer, "fsdp", me, torch_dtype(model.dtype), weights=found.weights)

    def try_packed(scorer: CompletionScorer, forward: Any) -> None:
        if not options["whole"]:
            from dpo_ray.model.policy import use_packed_attention

            use_packed_attention(scorer, me.device, torch_dtype(model.dtype))
            forget_gathered(forward)

    gc.collect()
    baseline.value = anonymous(os.getpid())
    with at("load"):
        scorer, forward = load()
    with at("try"):
        try_packed(scorer, forward)
    if options["trains"]:
        optimizer = make_optimizer(scorer.model, train)
        learner = Learner(forward, scorer, optimizer, None, train, me, TrainState())
        share = Share([[pair] for pair in pairs], pairs[0])
        with at("train"):
            learner.step(share, 1e-6, None)
            learner.step(share, 1e-6, None)
        kept = folder / "checkpoint"
        kept.mkdir(exist_ok=True)
        parts = {"policy": scorer.model, "optimizer": optimizer, "average": None, "me": me}
        with at("checkpoint"):
            save_checkpoint(kept, state=TrainState(next_step=2), **parts)
        del learner, optimizer, scorer, forward, parts
        gc.collect()
        scorer, forward = load()
        try_packed(scorer, forward)
        optimizer = make_optimizer(scorer.model, train)
        with at("resume"):
            load_checkpoint(Location.of(kept), policy=scorer.model, optimizer=optimizer, average=None, me=me)
        del optimizer
    scorer.eval()
    with at("score"), torch.no_grad():
        scorer(scorer.collate(pairs))
        forget_gathered(forward)
    with at("export"):
        merged = model.model_copy(update={"lora": model.lora and model.lora.model_copy(update={"export": "merged"})})
        target = Location.of(folder / "exported")
        export_policy(target, policy=scorer.model, source=folder / "model", options=merged, dtype=None, me=me)
    dist.destroy_process_group()


def warm_up(me: Any) -> None:
    """Import what a training imports on its way, and make the first exchange."""
    import peft  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch.distributed.device_mesh import init_device_mesh

    init_device_mesh("cpu", (me.world_size,))
    torch.distributed.all_reduce(torch.zeros(4))
    weight = torch.zeros(8, 8, requires_grad=True)
    torch.optim.AdamW([weight], fused=True)
    (weight @ weight).sum().backward()


def anonymous(pid: int) -> int:
    """Bytes that a process holds beside mapped files; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def measure(world: int, folder: Path, options: dict[str, Any]) -> list[dict[str, int]]:
    """Of each worker, the largest number of bytes above its baseline in each stage."""
    os.environ.setdefault("MALLOC_TOP_PAD_", "0")  # what is freed is given back: gaps of the heap are not measured
    context = multiprocessing.get_context("spawn")
    stages = [context.Value("i", -1, lock=False) for _ in range(world)]
    baselines = [context.Value("q", 0, lock=False) for _ in range(world)]
    workers = [
        context.Process(target=work, args=(rank, world, folder, options, stages[rank], baselines[rank]))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    peaks: list[dict[str, int]] = [{} for _ in workers]
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.terminate()
            raise SystemExit("a worker has failed")
        for rank, worker in enumerate(workers):
            number = stages[rank].value
            if number >= 0:
                held = anonymous(worker.pid or 0) - baselines[rank].value
                peaks[rank][STAGES[number]] = max(peaks[rank].get(STAGES[number], 0), held)
        time.sleep(0.004)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights are trained")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--whole", action="store_true", help="each worker loads the whole model")
    parser.add_argument("--no-training", action="store_true", help="only load, score and export")
    parser.add_argument("--folder", type=Path, default=None, help="for the model's files, some GB")
    parser.add_argument("--write", action="store_true", help="put the table at the end of benchmarks/sharding.md")
    parser.add_argument("--plan", action="store_true", help="print the plan for large models alone")
    options = parser.parse_args()
    if options.plan:
        print(plan())
        return
    with tempfile.TemporaryDirectory(prefix="dpo-ray-sharding-", dir=options.folder) as scratch:
        folder = Path(scratch)
        (folder / "model").mkdir()
        count = write_model(folder / "model", MODELS[options.model])
        layer, ends = _sizes(MODELS[options.model])
        planned = {world: _planned(folder / "model", options, world) for world in options.workers}
        rows = []
        for world in options.workers:
            given = {"lora": options.lora, "dtype": options.dtype, "whole": options.whole}
            given["trains"] = not options.no_training
            peaks = measure(world, folder, given)
            print(json.dumps({"workers": world, "peaks": peaks}), flush=True)
            for rest in ("checkpoint", "exported"):
                shutil.rmtree(folder / rest, ignore_errors=True)
            most = {stage: max(peak.get(stage, 0) for peak in peaks) for stage in STAGES}
            rows.append(
                [str(world), f"{4 * count / world / _MIB:.0f}", *(f"{most[stage] / _MIB:.0f}" for stage in STAGES),
                 f"{planned[world] / _MIB:.0f}", f"{planned[world] / max(1, most['train']):.3f}"]
            )  # fmt: skip
    made = environment((*OUR_PACKAGES,))
    trained = f"LoRA of rank {options.lora}" if options.lora else "all weights trained"
    how = "each worker loads the whole model" if options.whole else "each worker reads its own part"
    head = ["workers", "its part", *STAGES, "train, planned", "planned / measured"]
    text = (
        f"## {options.model}, {trained}, {options.dtype}, {how}: {datetime.now(UTC):%Y-%m-%d} "
        f"(commit {made['commit']})\n\n"
        f"{os.cpu_count()} cores, {made['hardware']}; {versions(made)}. {count:,} weights; a layer is "
        f"{4 * layer / _MIB:.0f} MiB in float32, embedding and head {4 * ends / _MIB:.0f} MiB. The worker with the "
        f"largest peak, MiB above its baseline:\n\n{table(head, rows)}\n"
    )
    print(text)
    if options.write:
        report = ROOT / "benchmarks" / "sharding.md"
        before = report.read_text().rstrip() if report.exists() else "# Memory of a sharded model"
        report.write_text(f"{before}\n\n{text}")


def plan() -> str:
    """8B (Llama 3.1) on 1 and 8 GPUs and 70B on 8 and 64, in bfloat16: GiB of a GPU by part, and tokens that fit."""
    from dpo_ray.config import LoRA, Model, Train
    from dpo_ray.errors import ConfigError
    from dpo_ray.model.logprobs import TILE_TOKENS
    from dpo_ray.training.memory import Shape, bytes_per_token, gathered_bytes, state_bytes, tokens_that_fit

    eight = Shape(8_030_261_248, 32, 4096, 14336, 128256, 32, outside=2 * 128256 * 4096 + 4096, tied=False)
    seventy = Shape(70_553_706_496, 80, 8192, 28672, 128256, 64, outside=2 * 128256 * 8192 + 8192, tied=False)
    gib, tokens, rows = 2**30, 4096, []
    for name, shape, workers in (("8B", eight, 1), ("8B", eight, 8), ("70B", seventy, 8), ("70B", seventy, 64)):
        for lora, again in itertools.product((None, LoRA(rank=16)), (False, True)):
            model = Model(path="m", dtype="bfloat16", lora=lora)
            train = Train(use_gpu=True, num_workers=workers, strategy="fsdp", activation_checkpointing=again)
            parts = [
                state_bytes(shape, model, train, workers),
                gathered_bytes(shape, model, train, workers),
                tokens * bytes_per_token(shape, model, train),
                3 * TILE_TOKENS * 4 * shape.vocabulary,
            ]
            fit = []
            for memory in (80, 141):
                try:
                    found = tokens_that_fit(shape, model, train, memory=memory * gib, num_workers=workers)
                except ConfigError:
                    found = 0
                fit.append(str(found) if found else "does not fit")
            how = ["LoRA" if lora else "all weights", "yes" if again else "no"]
            rows.append([name, str(workers), *how, *(f"{n / gib:.1f}" for n in (*parts, sum(parts))), *fit])
    head = ["model", "GPUs", "trained", "activation checkpointing", "state", "gathered", f"{tokens} tokens", "logits"]
    return table([*head, "together", "tokens in 80 GiB", "in 141 GiB"], rows)


def _planned(folder: Path, options: argparse.Namespace, world: int) -> int:
    """Bytes of a worker in a training step, by dpo_ray.training.memory."""
    from dpo_ray.config import Model, Train
    from dpo_ray.model.logprobs import TILE_TOKENS
    from dpo_ray.model.resolve import ModelFolder
    from dpo_ray.training.activations import counted_bytes_per_token
    from dpo_ray.training.memory import gathered_bytes, shape_of, state_bytes

    lora = {"rank": options.lora} if options.lora else None
    model = Model.model_validate({"path": str(folder), "dtype": options.dtype, "lora": lora})
    train, of = Train(strategy="fsdp", activation_checkpointing=True), ModelFolder.of(model)
    shape = shape_of(of)
    tokens = 3 * _PART * (counted_bytes_per_token(of, model, train) or 0)
    logits = 3 * min(TILE_TOKENS, 2 * _PART) * 4 * shape.vocabulary
    held = state_bytes(shape, model, train, world) + gathered_bytes(shape, model, train, world)
    return int(held + tokens + logits)


def _sizes(sizes: dict[str, int]) -> tuple[int, int]:
    """Weights of a layer, and of embedding and head."""
    hidden = sizes["hidden_size"]
    layer = 4 * hidden**2 + 3 * hidden * sizes["intermediate_size"] + 2 * hidden
    return layer, 2 * hidden * sizes["vocab_size"]


if __name__ == "__main__":
    main()
