"""The configuration: one frozen tree that mirrors the YAML file, and how it is read, overridden and refused.

`tree` has the sections, `losses` the options of each loss, `tune` the search, `layouts` what input files can be. It
needs neither torch nor Ray, for a mistake in the file is to be told at once.
"""

from dpo_ray.config.load import dump_config, load_config, parse_config
from dpo_ray.config.tree import (
    VLLM,
    Columns,
    Config,
    Data,
    Dtype,
    EarlyStopping,
    Evaluate,
    Gate,
    Generate,
    LongCompletions,
    LongPrompts,
    LoRA,
    Metric,
    Model,
    Pairing,
    Paths,
    Publish,
    Reference,
    Run,
    Sampling,
    Train,
    WinRate,
)
from dpo_ray.config.tune import Tune

__all__ = [
    "VLLM",
    "Columns",
    "Config",
    "Data",
    "Dtype",
    "EarlyStopping",
    "Evaluate",
    "Gate",
    "Generate",
    "LoRA",
    "LongCompletions",
    "LongPrompts",
    "Metric",
    "Model",
    "Pairing",
    "Paths",
    "Publish",
    "Reference",
    "Run",
    "Sampling",
    "Train",
    "Tune",
    "WinRate",
    "dump_config",
    "load_config",
    "parse_config",
]
