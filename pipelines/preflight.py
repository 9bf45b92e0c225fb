"""What can be known to be wrong before work begins, the cheapest first: each check imports only what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from dpo_ray.config import Config, ImplicitReward, Judge, Model, Paths, Placement, Reward, RewardModel, Rule
from dpo_ray.errors import ConfigError, DataError
from pipelines import STAGES, Stage


def preflight(config: Config, until: Stage = "publish") -> None:
    """Everything that can be known to be wrong before long work begins. Raises ConfigError or DataError."""
    for _, check in checks(config, until):
        check()


def checks(config: Config, until: Stage = "publish") -> Iterator[tuple[str, Callable[[], None]]]:
    """What is looked at, in order: what it is about, and what raises ConfigError or DataError where it is wrong."""
    yield "configuration", partial(require_consistent, config, until)
    if config.placement != Placement():
        yield "placement", partial(require_cluster, config.placement)
    if config.data.train is not None:
        yield "data", partial(_require_inputs, config)
    if config.generate is not None:
        yield "prompts", partial(require_prompts, config, until)
    if STAGES.index(until) >= STAGES.index("evaluate"):
        for name, paths in config.evaluate.sets.items():
            yield f"set {name}", partial(_require_set, config, name, paths)
    if until != "ingest":
        for key, model in models(config, until).items():
            yield f"model {model.path}", partial(_require_template, model, key)
        if config.model.lora is not None:
            yield "adapter", partial(_require_base, config, until)
    if STAGES.index(until) >= STAGES.index("train"):
        yield "leases", partial(_require_leases, config)
        if config.train.start == "published":
            yield "start", partial(_require_start, config)
        if config.train.router_aux_loss:
            yield "routers", partial(_require_routers, config)
        yield "trackers", partial(_require_trackers, config)
    if until == "publish" and config.publish.push_to_hub is not None:
        yield "hub", partial(_require_push, config)
    if config.evaluate.tasks is not None and STAGES.index(until) >= STAGES.index("evaluate"):
        yield "tasks", partial(_require_tasks, config)


def require_cluster(placement: Placement) -> None:
    """Raises ConfigError where work is to be put on nodes of a cluster, and there is none."""
    from dpo_ray.on_ray.session import is_embedded

    if is_embedded():
        chosen = " and ".join(f"{nodes.key} ({nodes})" for _, nodes in placement if nodes.options)
        raise ConfigError(
            f"{chosen} is a choice among the nodes of a cluster, and RAY_ADDRESS names none: the work would run on a "
            "Ray of its own on this machine. Set RAY_ADDRESS, submit the configuration with `dpo-ray submit`, or leave "
            "the section out (-o 'placement={}')."
        )


def _require_inputs(config: Config) -> None:
    from pipelines.ingest import check_inputs

    check_inputs(config)


def _require_set(config: Config, name: str, paths: Paths) -> None:
    from pipelines.ingest import check_set

    check_set(config, name, paths)


def _require_leases(config: Config) -> None:
    from dpo_ray.storage.lease import require_leases
    from dpo_ray.storage.location import Location

    require_leases(Location.of(config.run.output))


def _require_start(config: Config) -> None:
    from dpo_ray.storage.location import Location
    from pipelines.start import starting_model

    starting_model(config, Location.of(config.run.output))


def _require_routers(config: Config) -> None:
    from transformers import AutoConfig

    from dpo_ray.model.resolve import ModelFolder
    from dpo_ray.training.balance import require_routers

    folder = ModelFolder.of(config.model)
    model = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
    require_routers(config.train.router_aux_loss, model)


def _require_trackers(config: Config) -> None:
    from dpo_ray.tracking.chosen import require_trackers

    require_trackers(config)


def _require_push(config: Config) -> None:
    from pipelines.push import require_push

    require_push(config)


def _require_tasks(config: Config) -> None:
    from dpo_ray.scoring.task_source import require_tasks

    assert config.evaluate.tasks is not None
    require_tasks(config.evaluate.tasks)


def require_prompts(config: Config, until: Stage) -> None:
    """Raises DataError where there is no prompt, or none is held out though a win rate is measured."""
    from dpo_ray.data.prompts import read_prompts

    options = config.generate
    assert options is not None
    sides = read_prompts(options.prompts, config.data.held_out_fraction, config.run.seed, options.system_prompt)
    if not sides["train"] and STAGES.index(until) >= STAGES.index("train"):
        raise DataError(
            f"All {len(sides['eval'])} prompts of {options.prompts} are held out "
            f"(data.held_out_fraction={config.data.held_out_fraction:g}): lower the fraction, or add prompts."
        )
    measured = config.evaluate.win_rate is not None and STAGES.index(until) >= STAGES.index("evaluate")
    if measured and not sides["eval"]:
        raise DataError(
            f"Of the {len(sides['train'])} prompts of {options.prompts} none is held out "
            f"(data.held_out_fraction={config.data.held_out_fraction:g}), and evaluate.win_rate is measured on those: "
            "raise the fraction, add prompts, or leave evaluate.win_rate out."
        )


def require_consistent(config: Config, until: Stage) -> None:
    """What the configuration and the installed packages tell. Raises ConfigError."""
    from dpo_ray.model.libraries import require_bitsandbytes, require_torchao
    from dpo_ray.on_ray.vllm_version import require_vllm

    if until == "ingest" and config.generate is not None:
        raise ConfigError(
            "This configuration makes its pairs with `generate`: run `dpo-ray generate` instead of ingest."
        )
    if until == "generate" and config.generate is None:
        raise ConfigError(
            "This configuration reads its pairs from data.train: run `dpo-ray ingest` instead of generate."
        )
    if until == "reference":
        require_reference_use(config)
    last = STAGES.index(until)
    if last >= STAGES.index("reference"):
        require_bitsandbytes(config.model.quantization)
    if last >= STAGES.index("train"):
        require_torchao(config.train.optimizer)
    if config.generate is not None:
        require_vllm("generate")
        require_reward(config.generate.reward)
    scores_reference = config.train.loss.needs_reference and last >= STAGES.index("reference")
    if config.reference.engine == "vllm" and scores_reference:
        require_vllm("reference.engine=vllm")
    if config.evaluate.win_rate is not None and last >= STAGES.index("evaluate"):
        require_vllm("evaluate.win_rate")
        require_reward(config.evaluate.win_rate.reward)


def require_reward(reward: Reward) -> None:
    """Rules that can be imported and called, and whose source can be read; models that are there.

    Raises ConfigError.
    """
    from dpo_ray.on_ray.vllm_version import require_vllm
    from dpo_ray.scoring.endpoint import require_endpoint
    from dpo_ray.scoring.judge import require_template
    from dpo_ray.scoring.models import model_of
    from dpo_ray.scoring.rule import require_fitting
    from dpo_ray.scoring.rule_source import reward_identity

    for source in reward:
        if isinstance(source, Rule):
            require_fitting(source)
            reward_identity(source.function)
            continue
        if isinstance(source, Judge):
            require_template(source)
            if source.endpoint is not None:
                require_endpoint(source.endpoint)
                continue
            require_vllm("A judge that is served here")
        if isinstance(source, RewardModel) and source.engine == "vllm":
            require_vllm(f"The reward {source.label} with engine=vllm")
        models = [model_of(source)]
        if isinstance(source, ImplicitReward) and source.reference is not None:
            models.append(Model(path=source.reference, revision=source.reference_revision))
        for model in models:
            _require_template(model, f"the path of the reward {source.label}")


def require_reference_use(config: Config) -> None:
    """Raises ConfigError where the loss compares with no reference, though one is asked for."""
    loss = config.train.loss
    if not loss.needs_reference:
        raise ConfigError(
            f"train.loss.type={loss.type} learns without a reference: there are no reference log-probs to compute or "
            "to take over. Run `dpo-ray train` without --reference, or choose a loss with a reference, such as sigmoid."
        )


def require_models(config: Config, until: Stage = "publish") -> None:
    """Models that can be found, each with a tokenizer and a chat template. Raises ConfigError."""
    for key, model in models(config, until).items():
        _require_template(model, key)
    _require_base(config, until)


def models(config: Config, until: Stage = "publish") -> dict[str, Model]:
    """Key of the configuration → the model that it names: that of `model`, and those that are sampled."""
    found = {"model.path": config.model}
    if config.generate is not None:
        for number, one in enumerate(config.generate.models):
            if one.path is not None:
                found[f"generate.models[{number}].path"] = one.model(config.model)
    win_rate = config.evaluate.win_rate
    if win_rate is not None and win_rate.against is not None and STAGES.index(until) >= STAGES.index("evaluate"):
        found["evaluate.win_rate.against.path"] = win_rate.against.model()
    return found


def _require_base(config: Config, until: Stage) -> None:
    lora = config.model.lora
    if lora is not None and lora.export == "adapter" and STAGES.index(until) >= STAGES.index("train"):
        from dpo_ray.model.resolve import adapter_base

        adapter_base(config.model)


def _require_template(model: Model, key: str) -> None:
    """Weights are not fetched for it. Args: key: who names the model, for the message."""
    from dpo_ray.data.chat import missing_template
    from dpo_ray.model.resolve import ModelFolder
    from dpo_ray.model.tokenizer_files import has_template

    try:
        folder = ModelFolder.of(model)
        folder.config()  # of an adapter, its base's: there must be one
        named = folder.template
        if not has_template(folder.tokenizer_folder) and named is None:
            raise missing_template(model.path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", key)) from error
