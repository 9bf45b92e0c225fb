"""Rounds: sample with the current policy, score, pair, train, measure; the best round's policy is published."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo_ray.config import Config, Iterate
from dpo_ray.errors import DataError, DpoRayError
from dpo_ray.on_ray.pool import ShardTask, rows_pool, shard_stage, shard_tasks
from dpo_ray.on_ray.session import expect_training
from dpo_ray.progress import say
from dpo_ray.shards.replay import Earlier, ReplayShard, identity
from dpo_ray.storage.artifact import Artifact, read_shard
from dpo_ray.training.files import HISTORY, MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.deduplicate import deduplicate
from pipelines.evaluate import evaluate, tell_measured
from pipelines.generate import from_prompts, generate, prompts_by_side
from pipelines.publish import publish
from pipelines.reference import reference
from pipelines.report import write_report
from pipelines.tokenize import tokenize
from pipelines.tracking import tell_evaluation, tell_history
from pipelines.train import train

STAGE = "iterate"


@dataclass(frozen=True)
class Round:
    """What came of a round."""

    number: int
    """From 1."""
    pairs: Artifact
    policy: Artifact
    evaluation: Artifact
    measure: Callable[[], Artifact]
    """Makes the evaluation anew where another model was published since."""

    @property
    def win_rate(self) -> dict[str, Any]:
        """Against evaluate.win_rate.against or the first model, on held-out prompts: value, low, high, n."""
        found: dict[str, Any] | None = self.evaluation.manifest.metrics["win_rate"]
        if found is None:
            raise DpoRayError(
                "A round's win rate is undefined, for no held-out prompt was short enough to be answered: raise "
                "data.max_prompt_tokens, or add prompts."
            )
        return found


def iterate(context: RunContext) -> None:
    """Run the rounds, and publish the best one's policy past the gate.

    Raises DataError where a round would have no prompt, and GateFailed.
    """
    expect_training()
    options = context.config.iterate
    assert options is not None
    require_prompts(context.config)
    done: list[Round] = []
    for number in range(1, options.rounds + 1):
        done.append(_round(context, options, number, done))
        best = _best(done)
        _record(context, done, best)
        if number > 1 and not improves(done[-1].win_rate, _best(done[:-1]).win_rate):
            stops = options.stop_early and number < options.rounds
            said = ": no further round" if stops else ""
            say(STAGE, f"round {number} does not improve the win rate beyond its interval{said}")
            if stops:
                break
    tell_measured(context, best.evaluation)
    context.results["train"] = best.policy.manifest.metrics
    best.policy.file(HISTORY).copy_to(context.folder / HISTORY)
    tell_history(context.trackers, "", best.policy)
    tell_evaluation(context, best.policy, best.evaluation.manifest.metrics)
    publish(context, best.policy, best.evaluation, lambda: _measured_anew(context, best))


def _measured_anew(context: RunContext, best: Round) -> Artifact:
    found = best.measure()
    tell_measured(context, found)
    return found


def improves(found: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a round's win rate lies above the best one's value with the whole of its interval."""
    return bool(found["low"] > best["value"])


def require_prompts(config: Config) -> None:
    """Raises DataError where a round would have no prompt to train on."""
    options, sampled = config.iterate, config.generate
    assert options is not None and sampled is not None
    if options.prompts == "repeated":
        return
    prompts = prompts_by_side(config, sampled)["train"]
    sizes = Counter(part_of(row["prompt_id"], options.rounds) for row in prompts)
    if empty := [number for number in range(1, options.rounds + 1) if not sizes[number]]:
        raise DataError(
            f"{sampled.prompts} has {len(prompts)} prompts to train on, and of the {options.rounds} rounds "
            f"with prompts of their own (iterate.prompts=fresh) round {empty[0]} would have none: add prompts, "
            "lower iterate.rounds, or set iterate.prompts=repeated."
        )


def _best(done: list[Round]) -> Round:
    """The first of those with the highest win rate."""
    return max(done, key=lambda one: one.win_rate["value"])


