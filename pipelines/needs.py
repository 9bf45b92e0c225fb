"""What each stage of a run needs of Ray at once, and whether the cluster has it: known before the first one begins."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_ray.config import Config, ImplicitReward, Judge, Reward, RewardModel, Rule, Source
from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import scan
from dpo_ray.on_ray.pool import Pool, rows_pool, torch_pool
from dpo_ray.on_ray.room import Lack, Need, Nodes, lacking
from dpo_ray.on_ray.trainer import training_need
from dpo_ray.on_ray.vllm_engine import vllm_pool
from dpo_ray.on_ray.vllm_version import has_vllm
from dpo_ray.progress import say
from dpo_ray.shards.ingest import IngestShard
from dpo_ray.storage.location import Location


def check_cluster(config: Config, output: Location, plan: Sequence[str]) -> None:
    """Join the cluster, and find out whether the run can come to its end there.

    Args:
        plan: the stages of the run.

    Raises ConfigError where a stage has no room and the run is not to wait for it (run.wait_for_resources=0), or where
    a node does not see the folder run.output.
    """
    from dpo_ray.on_ray.session import join, nodes, wait_at_most
    from dpo_ray.on_ray.shared_output import require_seen_by_all

    wait_at_most(config.run.wait_for_resources)
    join()
    require_room_for_all(config, plan, nodes())
    require_seen_by_all(output)


def require_room_for_all(config: Config, plan: Sequence[str], nodes: Nodes) -> None:
    """Raises ConfigError naming every stage that has no room, where none is waited for; else says so."""
    missing = without_room(config, plan, nodes)
    if not missing:
        return
    said = " ".join(f"{', '.join(stages)}: {lack.said}" for lack, stages in missing.items())
    minutes = config.run.wait_for_resources
    if minutes == 0:
        ways_out = " ".join(dict.fromkeys(lack.way_out for lack in missing))
        raise ConfigError(
            f"There is no room for all stages of this run. {said} {ways_out} Or let the run wait for a cluster that "
            "grows (run.wait_for_resources)."
        )
    say(
        "start",
        f"{said} The cluster is asked for it when the stage begins, which then waits up to {minutes:g} minutes "
        "(run.wait_for_resources). Where nothing adds nodes, 0 refuses such a run at its start.",
    )


def without_room(config: Config, plan: Sequence[str], nodes: Nodes) -> dict[Lack, list[str]]:
    """What is missing → the stages that have no room for it."""
    missing: dict[Lack, list[str]] = {}
    for stage, need in needs(config, plan):
        lack = lacking(nodes, need)
        if lack is not None and stage not in missing.setdefault(lack, []):
            missing[lack].append(stage)
    return missing


def needs(config: Config, plan: Sequence[str]) -> list[tuple[str, Need]]:
    """Stage → what it cannot do without, by the numbers that the stage itself asks for; a stage may come several times.

    Args:
        plan: the stages of the run.
    """
    rows = rows_pool(config, IngestShard, {}).need
    by_torch, by_vllm = torch_pool(config, IngestShard, {}).need, vllm_pool(config, IngestShard, {}).need
    found: dict[str, list[Need]] = {
        "ingest": [scan.need(config.placement.data), rows],
        "tokenize": [rows],
        "reference": [*_scoring(config, by_torch, by_vllm)],
        "train": [training_need(config)],
        "evaluate": [by_torch],
    }
    if config.generate is not None:
        found["generate"] = [by_vllm, rows, *_of_reward(config, config.generate.reward)]
    if config.evaluate.win_rate is not None:
        found["evaluate"] += [by_vllm, *_of_reward(config, config.evaluate.win_rate.reward)]
    if config.tune is not None:
        from tuning.sweep import trials_need

        found["sweep"] = [trials_need(config, config.tune.max_concurrent_trials or 1)]
    return [(stage, need) for stage in plan for need in found.get(stage, [])]


def _scoring(config: Config, by_torch: Need, by_vllm: Need) -> list[Need]:
    """The trainer's own forward always scores some pairs too, for the calibration."""
    engine = config.reference.engine
    uses_vllm = engine == "vllm" or (engine == "auto" and has_vllm())
    return [by_vllm, by_torch] if uses_vllm else [by_torch]


def _of_reward(config: Config, reward: Reward) -> list[Need]:
    return [_pool(config, source).need for source in reward]


def _pool(config: Config, source: Source) -> Pool:
    """As dpo_ray.on_ray.reward has it."""
    match source:
        case Rule():
            return rows_pool(config, IngestShard, {})
        case RewardModel():
            served = source.engine == "vllm"
            return vllm_pool(config, IngestShard, {}) if served else torch_pool(config, IngestShard, {})
        case Judge():
            asks = source.endpoint is not None
            return rows_pool(config, IngestShard, {}) if asks else vllm_pool(config, IngestShard, {})
        case ImplicitReward():
            return torch_pool(config, IngestShard, {})
