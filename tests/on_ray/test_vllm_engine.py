"""What vLLM is asked, and what is made of its answers; it is replaced by fakes, and no Ray is started."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_ray.config import VLLM, Model, Sampling
from dpo_ray.errors import EngineDied
from dpo_ray.on_ray import vllm_engine
from dpo_ray.on_ray.vllm_engine import VLLMSampler, VLLMScorer
from dpo_ray.pairs import TokenizedPair
from dpo_ray.shards.generate import Completion, Request


def test_pairs_go_to_vllm_in_groups_bounded_by_what_both_sides_have_with_their_prompt(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_VLLM_GROUP_TOKENS", 10)
    pairs = [TokenizedPair(str(n), [0] * n, [0], [0]) for n in (1, 2, 9, 1)]  # 4, 6, 20, 4 tokens
    sizes: list[int] = []

    class Groups(vllm_engine.VLLMScorer):
        def __init__(self) -> None:
            self.llm = SimpleNamespace(reset_prefix_cache=lambda: None)

        def _score(self, sequences):
            sizes.append(len(sequences))
            return [[float(len(prompt))] for prompt, _ in sequences]

    chosen, rejected = Groups().score(pairs)
    assert chosen == rejected == [[1.0], [2.0], [9.0], [1.0]]
    assert sizes == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("vocab_size", "tokens"), [(151_936, 785), (49_152, 2427), (512, 4096), (2_000_000, 128)])
def test_logits_of_scored_prompts_stay_below_a_gibibyte(vocab_size: int, tokens: int):
    assert vllm_engine.tokens_at_once(vocab_size) == tokens
    assert tokens == 128 or tokens * vocab_size * 9 <= 2**30


def engine_arguments(monkeypatch: pytest.MonkeyPatch, folder: Path, scores: bool, **options: Any) -> dict[str, Any]:
    """What vLLM would be built with for the model in a folder, if its vocabulary were of 151 936."""
    text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=151_936))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **arguments: arguments))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: text)
    return vllm_engine._engine(Model(path=str(folder)), "float32", VLLM(**options), 8192, scores)


def test_a_scoring_engine_on_cpu_computes_only_tokens_whose_logits_have_room(
    monkeypatch: pytest.MonkeyPatch, small_model: Path
):
    built = engine_arguments(monkeypatch, small_model, True, max_num_seqs=1000)
    assert (built["max_num_batched_tokens"], built["max_num_seqs"], built["max_model_len"]) == (785, 785, 8193)
    assert built["enable_chunked_prefill"]
    assert engine_arguments(monkeypatch, small_model, True, max_num_batched_tokens=64)["max_num_batched_tokens"] == 64
    for scores, gpus in ((False, 0), (True, 1)):  # no logits of prompts, or those of few tokens at a time
        assert "max_num_batched_tokens" not in engine_arguments(monkeypatch, small_model, scores, gpus_per_actor=gpus)


class FakeVLLM:
    """Gives each token the log-prob −id; for prompts in `cached` none to be trusted, unless it may not read them."""

    def __init__(self, by_token_ids: bool, cached: tuple[int, ...] = ()):
        self.cached = cached
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=by_token_ids))
        self.asked: list[tuple[list[int], bool]] = []

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, inputs: list[dict[str, list[int]]], sampling: list[dict[str, Any]], **_: Any) -> list[Any]:
        return [self._output(i["prompt_token_ids"], params) for i, params in zip(inputs, sampling, strict=True)]

    def _output(self, ids: list[int], params: dict[str, Any]) -> Any:
        skips = params["skip_reading_prefix_cache"]
        self.asked.append((ids, skips))
        found = len(ids) - 1 if ids[0] in self.cached and not skips else 0
        logprobs = [math.nan if n < found else -float(t) for n, t in enumerate(ids)]
        wanted = params.get("prompt_logprob_token_ids")
        by_token_ids = None if wanted is None or found else -wanted.astype(float)
        return SimpleNamespace(
            num_cached_tokens=found,
            prompt_logprobs=SimpleNamespace(start_indices=list(range(len(ids))), token_ids=ids, logprobs=logprobs),
            prompt_token_id_logprobs=by_token_ids,
        )


def vllm_scorer(monkeypatch: pytest.MonkeyPatch, llm: FakeVLLM) -> VLLMScorer:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: options))
    monkeypatch.setattr(vllm_engine, "_engine", lambda *_: llm)
    return VLLMScorer(Model(path="m"), VLLM(), 16)


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_vllm_is_not_asked_about_absent_sides(monkeypatch: pytest.MonkeyPatch, by_token_ids: bool):
    llm = FakeVLLM(by_token_ids)
    scorer = vllm_scorer(monkeypatch, llm)
    pairs = [TokenizedPair("d", [1], [2, 3], []), TokenizedPair("u", [4], [], [5]), TokenizedPair("p", [6], [7], [8])]
    assert scorer.score(pairs) == ([[-2.0, -3.0], [], [-7.0]], [[], [-5.0], [-8.0]])
    assert llm.asked == [([1, 2, 3], False), ([6, 7], False), ([4, 5], False), ([6, 8], False)]
    assert scorer.score(pairs[:1])[1] == [[]]


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_of_an_answer_in_turns_the_tokens_that_bear_the_loss_are_scored(
    monkeypatch: pytest.MonkeyPatch, by_token_ids: bool
):
    llm = FakeVLLM(by_token_ids)
    pair = TokenizedPair("p", [1], [2, 3, 4], [5, 6], chosen_mask=[True, False, True])
    assert vllm_scorer(monkeypatch, llm).score([pair]) == ([[-2.0, -4.0]], [[-5.0, -6.0]])
    assert llm.asked == [([1, 2, 3, 4], False), ([1, 5, 6], False)]


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_what_the_cache_has_of_a_completion_is_scored_again_without_it(
    monkeypatch: pytest.MonkeyPatch, by_token_ids: bool
):
    llm = FakeVLLM(by_token_ids, cached=(4,))
    pairs = [TokenizedPair("a", [1], [2, 3], [9]), TokenizedPair("b", [4], [5, 6], [7, 8])]
    assert vllm_scorer(monkeypatch, llm).score(pairs) == ([[-2.0, -3.0], [-5.0, -6.0]], [[-9.0], [-7.0, -8.0]])
    assert [ids for ids, skips in llm.asked if skips] == [[4, 5, 6], [4, 7, 8]]


@pytest.mark.parametrize(("unfinished", "expected"), [(False, ValueError), (True, EngineDied)])
def test_vllm_that_breaks_off_in_a_step_is_not_used_again(monkeypatch: pytest.MonkeyPatch, unfinished: bool, expected):
    def refuse(*_: Any, **__: Any) -> list[Any]:
        raise ValueError("too long")

    llm = FakeVLLM(False)
    llm.llm_engine.has_unfinished_requests = lambda: unfinished
    monkeypatch.setattr(llm, "generate", refuse)
    with pytest.raises(expected):
        vllm_scorer(monkeypatch, llm).score([TokenizedPair("p", [6], [7], [8])])


class Samples:
    """Answers each request with two completions, of which the second was cut; what came last is finished first."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.generator: list[int] = []
        self.waiting: list[tuple[str, dict[str, Any]]] = []
        self.llm_engine = self

    def enqueue(self, inputs: list[dict[str, list[int]]], params: list[dict[str, Any]], use_tqdm: bool) -> list[str]:
        self.generator.append(torch.initial_seed())
        first = len(self.asked)
        self.asked += [(i["prompt_token_ids"], p) for i, p in zip(inputs, params, strict=True)]
        names = [str(n) for n in range(first, len(self.asked))]
        self.waiting = list(zip(names, params, strict=True))
        return [f"{name}-a1b2c3d4" for name in names]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        name, params = self.waiting.pop()
        ended = SimpleNamespace(text="Yes.", finish_reason="stop", token_ids=[1, 2], cumulative_logprob=-0.5)
        cut = SimpleNamespace(text="No, for", finish_reason="length", token_ids=[3, 4, 5], cumulative_logprob=-9.0)
        running = [SimpleNamespace(request_id=other, finished=False, outputs=[ended]) for other, _ in self.waiting]
        return [*running, SimpleNamespace(request_id=name, finished=True, outputs=[ended, cut][: params["n"]])]


