"""Prompts → candidates sampled by vLLM → scored → pairs; and the prompts that the win rate is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config import Config, Generate, Judge, Model, Reward, Sampling, Source
from dpo_ray.data.prompts import prompt_table, read_prompts
from dpo_ray.data.tally import Tally
from dpo_ray.errors import DataError
from dpo_ray.on_ray.generate import merge_candidates, sample_completions
from dpo_ray.on_ray.reward import pair_candidates, score_candidates
from dpo_ray.pairs import PAIRS, PROMPTS, plain, steers
from dpo_ray.progress import say
from dpo_ray.shards.generate import Ask
from dpo_ray.storage.artifact import Artifact, Contents, digest, make, read_shard, write_shard
from dpo_ray.storage.lineage import SourceFile
from dpo_ray.storage.location import Location
from pipelines.context import RunContext

_PROMPTS_PER_SHARD = 64  # of those that come with pairs; of prompts alone see generate.prompts_per_shard


def generate(
    context: RunContext, wanted: Callable[[str], bool] | None = None, scoring: RunContext | None = None
) -> Artifact:
    """The pairs made of sampled completions. Raises DataError where there is no usable prompt or pair.

    Args:
        wanted: which training prompts are sampled for, by their ids; None: all.
        scoring: whose `model` an implicit reward compares with; left out: this one's.
    """
    config = context.config
    options = config.generate
    assert options is not None
    sides = prompts_by_side(config, options)
    if wanted is not None:
        sides["train"] = [row for row in sides["train"] if wanted(row["prompt_id"])]
    # Shards of one side only: the held-out candidates then serve the win rate without being drawn again.
    tables = [t for side in ("train", "eval") for t in _tables(sides[side], options.prompts_per_shard)]
    prompts = publish_prompts(context.output, tables)
    candidates = _candidates(context, options, prompts)
    scores = score_by(scoring or context, "reward", options.reward, candidates)
    pairs = context.stage("pair", lambda: _pair(context, options, candidates, scores))
    from_prompts(context, pairs)
    return pairs


def from_prompts(context: RunContext, pairs: Artifact) -> None:
    """Note that these pairs were made of generate.prompts."""
    options = context.config.generate
    assert options is not None
    source = SourceFile(uri=options.prompts, key="generate.prompts")
    context.sources.update({shard.name: source for shard in pairs.shards()})


def prompts_by_side(config: Config, options: Generate) -> dict[str, list[dict[str, Any]]]:
    """Side of the split → its prompts."""
    return read_prompts(options.prompts, config.data.held_out_fraction, config.run.seed, options.system_prompt)


def _candidates(context: RunContext, options: Generate, prompts: Artifact) -> Artifact:
    found = []
    asked = asks_of(options, context.config.model)
    for number, (model, asks) in enumerate(asked, start=1):
        name = f"generate: {PurePath(model.path).name}" if len(asked) > 1 else "generate"
        name = f"{name} ({number})" if name in context.stages else name
        found.append(context.stage(name, partial(sample, context, model, options.sampling, asks, prompts)))
    if len(found) == 1:
        return found[0]
    return context.stage("merge", partial(merge_candidates, context.output, context.config, found))


def asks_of(options: Generate, policy: Model) -> list[tuple[Model, list[Ask]]]:
    """Who candidates are drawn from, each model once with all the ways in which it is asked: one engine serves them.

    Args:
        policy: the section `model`.
    """
    if not options.models:
        return [(policy, [Ask(options.sampling.samples)])]
    found: list[tuple[Model, list[Ask]]] = []
    for one in options.models:
        model, ask = one.model(policy), Ask(one.samples, one.system_prompt)
        same = next((asks for other, asks in found if other == model), None)
        if same is None:
            found.append((model, [ask]))
        else:
            same.append(ask)
    return found


def sample(
    context: RunContext, model: Model, sampling: Sampling, asks: Sequence[Ask], prompts: Artifact
) -> tuple[Artifact, bool]:
    """Sampled completions of each prompt by a model."""
    return sample_completions(context.output, context.config, model, sampling, asks, prompts)


def held_out_prompts(context: RunContext, pairs: Artifact, max_prompts: int) -> Artifact:
    """The prompts of the win rate: the held-out ones, of generate.prompts or else of the pairs.

    Not those that training was steered by, where train.eval_fraction tells them apart.
    """
    config = context.config
    fraction = config.train.eval_fraction

    def judges(row: dict[str, Any]) -> bool:
        return row["split"] == "eval" and (fraction == 1 or not steers(row["prompt_id"], fraction))

    if config.generate is not None:
        sides = prompts_by_side(config, config.generate)
        held_out = list(filter(judges, sides["eval"]))[:max_prompts]
        return publish_prompts(context.output, _tables(held_out, config.generate.prompts_per_shard))
    return publish_prompts(context.output, _tables(_first_prompts(pairs, max_prompts, judges), _PROMPTS_PER_SHARD))


def _first_prompts(pairs: Artifact, count: int, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The wanted prompts of pairs whose ids are the smallest, each once; the texts of the others are not read."""
    found: dict[str, Location] = {}
    for shard in pairs.shards():
        held_out = read_shard(shard, columns=["prompt_id", "split"], rows=pc.field("split") == "eval")
        found |= {row["prompt_id"]: shard for row in held_out.to_pylist() if wanted(row)}
        found = {key: found[key] for key in sorted(found)[:count]}
    texts: dict[str, dict[str, Any]] = {}
    for shard in dict.fromkeys(found.values()):
        ids = pa.array([prompt for prompt, there in found.items() if there == shard])
        columns = [name for name in PROMPTS.names if name in PAIRS.names]
        rows = read_shard(shard, columns=columns, rows=pc.field("prompt_id").isin(ids))
        texts |= {row["prompt_id"]: row for row in rows.to_pylist() if wanted(row)}
    return [texts[key] for key in found]


