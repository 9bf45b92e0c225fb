"""Whether a run would make again what is published already: found out from manifests, before Ray is asked for."""

from __future__ import annotations

from dataclasses import replace

from dpo_ray.config import Model
from dpo_ray.evaluation.gate import failed_conditions
from dpo_ray.progress import say, silent
from dpo_ray.storage.finished import NotFinished, only_finished
from dpo_ray.storage.published import Move, latest, published_folder
from pipelines.align import train_and_measure
from pipelines.context import RunContext
from pipelines.live import Live
from pipelines.publish import STAGE, name_lease, stays, tell_published
from pipelines.push import push
from pipelines.start import start_of_published, starting_model
from pipelines.trace import keep_lineage


def is_nothing_new(context: RunContext) -> bool:
    """Whether this configuration makes, of the data that are there, a model that is published and past its gate.

    Then its stages, all finished, are recorded, and which version stands. Raises as the stages do that are finished.
    """
    folder = published_folder(context.output, context.config.run.name)
    standing = latest(folder)
    if standing is None:
        return False
    tell_published(standing)
    config = context.config
    starts = [starting_model(config, context.output)]
    if config.train.start == "published" and (before := start_of_published(config, context.output)) is not None:
        # What is published was made of these data already, if it was; it is not trained on them once more.
        starts.insert(0, before)
    return any(_is_published(context, start, standing) for start in starts)


def _is_published(context: RunContext, start: Model, standing: Move) -> bool:
    """Whether what would be trained from a model is published and past its gate; if so, it is recorded and said."""
    folder = published_folder(context.output, context.config.run.name)
    # Stages that turn out to be unfinished are not this run's yet.
    probe = replace(context, stages={}, artifacts={}, results={}, begins=lambda name: None, live=Live())
    try:
        with only_finished(), silent(but="gc"):  # which may have to be waited for
            policy, measure = train_and_measure(probe, start)
            evaluation = measure()
    except NotFinished:
        return False
    version = folder / policy.fingerprint
    if not stays(version, standing) or failed_conditions(context.config.publish.gate, evaluation.manifest.metrics):
        return False
    # Of a model that an earlier dpo-ray has published it is not kept yet.
    keep_lineage(context.output, policy, run_id=context.run_id, models=probe.models, sources=probe.sources)
    context.stages.update(probe.stages)
    context.artifacts.update(probe.artifacts)
    context.results.update(probe.results)
    context.results["published"] = version.uri
    context.results["nothing_new"] = {"version": standing.version, "published": standing.published}
    if standing.version == version.name and context.config.publish.push_to_hub is not None:
        with name_lease(context.output, folder.name, context.run_id, context.config.run.when_busy):
            now = latest(folder)
            if now is not None and now.version == version.name:  # else another run has published since
                push(context, version)
    moved = f", by {standing.action} of {standing.by}" if standing.action != "publish" else ""
    say(
        STAGE,
        f"nothing new: these data and this configuration have made {version.name} already, which is published. "
        f"{folder.name}/{standing.version} stands, since {standing.published}{moved}",
    )
    return True
