"""dpo-ray from Python: for notebooks, and for pipelines of others.

    from dpo_ray import api

    config = api.load_config("align.yaml", {"run.output": "s3://bucket/out", "train.epochs": 2})
    done = api.run(config)
    print(done.published, done.win_rate)

Each function does what the command of its name does, in the same folders and with the same records (but for log.txt
and log.jsonl, which are the command line's), and returns when that has ended; what is finished is taken over. A
failure is one of dpo_ray.errors, with a note that names the run's folder. Functions may be called by any thread,
while an event loop runs, and again and again in one process; of two calls at once the second begins when the first
has ended. A Ray that the process has (`ray.init`) is worked on like a cluster, and left as it is; without one, the
cluster of RAY_ADDRESS is joined, or a Ray is started and ended with the call. Lines of progress go to standard
error.

Stability: the names in `__all__`, their parameters and the fields of what they return are kept. One that is to go
works for two minor versions more, in which using it gives a DeprecationWarning that names what takes its place.
Fields and optional parameters may be added; what `summary` holds is told in summary.json's own words and may
change. Everything else in these packages is not for others, except the errors of dpo_ray.errors with their
`exit_code`, which are kept likewise (GateFailed: 4).

Importing this module loads neither Ray nor torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

from dpo_ray.config import Config, overridden
from dpo_ray.config import load_config as _load_file
from dpo_ray.errors import ConfigError, DpoRayError

if TYPE_CHECKING:
    from pipelines import Stage as _Name
    from pipelines.context import RunContext
    from pipelines.record_run import Done
    from pipelines.work import Work

_ONE_AT_A_TIME = RLock()
"""A process has one Ray, and one run that tells how it stands."""

__all__ = [
    "Config",
    "DpoRayError",
    "Estimate",
    "Run",
    "Stage",
    "Sweep",
    "evaluate",
    "generate",
    "ingest",
    "iterate",
    "load_config",
    "plan",
    "publish",
    "reference",
    "rule",
    "run",
    "sweep",
    "tokenize",
    "train",
]


@dataclass(frozen=True)
class Estimate:
    """A measure of held-out pairs or prompts, with its 95% interval, over n of them."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Stage:
    """What a stage of a run has made, or found finished."""

    fingerprint: str
    uri: str
    """Folder of the artifact: a manifest, which names its files."""
    rows: int | None
    """Rows of its tables; None where it holds none."""
    reused: bool
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run that has ended well."""

    run_id: str
    folder: str
    """Where config.yaml, summary.json and report.html of the run are."""
    outcome: Literal["published", "nothing new", "done"]
    """done: it was to publish nothing."""
    stages: Mapping[str, Stage]
    """By name, in the order in which they ended; of rounds and the like as in "train (round 2)"."""
    published: str | None
    """Folder of the published model."""
    accuracy: Estimate | None
    """Share of held-out pairs whose chosen answer has the higher reward; None: it was not measured."""
    win_rate: Estimate | None
    """Of the answers to held-out prompts, against evaluate.win_rate's opponent; None: it was not measured."""
    summary: Mapping[str, Any]
    """As in summary.json."""


@dataclass(frozen=True)
class Sweep(Run):
    """A sweep that has ended well."""

    best: Mapping[str, Any]
    """Of the best trial: its number, the values, the score and what was measured."""
    best_config: str
    """Its configuration, as a YAML file."""
    trials: str
    """A Parquet file with a row a trial."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a YAML file, or of a mapping with the same sections.

    Args:
        overrides: dotted key → value, over what the source says: {"train.epochs": 2}.

    Raises ConfigError, in one paragraph that names each offending key, its value and the way out.
    """
    if isinstance(source, Mapping):
        return overridden(deepcopy(dict(source)), overrides, "the mapping")
    return _load_file(source, overrides)


def rule(function: Callable[..., Any], *, weight: float = 1.0, batch: bool = False, **arguments: Any) -> dict[str, Any]:
    """A function of one's own as a reward: what a configuration has at generate.reward or evaluate.win_rate.reward.

    Args:
        function: called with the prompt, a completion, and whether that is finished; gives a finite number, larger
            being better, or named parts of it. What else it may ask for is told in dpo_ray.scoring.rule.
        weight: its share in the sum of several rewards.
        batch: it takes lists, a shard's completions at once, and gives a list.
        arguments: given to it by name in each call.

    Raises ConfigError where workers could not import it: it must be a function at the top of a module's file that
    they find (a file beside the program or the notebook is). What was made with it is made anew once its source has
    changed; a process knows it as it was when it was imported there.
    """
    module, name = function.__module__, getattr(function, "__qualname__", repr(function))
    if module == "__main__" or not name.isidentifier():
        raise ConfigError(
            f"The reward {name} of {module} is not one that workers can import. Put the function at the top of a "
            "module's file, beside the program or the notebook (there with %%writefile), and import it from there."
        )
    return {"type": "rule", "function": f"{module}:{name}", "arguments": arguments, "weight": weight, "batch": batch}


