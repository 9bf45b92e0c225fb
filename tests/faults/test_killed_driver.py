"""SIGKILL of the driver while it generates; then the same command goes on to the end. (Other stages: the files beside.)

One real job on the real model: what is asserted is read off its logs and its artifacts.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.terminal import LOG
from tests.command_line import CONFIGS, LONGEST, Finished, dpo_ray, killed_at, overrides, processes_with, summary_of
from tests.rounding import ulps

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.vllm, pytest.mark.long]

PROMPTS = 18
MARK = ("DPO_RAY_TEST", f"killed driver {os.getpid()}")
NOISE = [
    "Triton",
    "NUMA",
    "constructor arguments in the object store",
    "Loading safetensors",
    "Progress bars disabled",
    "Execution plan of Dataset",
    "Token authentication",
    "Warning",
    "pid=",
]
"""What others print, and no reader of a terminal can use."""
NEAR = ulps(30 * 8, 32)
"""Of a token's log-prob by two engines: 30 layers of seven products and an attention, where logits reach 32."""


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed") / "out"


@pytest.fixture(scope="module")
def command(output, demo_model) -> list[str]:
    """The demo, cut down to what an interruption needs."""
    prompts = output.parent / "prompts.jsonl"
    prompts.write_text("".join((CONFIGS / "demo_prompts.jsonl").read_text().splitlines(keepends=True)[:PROMPTS]))
    sampling = {"samples": 4, "temperature": 0.8, "max_tokens": 32, "dtype": "float32"}
    settings = {
        "run__output": str(output),
        "generate__prompts": str(prompts),
        "generate__prompts_per_shard": 6,
        "generate__sampling": sampling,
        "generate__models": [],
        "generate__reward": "dpo_ray.rewards:likely",  # of any two answers it prefers one, however few tokens they have
        "generate__pairing": {"min_score_gap": 1e-6},
        "vllm__max_num_seqs": 24,  # a shard at a time
        "evaluate__win_rate__sampling": sampling,
        "reference__calibration_pairs": 4,
        "train__global_batch_size": 4,
        "train__num_workers": 1,
        "publish__gate": {"accuracy_above": None, "win_rate_above": None},
    }
    return ["run", str(CONFIGS / "demo_cpu.yaml"), *overrides(**settings)]


@pytest.fixture(scope="module")
def logs(command) -> Iterator[dict[str, Finished]]:
    """The logs of the killed run and of the one that came through; what they start is told by its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*MARK)
        yield {
            "killed": killed_at(r"\[candidates\] \d+/\d+ \w+ .* shard \w+ done", *command),
            "finished": dpo_ray(*command),
        }


def counts(done: Finished, stage: str) -> tuple[int, int, int]:
    """Of a stage's shards: how many there are, were finished already, and were to compute."""
    [line] = [line for line in done.lines(f"[{stage}] ") if "are finished already" in line][:1]
    finished, total, missing = map(int, re.findall(r"\d+", line.split("] ", 1)[1]))
    return total, finished, missing


def test_the_killed_run_goes_on_to_the_end(logs, output):
    assert logs["finished"].code == 0, logs["finished"].log
    assert Path(summary_of(output)["published"]).is_dir()


def test_no_finished_shard_is_computed_again(logs):
    total, before, missing = counts(logs["killed"], "candidates")
    assert (before, missing) == (0, total)
    again_total, finished, to_compute = counts(logs["finished"], "candidates")
    assert again_total == total and finished + to_compute == total
    # Progress lines are at most one in a few seconds, so they may name fewer shards than were finished.
    assert finished >= len([line for line in logs["killed"].lines("[candidates]") if line.count(" done")]) >= 1


def test_vllms_reference_agrees_with_the_trainers_forward(logs, output):
    summary = summary_of(output)
    assert summary["reference"]["calibration"]["token"]["max"] < NEAR
    # β of the log-probs of two answers of at most 32 tokens, off either way.
    assert summary["train"]["first_step_loss"] == pytest.approx(math.log(2), abs=0.1 * math.sqrt(64) * NEAR)


def test_a_run_says_its_own_lines_and_the_rest_to_its_log(logs, output):
    during, _, closing = logs["finished"].log.partition("\n\n")
    # A machine whose disk is nearly full is told so, and may be.
    assert all(re.match(r"\[[a-z_]+\] |\(raylet\).* is over 95% full", line) for line in during.splitlines()), during
    assert not [noise for noise in NOISE if noise in logs["finished"].log]
    log = output / "runs" / summary_of(output)["run_id"] / LOG
    assert f"Log:     {log}" in closing
    text = log.read_text()
    assert all(line in text for line in during.splitlines())
    assert "(RayTrainWorker pid=" in text and "Progress bars disabled" in text
    assert not set(text) & {"\x1e", "\x1f"}


def test_no_process_of_a_killed_run_is_left(logs):
    deadline = time.monotonic() + LONGEST  # the workers of a run that has just ended need some seconds
    while leftover := processes_with("=".join(MARK)):
        assert time.monotonic() < deadline, leftover
        time.sleep(1)


def test_the_published_folder_generates_in_plain_transformers(logs, output):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = summary_of(output)["published"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_published_folder_generates_in_plain_vllm(logs, output):
    program = (
        "import sys, vllm\n"
        "llm = vllm.LLM(sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=256)\n"
        "out = llm.chat([{'role': 'user', 'content': 'Why is the sky blue?'}], vllm.SamplingParams(max_tokens=12))\n"
        "print('SAID', out[0].outputs[0].text)\n"
    )
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("TQDM_DISABLE", None)  # vLLM divides by the time that its progress bar measured
    done = subprocess.run(
        [sys.executable, "-c", program, summary_of(output)["published"]],
        capture_output=True,
        text=True,
        timeout=LONGEST,
        env=environment,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert said and said[0].removeprefix("SAID").strip(), done.stdout[-2000:] + done.stderr[-2000:]
