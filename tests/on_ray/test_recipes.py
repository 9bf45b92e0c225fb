"""The recipes with a reward model and with a judge, end to end: a model trained here, and one that vLLM serves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from dpo_ray.config import RewardModel
from dpo_ray.estimates import Estimate, proportion
from dpo_ray.scoring.classifier import TorchClassifier
from dpo_ray.scoring.reward_model import RewardModelScorer
from tests.command_line import CONFIGS, LONGEST, Finished, overrides, shards_of, summary_of

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

BRIEF = ["It is {n}.", "That makes {n}.", "I say {n}."]
LONG = ["Well, to be honest with you, {n} is what it is.", "Some say {n}, others say {n} again and again and again."]
SAMPLING = {"samples": 3, "max_tokens": 12, "dtype": "float32"}


@pytest.fixture(scope="module")
def preferences() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs in which the brief answer is chosen: to learn from, and held out."""
    rows = [
        {"prompt": f"Say {n}.", "chosen": BRIEF[n % 3].format(n=n), "rejected": LONG[n % 2].format(n=n)}
        for n in range(180)
    ]
    return rows[:120], rows[120:]


@pytest.fixture(scope="module")
def reward_model(preferences, tiny_model: Path, tmp_path_factory) -> Path:
    """A classifier that has learnt from pairs by the Bradley–Terry loss."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for first in range(0, 120, 12):
            batch = preferences[0][first : first + 12]
            chosen, rejected = (
                model(**_inputs(tokenizer, [(row["prompt"], row[side]) for row in batch])).logits[:, 0]
                for side in ("chosen", "rejected")
            )
            optimizer.zero_grad()
            torch.nn.functional.softplus(rejected - chosen).mean().backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _inputs(tokenizer: Any, dialogues: list[tuple[str, str]]) -> Any:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for prompt, answer in dialogues
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


@pytest.fixture(scope="module")
def run(one_ray, tmp_path_factory, servable_model):
    """A function that runs a recipe on a few prompts, and the output folder."""
    folder = tmp_path_factory.mktemp("recipes")
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(16))

    def recipe(name: str, **more: Any) -> tuple[Finished, Path]:
        settings = {
            "run__output": str(folder / name),
            "model__path": str(servable_model),
            "generate__prompts": str(folder / "prompts.jsonl"),
            "generate__sampling": SAMPLING,
            "vllm": {"cpus_per_actor": 1, "kv_cache_gib": 1, "max_num_seqs": 16},
            "reference__engine": "torch",
            "reference__calibration_pairs": 4,
            "train__num_workers": 1,
            "train__global_batch_size": 4,
            "train__tokens_per_microbatch": 1024,
            "evaluate__win_rate__sampling": {**SAMPLING, "include_greedy": True},
            "publish__gate": {"accuracy_above": None},
        }
        return one_ray("run", str(CONFIGS / f"{name}.yaml"), *overrides(**(settings | more))), folder / name

    return recipe


def test_the_reward_model_has_learnt_what_is_better(reward_model, preferences):
    assert held_out_accuracy(reward_model, preferences[1]).low > 0.5


def held_out_accuracy(folder: Path, rows: list[dict[str, str]]) -> Estimate:
    source = RewardModel(path=str(folder))
    scorer = RewardModelScorer(source, TorchClassifier(source))
    candidates = [
        {
            "prompt_id": str(n),
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [{"text": row["chosen"]}, {"text": row["rejected"]}],
        }
        for n, row in enumerate(rows)
    ]
    return proportion(sum(chosen.score > rejected.score for chosen, rejected in scorer.score(candidates)), len(rows))


@pytest.fixture
def other_model(servable_model: Path, tmp_path: Path) -> Path:
    """Another one than the recipe begins with."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path / "stranger"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(AutoConfig.from_pretrained(servable_model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(servable_model).save_pretrained(folder)
    return folder


@pytest.mark.long
def test_a_recipe_with_a_reward_model(run, reward_model, other_model):
    done, output = run(
        "reward_model_cpu",
        generate__reward=[{"type": "reward_model", "path": str(reward_model), "name": "reward model"}],
        evaluate__win_rate__against={"path": str(other_model)},
    )
    assert done.code == 0, done.log
    rows = pairs(output)
    assert rows
    for row in rows:
        lineage = json.loads(row["lineage"])
        assert lineage["chosen"]["scores"]["reward model"] - lineage["rejected"]["scores"]["reward model"] >= 0.1
    summary = summary_of(output)
    assert summary["eval"]["win_rate"]["n"] > 0 and summary["eval"]["greedy_win_rate"]["n"] > 0
    assert "Win rate against stranger, judged by brief_answer:" in done.log  # not by what made the pairs
    assert summary["eval"]["against"] == "stranger" and "sample_other" in summary["stages"]
    assert (
        len(list((output / "artifacts" / "candidates").glob("*/manifest.json"))) == 3
    )  # of the pairs, the stranger's, the tuned's
    assert "win rate against stranger" in (output / "runs" / summary["run_id"] / "report.html").read_text()
    assert Path(summary["published"]).is_dir()


@contextlib.contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a model behind `vllm serve`, on loopback."""
    port = _free_port()
    # What `vllm serve` runs; that command itself asks for a package named vllm, and the CPU build has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "judge", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **env}, start_new_session=True)
        try:
            deadline = time.monotonic() + LONGEST
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(120)


def _free_port() -> int:
    """One that nobody is given who asks for any, as Ray does, while the server starts."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.long
def test_a_recipe_with_a_judge_behind_a_server(run, demo_model, tmp_path):
    with served(demo_model, tmp_path / "server.log") as address:
        judge = {
            "type": "judge", "name": "judge", "endpoint": {"base_url": address, "model": "judge"}, "max_tokens": 48,
            "attempts": 2,
        }  # fmt: skip
        rule = {"function": "dpo_ray.rewards:length_window", "arguments": {"at_most": 4}, "weight": 0.1}
        few = {**SAMPLING, "samples": 2}  # two questions a prompt, for the judge takes its time
        done, output = run("judge_cpu", generate__reward=[judge, rule], generate__sampling=few)
    assert done.code == 0, done.log
    scored = summary_of(output)["stages"]["reward: judge"]
    shares = scores(output, "judge")
    # Two answers to a prompt are one comparison, which one wins and the other loses, or a tie.
    assert shares and all(sorted(of_row) in ([0.0, 1.0], [0.5, 0.5]) for of_row in shares)
    assert scored["rows"]["kept"] == len(shares)
    assert Path(summary_of(output)["published"]).is_dir()


def pairs(output: Path) -> list[dict[str, Any]]:
    return [row for file in output.glob("artifacts/pairs/*/*.parquet") for row in pq.read_table(file).to_pylist()]


def scores(output: Path, name: str) -> list[list[float]]:
    fingerprint = summary_of(output)["stages"][f"reward: {name}"]["fingerprint"]
    files = shards_of(output, "rewards", fingerprint)
    return [row["scores"] for file in files for row in pq.read_table(file).to_pylist()]