def plan(config: Config, *, rows: int = 2000) -> Mapping[str, Any]:
    """What a run would take, as `dpo-ray plan --json` tells it; nothing is computed.

    Speeds are those of earlier runs in run.output; without such there are no times, and there is no cost.

    Args:
        rows: that are tokenized where nothing is yet.

    Raises ConfigError or DataError.
    """
    from dpo_ray.model.pin import pinned
    from pipelines.plan.speeds import Stated
    from pipelines.plan.stages import as_dict, make_plan

    return as_dict(make_plan(pinned(config), rows=rows, stated=Stated(None, None, None), memory=None, price=None))


def ingest(config: Config, *, run_id: str | None = None) -> Run:
    """Preference data → pairs. Raises DpoRayError, as all that follow.

    Args:
        run_id: name of the run's folder; None: run.name and the time. The same of all that follow.
    """
    return _until("ingest", config, run_id)


def generate(config: Config, *, run_id: str | None = None) -> Run:
    """Prompts → completions, scored and paired."""
    return _until("generate", config, run_id)


def tokenize(config: Config, *, run_id: str | None = None) -> Run:
    """The stages up to token ids."""
    return _until("tokenize", config, run_id)


def reference(config: Config, *, run_id: str | None = None) -> Run:
    """The stages up to the reference's log-probs."""
    return _until("reference", config, run_id)


def train(config: Config, *, reference: str | None = None, run_id: str | None = None) -> Run:
    """The stages up to the trained policy.

    Args:
        reference: train on this finished reference artifact (its folder) instead of the configuration's own.
    """
    if reference is None:
        return _until("train", config, run_id)
    from pipelines.work import training_on

    return _run(_recorded(training_on(config, reference), run_id))


def evaluate(config: Config, *, run_id: str | None = None) -> Run:
    """The stages up to the evaluation of the policy."""
    return _until("evaluate", config, run_id)


def publish(config: Config, *, run_id: str | None = None) -> Run:
    """All stages; the model is published if its gate holds, and GateFailed is raised otherwise."""
    return _until("publish", config, run_id)


def run(config: Config, *, run_id: str | None = None) -> Run:
    """The main job, from data or prompts to a published model: the same as `publish`."""
    return _until("publish", config, run_id)


def sweep(config: Config, *, run_id: str | None = None) -> Sweep:
    """Search the space of the section tune, and publish the best model if its gate holds.

    Raises DpoRayError; GateFailed where the best model does not pass.
    """
    from pipelines.work import a_sweep

    done = _recorded(a_sweep(config), run_id)
    found = done.summary["sweep"]
    told = vars(_run(done))
    return Sweep(**told, best=found["best"], best_config=found["best_yaml"], trials=found["results"])


def iterate(config: Config, *, run_id: str | None = None) -> Run:
    """Rounds of sampling, training and measuring; the best one's model is published if its gate holds.

    What each round measured is in summary["rounds"].
    """
    from pipelines.work import rounds

    return _run(_recorded(rounds(config), run_id))


def _until(stage: _Name, config: Config, run_id: str | None) -> Run:
    from pipelines.work import stages_until

    return _run(_recorded(stages_until(config, stage), run_id))


def _recorded(work: Work, run_id: str | None) -> Done:
    from pipelines.record_run import Looking, record_run

    folder: list[str] = []

    def opened(context: RunContext) -> None:
        folder.append(context.folder.uri)

    try:
        with _ONE_AT_A_TIME:
            return record_run(work, run_id, Looking(opened))
    except BaseException as error:
        if folder:
            error.add_note(f"The run's folder is {folder[0]}.")
        raise


def _run(done: Done) -> Run:
    context, summary = done.context, done.summary
    stages = {}
    for name, entry in summary["stages"].items():
        artifact = context.artifacts[name]
        rows = artifact.manifest.rows
        stages[name] = Stage(artifact.fingerprint, artifact.location.uri, rows, entry["reused"], entry["seconds"])
    published = summary["published"]
    evaluation = summary.get("eval") or {}
    return Run(
        run_id=context.run_id,
        folder=context.folder.uri,
        outcome="nothing new" if summary.get("nothing_new") else "published" if published else "done",
        stages=stages,
        published=published,
        accuracy=_estimate(evaluation.get("accuracy")),
        win_rate=_estimate(evaluation.get("win_rate")),
        summary=summary,
    )


def _estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    return Estimate(**{name: found[name] for name in ("value", "low", "high", "n")}) if found else None