def publish_prompts(output: Location, tables: list[pa.Table]) -> Artifact:
    """Prompts as an artifact, a table a shard. Raises DataError where there is none."""
    if not tables:
        raise DataError("There is no held-out prompt: raise data.held_out_fraction, or leave evaluate.win_rate out.")
    content = [digest([{**row, "prompt": plain(row["prompt"])} for row in table.to_pylist()]) for table in tables]

    def write(location: Location) -> Contents:
        named = zip(content, tables, strict=True)
        return Contents(files=[write_shard(location / f"{name}.parquet", table, {}) for name, table in named])

    return make(output, "prompts", {"shards": content}, {}, write)[0]


def _tables(rows: list[dict[str, Any]], rows_per_shard: int) -> list[pa.Table]:
    return [prompt_table(rows[i : i + rows_per_shard]) for i in range(0, len(rows), rows_per_shard)]


def score_by(
    context: RunContext, stage: str, reward: Reward, candidates: Artifact, across: int | None = None
) -> dict[str, Artifact]:
    """Source → what it gives to the candidates; each is a stage of the run. across: see score_candidates."""
    found = {}
    for source in reward:
        name = stage if len(reward) == 1 else f"{stage}: {source.label}"
        made = context.stage(
            name, partial(score_candidates, context.output, context.config, source, candidates, across)
        )
        _tell_unread(source, made)
        found[source.label] = made
    return found


def _tell_unread(source: Source, scores: Artifact) -> None:
    """Says of a judge how many of its verdicts told nothing. Raises DataError where none told anything."""
    counters = scores.manifest.counters
    asked, unread, torn = (counters.get(name, 0) for name in ("judged", "judge_unparseable", "orders_disagree"))
    if not isinstance(source, Judge) or not asked or not unread + torn:
        return
    if unread == asked:
        raise DataError(
            f"Of {asked} verdicts asked of {source.label} none could be read, in {source.attempts} attempts each, so "
            "all answers would count as equal. Look at what the judge replies: it may be too small a model for the "
            f"template, or its max_tokens={source.max_tokens} cuts its replies. The scores are in "
            f"{scores.location}; remove that folder to have it asked again."
        )
    say(
        "judge",
        f"{source.label}: of {asked} verdicts {unread} could not be read and {torn} changed with the order of the "
        "answers; these count as ties",
    )


def _pair(
    context: RunContext, options: Generate, candidates: Artifact, scores: dict[str, Artifact]
) -> tuple[Artifact, bool]:
    artifact, reused = pair_candidates(
        context.output, context.config, options.pairing, options.reward, candidates, scores
    )
    if artifact.manifest.rows == 0:
        tally = Tally.of(artifact.manifest.counters)
        reasons = ", ".join(f"{name} {count}" for name, count in tally.dropped.items() if name != "without_pair")
        raise DataError(
            f"The candidates of {tally.read} prompts made no pair under the reward {' + '.join(scores)} ({reasons}). "
            "Draw more samples, raise the temperature, look at what the reward gives, or change generate.pairing: its "
            f"min_score_gap is {options.pairing.min_score_gap:g}."
        )
    return artifact, reused
