"""The configuration: one frozen tree that mirrors the YAML file, and how it is read, overridden and refused.

`tree` is the whole, and each section has a file, `vllm` and `reference` one together (`engines`); `schema` and
`described` show them to editors and people. It needs neither torch nor Ray, for a mistake in the file is to be told at
once.
"""

from dpo_ray.config.data import Columns, Data, LongCompletions, LongPrompts, LossTurns
from dpo_ray.config.engines import VLLM, Reference
from dpo_ray.config.evaluate import BASE_MODEL, Evaluate, Tasks, WinRate
from dpo_ray.config.generate import Generate, SampledModel, Sampling
from dpo_ray.config.hooks import Hook, Hooks
from dpo_ray.config.iterate import Iterate
from dpo_ray.config.load import dump_config, load_config, overridden, parse_config
from dpo_ray.config.model import LoRA, Model, Quantization
from dpo_ray.config.pairing import CandidatePairing, Pairing
from dpo_ray.config.placement import NodeChoice, Placement
from dpo_ray.config.publish import Gate, Publish
from dpo_ray.config.push import PushToHub
from dpo_ray.config.reward import Dtype, Endpoint, ImplicitReward, Judge, Reward, RewardModel, Rule, Source
from dpo_ray.config.run import Run
from dpo_ray.config.sources import DataSource, Paths
from dpo_ray.config.track import MLflow, Track, WandB
from dpo_ray.config.train import EarlyStopping, Metric, Optimizer, Sharding, Train, backend
from dpo_ray.config.tree import Config
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