def sampled(sampler: VLLMSampler, prompts: list[list[int]], samples: int = 2) -> list[list[Completion]]:
    """By prompt; their seeds are 5, 6, …"""
    found = dict(sampler.sample([Request(ids, samples, 5 + n) for n, ids in enumerate(prompts)]))
    return [found[n] for n in range(len(prompts))]


def vllm_sampler(
    monkeypatch: pytest.MonkeyPatch, llm: Samples, sampling: Sampling | None = None, **options: Any
) -> VLLMSampler:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **given: given))
    monkeypatch.setattr(vllm_engine, "_engine", lambda *_: llm)
    return VLLMSampler(Model(path="m"), sampling or Sampling(samples=2, max_tokens=3), VLLM(**options), 16)


def test_completions_are_as_vllm_gives_them(monkeypatch: pytest.MonkeyPatch):
    llm = Samples()
    found = sampled(vllm_sampler(monkeypatch, llm), [[7, 8], [9]])
    assert found == [[Completion("Yes.", (1, 2), "stop", -0.5), Completion("No, for", (3, 4, 5), "length", -9.0)]] * 2
    assert [ids for ids, _ in llm.asked] == [[7, 8], [9]]
    assert {(params["n"], params["max_tokens"]) for _, params in llm.asked} == {(2, 3)}
    assert sampled(vllm_sampler(monkeypatch, llm), []) == []


