"""vLLM as an engine of the model stages: it generates and it scores. Who only names it does without torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.bins import batches
from dpo_ray.config import VLLM, Config, Model, Sampling
from dpo_ray.data.chat import ChatTokenizer
from dpo_ray.errors import ConfigError, DataError, EngineDied
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import Pool
from dpo_ray.pairs import Message, TokenizedPair, bearing_loss
from dpo_ray.shards.generate import Completion, Request

# Pairs of so many tokens are given to vLLM at once: enough to keep it busy, and their outputs, which hold an object or
# two for every token of the prompt, stay small whatever the size of a shard.
_VLLM_GROUP_TOKENS = 2**18


_LOGITS_BYTES = 2**30


_BYTES_PER_LOGIT = 9


class VLLMScorer:
    """Scores by vLLM's prompt log-probs, all chosen completions first: the rejected ones then find their prompts' keys
    and values in vLLM's prefix cache.

    What lies in the cache is not computed again and so has no log-probs (the CPU build gives uninitialised memory for
    it, vllm-project/vllm#42019). Where more than the prompt was found there, the sequence is scored again without.
    """

    def __init__(self, model: Model, options: VLLM, max_model_len: int):
        self.llm = _engine(model, model.dtype, options, max_model_len, True)
        # The newer runner, on CUDA, computes log-probs of given tokens only; the other one those of the whole prompt.
        self.by_token_ids = self.llm.llm_engine.vllm_config.use_v2_model_runner

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        # What an engine scored before would change the last bits: a prefix that lies in the cache is computed in
        # other pieces than one that does not.
        self.llm.reset_prefix_cache()
        chosen: list[list[float]] = []
        rejected: list[list[float]] = []
        for group in batches(pairs, _sequence_tokens, _VLLM_GROUP_TOKENS):
            of_chosen = self._score([(p.prompt_ids, p.chosen_ids) for p in group])
            of_rejected = self._score([(p.prompt_ids, p.rejected_ids) for p in group])
            chosen += [bearing_loss(v, p.chosen_mask) for v, p in zip(of_chosen, group, strict=True)]
            rejected += [bearing_loss(v, p.rejected_mask) for v, p in zip(of_rejected, group, strict=True)]
        return chosen, rejected

    def _score(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        present = [i for i, (_, completion) in enumerate(sequences) if completion]
        outputs = self._run([sequences[i] for i in present], read_cache=True)
        scores: list[list[float]] = [[] for _ in sequences]
        again = []
        for i, output in zip(present, outputs, strict=True):
            prompt, completion = sequences[i]
            # The last token of the prompt predicts the first one of the completion: it must have been computed.
            if output.num_cached_tokens is None or output.num_cached_tokens >= len(prompt):
                again.append(i)
            else:
                scores[i] = self._logprobs(output, prompt, completion)
        for i, output in zip(again, self._run([sequences[i] for i in again], read_cache=False), strict=True):
            scores[i] = self._logprobs(output, *sequences[i])
        return scores

    def _run(self, sequences: list[tuple[list[int], list[int]]], *, read_cache: bool) -> list[Any]:
        if not sequences:
            return []
        inputs = [{"prompt_token_ids": prompt + completion} for prompt, completion in sequences]
        sampling = [self._sampling(prompt, completion, read_cache) for prompt, completion in sequences]
        try:
            outputs: list[Any] = self.llm.generate(inputs, sampling, use_tqdm=False)
            return outputs
        except Exception as error:
            # Of requests that it refuses, vLLM takes back all. Where some are left it broke off in the middle of a
            # step, and would return them with the next call.
            if self.llm.llm_engine.has_unfinished_requests():
                raise EngineDied("vLLM failed in the middle of a step") from error
            raise

    def _sampling(self, prompt: list[int], completion: list[int], read_cache: bool) -> Any:
        import vllm

        asked: dict[str, Any] = {"prompt_logprobs": 0, "flat_logprobs": True}
        if self.by_token_ids:
            asked = {
                "prompt_logprob_token_ids": np.array(completion, dtype=np.int32)[:, None],
                "prompt_logprob_start": len(prompt) - 1,
            }
        return vllm.SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=not read_cache, **asked
        )

    def _logprobs(self, output: Any, prompt: list[int], completion: list[int]) -> list[float]:
        if self.by_token_ids:
            values: list[float] = output.prompt_token_id_logprobs[:, 0].tolist()
            return values
        flat = output.prompt_logprobs
        starts = flat.start_indices[len(prompt) : len(prompt) + len(completion)]
        if [flat.token_ids[i] for i in starts] != completion:
            raise RuntimeError("vLLM returned log-probs of other tokens than those asked for")
        return [flat.logprobs[i] for i in starts]


class VLLMSampler:
    """Samples completions. Seeds belong to prompts, but vLLM's CPU build cannot seed a request whose prefill is cut in
    two: there all that is sampled at once is seeded, through the generator that it draws from.
    """

    def __init__(self, model: Model, sampling: Sampling, options: VLLM, max_prompt_tokens: int):
        self.sampling = sampling
        self.on_gpu = options.gpus_per_actor > 0
        self.llm = _engine(model, sampling.dtype, options, max_prompt_tokens + sampling.max_tokens, False)

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        if not self.on_gpu:
            import torch

            torch.manual_seed(sum(request.seed for request in requests) % 2**63)
        inputs, params, number_of = [], [], []
        for number, request in enumerate(requests):
            for one in self._params(request):
                inputs.append({"prompt_token_ids": request.prompt_ids})
                params.append(one)
                number_of.append(number)
        waiting = Counter(number_of)
        ids = self.llm.enqueue(inputs, params, use_tqdm=False)
        place = {request_id.partition("-")[0]: n for n, request_id in enumerate(ids)}
        outputs: dict[int, dict[int, Any]] = defaultdict(dict)
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                n = place[output.request_id]
                number = number_of[n]
                outputs[number][n] = output.outputs
                waiting[number] -= 1
                if not waiting[number]:
                    found = outputs.pop(number)
                    yield number, [_completion(c) for m in sorted(found) for c in found[m]]

    def _params(self, request: Request) -> list[Any]:
        """What vLLM is asked for: the greedy completion, if it is to be one of them, and the others."""
        import vllm

        sampling = self.sampling
        common = {
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "logprobs": 0,  # of the sampled tokens alone
        }
        greedy = [vllm.SamplingParams(n=1, temperature=0.0, **common)] if sampling.include_greedy else []
        if request.samples == len(greedy):
            return greedy
        drawn = vllm.SamplingParams(
            n=request.samples - len(greedy),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p,
            seed=request.seed if self.on_gpu else None,
            **common,
        )
        return [*greedy, drawn]


def _completion(output: Any) -> Completion:
    return Completion(output.text, tuple(output.token_ids), output.finish_reason, output.cumulative_logprob)


class VLLMClassifier:
    """Logits of whole dialogues by vLLM's pooling runner: a sequence classifier of Hugging Face. Completions of one
    prompt find its keys and values in vLLM's prefix cache.

    Args:
        max_model_len: tokens of a dialogue.

    Raises ConfigError where the model is no sequence classifier.
    """

    def __init__(self, model: Model, options: VLLM, max_model_len: int):
        self.llm = _engine(model, model.dtype, options, max_model_len, False, runner="pooling")
        found = self.llm.llm_engine.vllm_config.model_config
        # vLLM serves a model that lacks the weights of its head with a head drawn at random.
        lacks_head = found.convert_type == "classify" and not _has_tensor(ModelFolder.of(model).path, "score.weight")
        if "classify" not in self.llm.supported_tasks or lacks_head:
            lacking = " and its weights hold no score.weight" * lacks_head
            raise ConfigError(
                f"The reward model {model.path} is no sequence classifier that vLLM serves: its config.json names "
                f"{', '.join(found.architectures)}{lacking}. Name a model that was trained as a reward model, or "
                "leave `engine` out; for a policy trained by DPO use a source of type implicit."
            )
        self.num_logits: int = found.hf_config.num_labels

    def logits(self, dialogues: Sequence[list[int]]) -> list[list[float]]:
        """Token ids of each dialogue → [dialogues, num_logits], not normalised."""
        import vllm

        self.llm.reset_prefix_cache()  # as in VLLMScorer.score
        outputs = self.llm.encode(
            [{"prompt_token_ids": ids} for ids in dialogues],
            pooling_params=vllm.PoolingParams(use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
        return [output.outputs.data.float().tolist() for output in outputs]


def _has_tensor(folder: Path, name: str) -> bool:
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            names = tensors.keys()
        if any(key == name or key.endswith(f".{name}") for key in names):
            return True
    return False


class VLLMChat:
    """Replies as a judge does: dialogues in, text out.

    Args:
        max_model_len: tokens of a dialogue and its reply.
    """

    def __init__(self, model: Model, options: VLLM, max_model_len: int, max_tokens: int, temperature: float):
        self.chat = ChatTokenizer(ModelFolder.of(model).tokenizer(), model.template_arguments)
        self.llm = _engine(model, model.dtype, options, max_model_len, False)
        self.room = max_model_len - max_tokens
        self.max_tokens = max_tokens
        self.temperature = temperature

    def replies(self, dialogues: Sequence[list[Message]], schema: dict[str, Any] | None) -> list[str]:
        """Raises DataError where a dialogue has no room."""
        import vllm
        from vllm.sampling_params import StructuredOutputsParams

        prompts = self.chat.prompts([(dialogue, None) for dialogue in dialogues])
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if longest > self.room:
            raise DataError(
                f"A question to the judge has {longest} tokens, and its max_model_len leaves {self.room} beside the "
                f"{self.max_tokens} of the reply: raise the judge's max_model_len, or sample shorter completions."
            )
        held = {} if schema is None else {"structured_outputs": StructuredOutputsParams(json=schema)}
        params = vllm.SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=0, **held)
        inputs = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        return [output.outputs[0].text for output in self.llm.generate(inputs, params, use_tqdm=False)]


def vllm_pool(config: Config, build: Any, arguments: dict[str, Any]) -> Pool:
    """Actors with one vLLM engine each."""
    options = config.vllm
    return Pool(
        build=build,
        arguments=arguments,
        num_actors=options.num_actors,
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor,
        env=_vllm_env(options),
        place=config.placement.engines,
        why="vllm.num_actors, vllm.cpus_per_actor, vllm.gpus_per_actor, and one CPU to read and write",
    )


def _vllm_env(options: VLLM) -> dict[str, str]:
    env = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if options.gpus_per_actor <= 1:
        # In the actor's own process: it starts faster, and no engine outlives an actor that is killed.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if options.gpus_per_actor == 0:
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, int(options.cpus_per_actor))),
        }
    return env


def tokens_at_once(vocab_size: int) -> int:
    """Tokens that vLLM's CPU build may score at once, so that their logits stay below 1 GiB: from 128 to 4096.

    Its runner makes the logits [tokens, vocab_size] of a request's whole prefill chunk in the model's dtype, their
    log-softmax in float32 and a comparison in bool: at most 4 + 4 + 1 bytes each. On CUDA they are made for 1024 tokens
    at a time, whatever the chunk.
    """
    return max(128, min(4096, _LOGITS_BYTES // (_BYTES_PER_LOGIT * vocab_size)))


def _sequence_tokens(pair: TokenizedPair) -> int:
    """The prompt counted for each side."""
    return pair.num_tokens + len(pair.prompt_ids)


def _engine(model: Model, dtype: str, options: VLLM, max_model_len: int, scores: bool, **runner: str) -> Any:
    import vllm
    from transformers import AutoConfig

    on_cpu = options.gpus_per_actor == 0
    folder = ModelFolder.of(model)
    batch: dict[str, Any] = {"max_num_seqs": options.max_num_seqs}
    tokens = options.max_num_batched_tokens
    if tokens is None and scores and on_cpu:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.trust_remote_code)
        tokens = tokens_at_once(config.get_text_config().vocab_size)
    if tokens is not None:
        # vLLM refuses more sequences than tokens at once.
        batch = {"max_num_batched_tokens": tokens, "max_num_seqs": min(options.max_num_seqs, tokens)}
    return vllm.LLM(
        model=str(folder.path),
        dtype=dtype,
        trust_remote_code=folder.trust_remote_code,
        max_model_len=max_model_len + 1,  # vLLM wants room for one generated token also where it only scores
        enable_chunked_prefill=True,
        enforce_eager=on_cpu,
        tensor_parallel_size=max(1, options.gpus_per_actor),
        seed=0,
        **runner,
        **batch,
        **({} if on_cpu else {"gpu_memory_utilization": options.gpu_memory_utilization}),
    )
