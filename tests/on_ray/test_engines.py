"""The reference engines: vLLM reads prompts from its prefix cache, never log-probs from it, and long rows in chunks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_ray.config import VLLM, Model
from dpo_ray.pairs import TokenizedPair
from tests.command_line import LONGEST
from tests.rounding import of_logprob
from tests.training import small_model

pytestmark = pytest.mark.vllm

CHUNK = 112  # tokens that vLLM computes at once: no multiple or part of a block
NEAR = 20 * of_logprob(512)  # for vLLM has kernels of its own; a wrong token is a thousand times that
BLOCK = 128  # tokens of a block of vLLM's cache on CPU: so many at least are found in it, or none


def ids(count: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (count,), generator=random).tolist()


ALIKE = ids(BLOCK, 7)
PAIRS = [
    TokenizedPair("found in the cache", ids(BLOCK + 20, 1), ids(9, 2), ids(11, 3)),
    TokenizedPair("a prompt of whole blocks", ids(2 * BLOCK, 4), ids(5, 5), ids(7, 6)),
    TokenizedPair("answers alike beyond a block", ids(10, 8), [*ALIKE, *ids(20, 9)], [*ALIKE, *ids(30, 10)]),
    TokenizedPair("the first prompt again", ids(BLOCK + 20, 1), ids(4, 11), ids(6, 12)),
    TokenizedPair("one answer", ids(BLOCK + 1, 13), ids(4, 14), []),
    TokenizedPair("too short for the cache", ids(3, 15), ids(2, 16), ids(1, 17)),
    TokenizedPair("a prompt and answers of several chunks", ids(250, 18), ids(240, 19), ids(210, 20)),
]

Scores = tuple[list[list[float]], list[list[float]]]


def set_up() -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def both_engines(folder: str, pairs: list[TokenizedPair]) -> tuple[Scores, Scores, Scores, list[int], dict[str, int]]:
    """vLLM's scores, a second time, the trainer's, how many tokens vLLM found in its cache, and its schedule."""
    from dpo_ray.model.pair_scorer import TorchScorer
    from dpo_ray.on_ray.vllm_engine import VLLMScorer

    model = Model(path=folder, dtype="float32")
    scorer = VLLMScorer(model, VLLM(kv_cache_gib=1, max_num_batched_tokens=CHUNK), max_model_len=512)
    schedule = vars(scorer.llm.llm_engine.vllm_config.scheduler_config)
    cached: list[int] = []
    run = scorer._run

    def counting(sequences, *, read_cache):
        outputs = run(sequences, read_cache=read_cache)
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    scorer._run = counting
    first, again = scorer.score(pairs), scorer.score(pairs)
    wanted = ("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill")
    return first, again, TorchScorer(model).score(pairs), cached, {name: schedule[name] for name in wanted}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    pytest.importorskip("vllm")
    sizes = {"hidden_size": 128, "max_position_embeddings": 1024}  # vLLM has no attention for heads under 32
    folder: Path = small_model(tmp_path_factory.mktemp("engines") / "model", **sizes)
    # In a process of its own: vLLM starts a process group where it runs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_up) as pool:
        yield pool.submit(both_engines, str(folder), PAIRS).result(timeout=LONGEST)


@pytest.mark.parametrize("time", [0, 1], ids=["first time", "with everything in the cache"])
def test_vllm_gives_the_trainers_log_probs_whatever_is_in_its_cache(scores, time: int):
    found, expected = scores[time], scores[2]
    for side in (0, 1):
        for pair, got, right in zip(PAIRS, found[side], expected[side], strict=True):
            assert got == pytest.approx(right, abs=NEAR), pair.pair_id


def test_prompts_were_read_from_the_cache(scores):
    cached = scores[3]
    assert cached.count(BLOCK) >= 2 and max(cached) >= 2 * BLOCK


def test_scores_of_a_side_that_is_absent_are_empty(scores):
    assert scores[0][1][4] == []


def test_memory_is_bounded_by_chunks_of_long_rows(scores):
    assert scores[4] == {"max_num_batched_tokens": CHUNK, "max_num_seqs": CHUNK, "enable_chunked_prefill": True}
    assert len(PAIRS[-1].prompt_ids) + len(PAIRS[-1].chosen_ids) > 4 * CHUNK