def test_a_prompts_completions_are_given_as_soon_as_they_are_all_there(monkeypatch: pytest.MonkeyPatch):
    sampling = Sampling(samples=3, include_greedy=True, max_tokens=3)
    llm = Samples()
    sampler = vllm_sampler(monkeypatch, llm, sampling)
    for _ in range(2):  # the engine's numbers go on from call to call
        order = []
        for number, _ in sampler.sample([Request([7], 3, 5), Request([9], 1, 6), Request([8], 2, 7)]):
            order.append((number, len(llm.waiting)))
        assert order == [(2, 3), (1, 2), (0, 0)]


def test_every_option_of_sampling_goes_to_vllm(monkeypatch: pytest.MonkeyPatch):
    llm = Samples()
    given = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "presence_penalty": 0.1,
        "frequency_penalty": -0.2, "repetition_penalty": 1.1, "stop": ["\n\n"], "max_tokens": 3,
    }  # fmt: skip
    sampled(vllm_sampler(monkeypatch, llm, Sampling(samples=2, **given)), [[7]])
    [(_, params)] = llm.asked
    assert params == {**given, "n": 2, "seed": None, "logprobs": 0}
    assert set(given) == set(Sampling.model_fields) - {"samples", "include_greedy", "dtype"}


def test_the_greedy_completion_comes_first_on_request(monkeypatch: pytest.MonkeyPatch):
    llm = Samples()
    sampling = Sampling(samples=3, include_greedy=True, max_tokens=3)
    found = sampled(vllm_sampler(monkeypatch, llm, sampling), [[7], [9]], 3)
    assert [[c.text for c in of_prompt] for of_prompt in found] == [["Yes.", "Yes.", "No, for"]] * 2
    asked = [(ids, params["n"], params["temperature"]) for ids, params in llm.asked]
    assert asked == [([7], 1, 0.0), ([7], 2, 1.0), ([9], 1, 0.0), ([9], 2, 1.0)]
    llm.asked.clear()
    assert sampled(vllm_sampler(monkeypatch, llm, sampling), [[7]], 1) == [[Completion("Yes.", (1, 2), "stop", -0.5)]]
    assert [(params["n"], params["temperature"]) for _, params in llm.asked] == [(1, 0.0)]


def test_seeds_go_with_requests_on_gpu_and_into_the_generator_on_cpu(monkeypatch: pytest.MonkeyPatch):
    seeds = [2**62, 2**62 + 5]
    with torch.random.fork_rng():
        on_cpu, on_gpu = Samples(), Samples()
        requests = [Request([7], 2, seeds[0]), Request([9], 2, seeds[1])]
        list(vllm_sampler(monkeypatch, on_cpu).sample(requests))
        torch.manual_seed(11)
        list(vllm_sampler(monkeypatch, on_gpu, gpus_per_actor=1).sample(requests))
    assert [params["seed"] for _, params in on_cpu.asked] == [None, None]
    assert on_cpu.generator == [5]  # their sum, modulo 2**63
    assert [params["seed"] for _, params in on_gpu.asked] == seeds
    assert on_gpu.generator == [11]
