"""The sections `vllm` and `reference`: who computes log-probs and samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section
from dpo_ray.config.tolerance import Tolerance


class VLLM(Section):
    """The engines that sample and score."""

    num_actors: int = Field(1, ge=1)
    """Engines that work side by side, at most: Ray starts one, and more while there is work and room for them."""
    cpus_per_actor: float = Field(1.0, gt=0.0)
    """Cores that Ray sets aside for one engine."""
    gpus_per_actor: int = Field(0, ge=0)
    """GPUs of one engine (its tensor-parallel size); 0 is vLLM's CPU build."""
    kv_cache_gib: int = Field(2, ge=1)
    """Key-value cache of an engine on CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory that an engine may take."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences that an engine works on at once."""
    max_num_batched_tokens: int | None = Field(None, ge=16)
    """Tokens that an engine computes at once; longer rows go in chunks. Scoring on CPU holds 9 bytes × vocabulary size
    for each of them: left out, so many there as 1 GiB holds (128 to 4096). Otherwise left out: vLLM's own number."""


class Reference(Section):
    """Log-probs of the model before training, which losses compare with."""

    engine: Literal["vllm", "torch", "auto"] = "vllm"
    """Who computes the reference log-probs: vLLM, or the trainer's own forward in Ray actors. auto: vLLM if it is
    installed and agrees with the trainer's forward within the tolerance, or else torch; decided once for a model."""
    tolerance: Tolerance = Tolerance()
    """Calibration gate: how far the reference log-probs may be from those of the trainer's own forward."""
    calibration_pairs: int = Field(32, ge=1)
    """Pairs, drawn from all of them, that both engines score for the calibration gate: some before the pass where vLLM
    makes it, and others after it."""