def _round(context: RunContext, options: Iterate, number: int, earlier: list[Round]) -> Round:
    config = context.config
    current = config if not earlier else _with_policy(config, earlier[-1].policy)
    mine = context.other(current, f"round {number}")
    fresh = options.prompts == "fresh"
    of_first = context.other(config, f"round {number}")
    # An implicit reward compares with the first model in all rounds, so that these learn the same.
    made = generate(mine, (lambda prompt: part_of(prompt, options.rounds) == number) if fresh else None, of_first)
    pairs = _with_replay(mine, options, number, made, [one.pairs for one in earlier])
    tokenized = tokenize(mine, pairs, deduplicate(mine, pairs))
    compared = mine if options.reference == "current" else of_first
    rows, calibration = reference(compared, tokenized)
    policy = train(mine, rows)
    # Never against the round's own beginning, so that rounds can be compared.
    measure = partial(evaluate, of_first, pairs, rows, calibration, policy)
    done = Round(number, made, policy, measure(), measure)
    _write_page(mine, of_first, done)
    return done


def _page(number: int) -> str:
    return f"round-{number}"


def _write_page(context: RunContext, of_first: RunContext, done: Round) -> None:
    """The round's own report, of its stages alone. of_first: where it was measured."""
    stages = {name: entry for name, entry in context.stages.items() if name.endswith(f"({context.variant})")}
    found = {**context.results, **of_first.results}
    title = f"{context.run_id}, {context.variant}"
    summary = {"run_id": title, "exit_code": 0, "stages": stages, "published": None, **found, "reasons": []}
    write_report(context, {**summary, "is_round": True}, _page(done.number))


def _with_policy(config: Config, policy: Artifact) -> Config:
    """The configuration with a trained policy as its model."""
    model = config.model.model_copy(update={"path": (policy.location / MODEL_FOLDER).uri, "revision": None})
    return config.model_copy(update={"model": model})


def part_of(prompt_id: str, parts: int) -> int:
    """Which part of the training prompts a prompt is in, from 1: by a hash of its own."""
    return 1 + int(hashlib.sha256(f"round:{prompt_id}".encode()).hexdigest()[:12], 16) % parts


def _with_replay(
    context: RunContext, options: Iterate, number: int, pairs: Artifact, earlier: list[Artifact]
) -> Artifact:
    """The round's pairs, and as many earlier ones as make up the share."""
    if options.replay == 0 or not earlier:
        return pairs
    there = sum(map(_training_pairs, earlier))
    wanted = _training_pairs(pairs) * options.replay / (1 - options.replay)
    share = min(1.0, wanted / there) if there else 0.0
    # 1 would keep held-out rows too.
    share = min(share, 1 - 2**-40)
    salt = f"round {number}"
    tasks = [
        ShardTask(
            Earlier(task.source.file, kept, salt), f"{task.content}: {kept:g} {salt if kept < 1 else ''}", task.rows
        )
        for artifact, kept in ((pairs, 1.0), *((one, share) for one in earlier))
        for task in shard_tasks(artifact)
    ]
    stage = partial(
        shard_stage,
        context.output,
        "pairs",
        identity=identity(share, number),
        inputs={
            "pairs": pairs.fingerprint,
            **{f"round {n}": one.fingerprint for n, one in enumerate(earlier, start=1)},
        },
        tasks=tasks,
        pool=rows_pool(context.config, ReplayShard, {}),
        unit="pairs",
    )
    replayed = context.stage("replay", stage)
    from_prompts(context, replayed)
    return replayed


def _training_pairs(pairs: Artifact) -> int:
    return sum(read_shard(shard, columns=["split"])["split"].to_pylist().count("train") for shard in pairs.shards())


def _record(context: RunContext, done: list[Round], best: Round) -> None:
    context.results["rounds"] = [
        {
            "round": one.number,
            "pairs": one.pairs.manifest.rows,
            "policy": one.policy.fingerprint,
            "accuracy": one.evaluation.manifest.metrics["accuracy"],
            "win_rate": one.win_rate,
            "kl_per_token": one.evaluation.manifest.metrics.get("kl_per_token"),
            "best": one is best,
            "report": f"{_page(one.number)}.html",
        }
        for one in done
    ]
    win_rate = context.config.evaluate.win_rate
    assert win_rate is not None
    last = done[-1]
    rate = last.win_rate
    say(
        STAGE,
        f"round {last.number}: win rate against {win_rate.opponent} {rate['value']:.3f} [{rate['low']:.3f}, "
        f"{rate['high']:.3f}] (n={rate['n']}), of {last.pairs.manifest.rows} pairs; the best is round {best.number}",
    )
