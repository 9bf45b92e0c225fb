"""The sweep, from data to the published best model: what trials train on, the trials, and the one that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dpo_ray.config import Config, dump_config
from dpo_ray.data.row_ids import id_numbers
from dpo_ray.errors import DataError
from dpo_ray.on_ray.session import expect_training
from dpo_ray.on_ray.trainer import train_policy
from dpo_ray.pairs import steers
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact, read_shard
from dpo_ray.storage.lease import hold
from dpo_ray.training.files import HISTORY
from dpo_ray.training.index import index_of
from pipelines.align import Prepared, tokenized_preferences, with_reference
from pipelines.context import RunContext
from pipelines.evaluate import evaluate
from pipelines.publish import publish
from pipelines.report import BEST
from pipelines.tracking import tell_evaluation, tell_history
from tuning.live import status_table
from tuning.preparations import differences, preparation_key, preparations
from tuning.records import Trial
from tuning.report import sweep_sections
from tuning.results import Ranked, described, measured_line, results_table, shown_values
from tuning.sweep import STAGE, Outcome, Sweep
from tuning.tracked import TrackedTrials

RESULTS = "results.parquet"
_WATCHED = 200
"""Trials that `dpo-ray watch` has a line of."""


def sweep(context: RunContext) -> None:
    """Search, choose, judge on what nothing was chosen by, and publish past the gate.

    Raises DataError where there is nothing to rank or to judge trials on, DpoRayError where no trial came to its end,
    and GateFailed.
    """
    expect_training()
    config = context.config
    prepared = _prepare(context)
    rows = {key: made.rows for key, made in prepared.items()}
    assert config.tune is not None
    indices = {key: index_of(context.output, made, config.tune.ranked_fraction) for key, made in rows.items()}

    def show(trials: Sequence[Trial]) -> None:
        context.live.trials = status_table(search.tune, trials, most=_WATCHED)
        context.table(status_table(search.tune, trials))

    tracked = TrackedTrials(context.trackers, context.run_id) if context.trackers is not None else None
    search = Sweep(context.output, config, rows, indices, show, tracked)
    context.begins(STAGE)
    context.live.begins(STAGE)
    with hold(
        context.output,
        f"{STAGE}-{search.records.folder.name}",
        f"The sweep {search.records.folder}",
        run_id=context.run_id,
        when_busy=config.run.when_busy,
        tell=lambda line: say(STAGE, line),
    ) as lease:
        search.records.load()  # what another run has written while this one waited
        try:
            outcome = search.run()
        finally:
            if tracked is not None:
                tracked.close()
        lease.require()
    context.table([])
    (context.folder / RESULTS).write_bytes(results_table(search.tune, [*outcome.trials, *outcome.repeats]))
    if not outcome.ranking:
        error = search.nothing_finished(outcome)
        context.shown["more"] = sweep_sections(config, outcome.trials, outcome.repeats, outcome.ranking, None)
        raise error
    chosen = search.config_of(outcome.ranking[0].trial)
    (context.folder / BEST).write_bytes(dump_config(chosen).encode())
    context.results[STAGE] = _summary(context, search, outcome)
    for line in _ranking_lines(search, outcome.ranking):
        say(STAGE, line)
    _judge(context, prepared[preparation_key(chosen)], chosen, outcome)


def _prepare(context: RunContext) -> dict[str, Prepared]:
    """What trials train on, once for all that agree on it."""
    variants = preparations(context.config)
    if len(variants) > 1:
        say(STAGE, f"trials train on {len(variants)} different sets of rows, and each is made once")
    contexts = {
        key: context.other(config, differences(context.config, config)) if len(variants) > 1 else context
        for key, config in variants.items()
    }
    tokenized = {key: tokenized_preferences(one) for key, one in contexts.items()}
    _require_both_parts(context.config, [made[2] for made in tokenized.values()])
    named = {differences(context.config, variants[key]): made[2] for key, made in tokenized.items()}
    _require_equal(context.config, named)
    return {key: with_reference(one, *tokenized[key]) for key, one in contexts.items()}


def _held_out(rows: Artifact, eval_fraction: float) -> tuple[np.ndarray, int]:
    """Ids of the held-out pairs that trials are ranked on, ascending; and how many the chosen one is judged on."""
    ranking, judging = [np.empty(0, dtype=np.uint64)], 0
    for shard in rows.shards():
        table = read_shard(shard, columns=["pair_id", "prompt_id", "split"])
        table = table.filter(pc.equal(table["split"], "eval"))
        ranks = np.array([steers(prompt, eval_fraction) for prompt in table["prompt_id"].to_pylist()], dtype=bool)
        ranking.append(id_numbers(table["pair_id"])[ranks])
        judging += int((~ranks).sum())
    return np.sort(np.concatenate(ranking)), judging


def _require_equal(config: Config, made: dict[str, Artifact]) -> None:
    """Raises DataError where trials would be measured on different pairs."""
    assert config.tune is not None
    first: tuple[str, np.ndarray] | None = None
    for named, rows in made.items():
        ranking, _ = _held_out(rows, config.tune.ranked_fraction)
        if first is None:
            first = named, ranking
        elif not np.array_equal(ranking, first[1]):
            raise DataError(
                f"With {named} trials would be ranked on {len(ranking)} held-out pairs, with {first[0]} on "
                f"{len(first[1])}, of which {len(np.intersect1d(ranking, first[1]))} are the same: what they measure "
                "could not be compared. Have what is too long cut instead of dropped (data.long_prompts=keep_end, "
                "data.long_completions=cut), or name held-out pairs that fit all values as data.eval."
            )


def _require_both_parts(config: Config, made: Sequence[Artifact]) -> None:
    assert config.tune is not None
    fraction = config.tune.ranked_fraction
    for rows in made:
        ranking, judging = _held_out(rows, fraction)
        if not len(ranking) or not judging:
            raise DataError(
                f"A sweep ranks its trials on one part of the held-out rows and judges the best on the other; here "
                f"there are {len(ranking)} and {judging} (tune.ranked_fraction={fraction:g}). Raise "
                "data.held_out_fraction, name more rows as data.eval, or change tune.ranked_fraction."
            )
    most = config.train.eval_pairs
    some = f", of which {most} count (train.eval_pairs)" if len(ranking) > most else ""
    say(STAGE, f"trials are ranked on {len(ranking)} held-out rows{some}, the best is judged on {judging} others")


def _judge(context: RunContext, prepared: Prepared, chosen: Config, outcome: Outcome) -> None:
    """Measure the best model on what no trial was ranked by, and publish it past the gate."""
    best = outcome.ranking[0].trial
    final: dict[str, Any] = {
        "number": best.number,
        "accuracy": None,
        "win_rate": None,
        "ranked_accuracy": best.measured.get("accuracy"),
        "published": None,
    }
    context.results[STAGE]["final"] = final
    context.shown["config"] = chosen
    mine = context.other(chosen, "the best")
    mine.results = context.results
    try:
        policy = mine.stage("train", lambda: train_policy(context.output, chosen, prepared.rows, run_id=context.run_id))
        mine.models[policy.fingerprint] = chosen.model
        context.results["train"] = policy.manifest.metrics
        policy.file(HISTORY).copy_to(context.folder / HISTORY)
        tell_history(context.trackers, "", policy)
        measure = partial(evaluate, mine, prepared.pairs, prepared.rows, prepared.calibration, policy)
        evaluation = measure()
        tell_evaluation(context, policy, evaluation.manifest.metrics)
        final |= {name: evaluation.manifest.metrics[name] for name in ("accuracy", "win_rate")}
        publish(mine, policy, evaluation, measure)
        final["published"] = context.results["published"]
    finally:
        context.shown["more"] = sweep_sections(
            context.config, outcome.trials, outcome.repeats, outcome.ranking, final, (context.folder / BEST).uri
        )


def _summary(context: RunContext, search: Sweep, outcome: Outcome) -> dict[str, Any]:
    """The sweep's entry in summary.json."""
    states = [t.state for t in outcome.trials]
    return {
        "records": search.records.folder.uri,
        "rows": {key: made.fingerprint for key, made in search.rows.items()},
        "trials": {state: states.count(state) for state in dict.fromkeys(states)},
        "at_once": outcome.at_once,
        "seconds": round(outcome.seconds, 1),
        "best": {
            "number": outcome.ranking[0].trial.number,
            "values": shown_values(search.tune, outcome.ranking[0].trial),
            "score": outcome.ranking[0].score[0],
            "spread_over_seeds": outcome.ranking[0].spread,
            "measured": outcome.ranking[0].trial.measured,
            "tied": [one.trial.number for one in outcome.ranking if one.is_tied],
        },
        "ranking": _ranking_lines(search, outcome.ranking),
        "best_yaml": (context.folder / BEST).uri,
        "results": (context.folder / RESULTS).uri,
    }


_SHOWN = 10


def _ranking_lines(search: Sweep, ranking: Sequence[Ranked]) -> list[str]:
    lines = []
    for place, one in enumerate(ranking[:_SHOWN], start=1):
        seeds = (
            f", mean over {len(one.repeats) + 1} seeds {one.score[0]:.3f} ± {one.spread:.3f}"
            if one.spread is not None
            else ""
        )
        tied = " (cannot be told from the best)" if one.is_tied else ""
        tied += " (diverged with another seed)" if one.diverged else ""
        lines.append(
            f"{place}. trial {one.trial.number}: {described(search.tune, one.trial)}: "
            f"{measured_line(one.trial.measured)}{seeds}{tied}"
        )
    if len(ranking) > _SHOWN:
        lines.append(f"… and {len(ranking) - _SHOWN} more, all in {RESULTS}")
    return lines
