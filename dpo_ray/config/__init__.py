"""The configuration: one frozen tree that mirrors the YAML file, and how it is read, overridden and refused.

`tree` has the sections, `losses` the options of each loss, `tune` the search; `schema` and `described` show them to
editors and people. It needs neither torch nor Ray, for a
mistake in the file is to be told at once.
"""

from dpo_ray.config.hooks import Hook, Hooks
from dpo_ray.config.iterate import Iterate
from dpo_ray.config.load import dump_config, load_config, overridden, parse_config
from dpo_ray.config.pairing import CandidatePairing, Pairing
from dpo_ray.config.placement import NodeChoice, Placement
from dpo_ray.config.push import PushToHub
from dpo_ray.config.reward import Dtype, Endpoint, ImplicitReward, Judge, Reward, RewardModel, Rule, Source
from dpo_ray.config.sources import DataSource, Paths
from dpo_ray.config.track import MLflow, Track, WandB
from dpo_ray.config.tree import (
    BASE_MODEL,
    VLLM,
    Columns,
    Config,
    Data,
    EarlyStopping,
    Evaluate,
    Gate,
    Generate,
    LongCompletions,
    LongPrompts,
    LoRA,
    LossTurns,
    Metric,
    Model,
    Optimizer,
    Publish,
    Quantization,
    Reference,
    Run,
    SampledModel,
    Sampling,
    Sharding,
    Tasks,
    Train,
    WinRate,
    backend,
)
from dpo_ray.config.tune import Tune

__all__ = [
    "BASE_MODEL",
    "VLLM",
    "CandidatePairing",
    "Columns",
    "Config",
    "Data",
    "DataSource",
    "Dtype",
    "EarlyStopping",
    "Endpoint",
    "Evaluate",
    "Gate",
    "Generate",
    "Hook",
    "Hooks",
    "ImplicitReward",
    "Iterate",
    "Judge",
    "LoRA",
    "LongCompletions",
    "LongPrompts",
    "LossTurns",
    "MLflow",
    "Metric",
    "Model",
    "NodeChoice",
    "Optimizer",
    "Pairing",
    "Paths",
    "Placement",
    "Publish",
    "PushToHub",
    "Quantization",
    "Reference",
    "Reward",
    "RewardModel",
    "Rule",
    "Run",
    "SampledModel",
    "Sampling",
    "Sharding",
    "Source",
    "Tasks",
    "Track",
    "Train",
    "Tune",
    "WandB",
    "WinRate",
    "backend",
    "dump_config",
    "load_config",
    "overridden",
    "parse_config",
]
