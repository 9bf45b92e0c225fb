"""vLLM, really started: the engine of the configuration loads the model and scores one pair."""

from __future__ import annotations

import time

from dpo_ray.config import VLLM, Config, Model
from dpo_ray.on_ray.calibrate import max_pair_tokens
from dpo_ray.on_ray.engine_choice import alone
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.vllm_engine import VLLMScorer, vllm_pool
from dpo_ray.pairs import TokenizedPair

_PAIR = TokenizedPair("probe", [1, 2, 3], [4, 5], [5])


def start_engine(config: Config) -> float:
    """Seconds that it took, in a process of its own as the reference stage has it, which ends with it.

    Raises DpoRayError where vLLM does not start, or cannot score.
    """
    arguments = {"model": config.model, "options": config.vllm, "max_model_len": max_pair_tokens(config)}
    began = time.monotonic()
    try:
        alone(vllm_pool(config, _score_one, arguments))
    except Exception as error:
        raise_ours(error, "engine")
    return time.monotonic() - began


def _score_one(model: Model, options: VLLM, max_model_len: int) -> None:
    VLLMScorer(model, options, max_model_len).score([_PAIR])
