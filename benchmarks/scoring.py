"""How many completions a second a reward model scores, beside a plain loop of transformers.

    python -m benchmarks.scoring [--model <folder of a classifier>] [--rows 512] [--dtype float32] [--write]

All sides score the same dialogues with the same model in the same precision, by turns, after a first round that does
not count; vLLM is one of them where it is installed. The plain loop takes them in their order, 16 at a time, padded to
the longest of each batch, as examples of reward models do. Without --model it is SmolLM2-135M with a head drawn at
random. --write puts the table at the end of benchmarks/scoring.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions
from benchmarks.side_by_side import MODEL

_BATCH = 16
_ROUNDS = 3
_MEDIAN_WORDS, _SPREAD = 60, 0.8
_LONGEST_WORDS = 400


def dialogues(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of candidates with one completion each, of lengths as answers have them: log-normal."""
    rng = np.random.default_rng(seed)
    words = ["the", "answer", "to", "a", "question", "is", "seldom", "one", "word", "and", "never", "none"]
    rows = []
    for n in range(count):
        length = int(np.clip(rng.lognormal(np.log(_MEDIAN_WORDS), _SPREAD), 1, _LONGEST_WORDS))
        text = " ".join(rng.choice(words, length))
        prompt = [{"role": "user", "content": f"What is question {n} about?"}]
        rows.append({"prompt_id": f"{n:016x}", "prompt": prompt, "completions": [{"text": text}]})
    return rows


def plain(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[float]:
    """The plain loop."""
    import torch

    found: list[float] = []
    for first in range(0, len(rows), _BATCH):
        texts = [
            tokenizer.apply_chat_template(
                [*row["prompt"], {"role": "assistant", "content": row["completions"][0]["text"]}], tokenize=False
            )
            for row in rows[first : first + _BATCH]
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.inference_mode():
            found += model(**inputs).logits[:, 0].float().tolist()
    return found


def classifier(folder: Path) -> Path:
    """SmolLM2 as a sequence classifier, with a head drawn at random."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from dpo_ray.config import Model
    from dpo_ray.model.resolve import ModelFolder

    base = ModelFolder.of(Model(path=MODEL))
    tokenizer = base.tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(sides: dict[str, Callable[[], list[float]]]) -> dict[str, float]:
    """Median seconds of each side, taken by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(_ROUNDS + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scoring", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    import torch

    from dpo_ray.config import VLLM, RewardModel
    from dpo_ray.model.folders import load_tokenizer
    from dpo_ray.on_ray.vllm_engine import VLLMClassifier
    from dpo_ray.on_ray.vllm_version import has_vllm
    from dpo_ray.scoring.classifier import TorchClassifier
    from dpo_ray.scoring.models import model_of
    from dpo_ray.scoring.reward_model import RewardModelScorer

    def scores(scorer: RewardModelScorer) -> list[float]:
        return [scored[0].score for scored in scorer.score(rows)]

    rows = dialogues(arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or classifier(Path(folder))
        source = RewardModel(path=str(path), dtype=arguments.dtype)
        by_torch = TorchClassifier(source)
        tokenizer = load_tokenizer(path)
        tokenizer.padding_side = "right"
        sides: dict[str, Callable[[], list[float]]] = {
            "plain loop": lambda: plain(by_torch.model, tokenizer, rows),
            "dpo_ray, transformers": partial(scores, RewardModelScorer(source, by_torch)),
        }
        if has_vllm():
            options = VLLM(gpus_per_actor=int(torch.cuda.is_available()))
            by_vllm = VLLMClassifier(model_of(source), options, source.max_tokens)
            sides["dpo_ray, vLLM"] = partial(scores, RewardModelScorer(source, by_vllm))
    theirs, *ours = (run() for run in sides.values())
    difference = float(np.max(np.abs(np.subtract(ours, theirs))))
    seconds = measure(sides)
    lines = [
        [name, f"{found:.1f}", f"{len(rows) / found:.1f}", f"{seconds['plain loop'] / found:.2f}"]
        for name, found in seconds.items()
    ]
    found = environment(OUR_PACKAGES)
    name = arguments.model.name if arguments.model else "SmolLM2-135M"
    said = "\n\n".join(
        [
            f"## {datetime.now(UTC):%Y-%m-%d}: {len(rows)} dialogues, {name}, {arguments.dtype}",
            f"{versions(found)}; {found['hardware']}; commit {found['commit']}. Largest difference of a score from "
            f"the plain loop's: {difference:.1e}. Medians of {_ROUNDS} rounds.",
            table(["side", "seconds", "completions/s", "times the plain loop"], lines),
        ]
    )
    print(said)
    if arguments.write:
        path = ROOT / "benchmarks" / "scoring.md"
        before = path.read_text() if path.exists() else "# Scores by a reward model\n"
        path.write_text(f"{before.rstrip()}\n\n{said}\n")


if __name__ == "__main__":
    main()
