"""What a run tells a Prometheus that scrapes Ray's nodes: every metric, what it means, and how it is told.

Ray exports a metric as ray_<name>, a counter as ray_<name>_total, and adds labels of its own: WorkerId, NodeAddress and
the like. Processes without Ray tell nothing, and nothing waits for whoever might listen.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_REFRESH_S = 5.0
"""Ray sends what a gauge was set to once, and forgets it after two of its reports, which are 10 s apart."""


@dataclass(frozen=True)
class Measure:
    """A metric."""

    kind: Literal["counter", "gauge"]
    name: str
    """As Ray is told it."""
    description: str
    labels: tuple[str, ...] = ()
    """Beside `run` (run.name) and `stage`, which all have."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


MEASURES: list[Measure] = []
"""All that there are."""


def _counter(name: str, description: str, *labels: str) -> Measure:
    return _listed(Measure("counter", f"dpo_ray_{name}", description, labels))


def _gauge(name: str, description: str, *labels: str) -> Measure:
    return _listed(Measure("gauge", f"dpo_ray_{name}", description, labels))


def _listed(measure: Measure) -> Measure:
    MEASURES.append(measure)
    return measure


RUNS = _counter("runs", "Runs that ended, by outcome: ok, gate_failed, error, or stopped (Ctrl-C, busy)", "outcome")
PROGRESS = _gauge("progress_timestamp_seconds", "When the run last came on, in Unix time")
STAGE_SECONDS = _gauge("stage_seconds", "How long the stage took, which has ended")

ROWS = _counter("rows", "Rows of finished shards", "artifact")
DROPPED = _counter("rows_dropped", "Rows of finished shards that were left out, by reason", "artifact", "reason")
SHARDS_LEFT = _gauge("shards_left", "Shards that are still to be made", "artifact")
RETRIES = _counter("retries", "Pieces of work that were begun again, for a process died over them", "artifact")
ENGINE_START = _gauge(
    "engine_start_seconds", "How long a worker took to load its model, engine or tokenizer", "artifact"
)
TOKENS = _counter("tokens", "Tokens trained on or sampled", "artifact")

STEPS_LEFT = _gauge("steps_left", "Optimizer steps that are still to be made", "trial")
STEPS_SKIPPED = _counter("steps_skipped", "Steps whose loss or gradient was not finite", "trial")
LOSS = _gauge("loss", "Loss of the last step, or of the last evaluation of held-out pairs", "trial", "pairs")
MARGIN = _gauge("reward_margin", "Reward of chosen less that of rejected answers, likewise", "trial", "pairs")
ACCURACY = _gauge("reward_accuracy", "Share of pairs whose chosen answer has the higher reward", "trial", "pairs")
GRAD_NORM = _gauge("grad_norm", "Norm of the gradient of the last step, before clipping", "trial")
TOKENS_PER_SECOND = _gauge("tokens_per_second", "Tokens of the last step in a second, of all workers", "trial")
GPU_MEMORY = _gauge("gpu_memory_bytes", "Memory of its GPU that a training worker has taken", "trial", "rank")

GATE_PASSED = _gauge("gate_passed", "Whether the last model passed its gate: 1 or 0")
GATE_MEASURE = _gauge("gate_measure", "What the gate looks at, with its 95% interval", "measure", "bound")
PUBLISHED = _gauge("published_timestamp_seconds", "When the latest published model became so, in Unix time")


@dataclass(frozen=True)
class Work:
    """What a process is at: the first labels of all that it tells."""

    run: str = ""
    """run.name, which many runs share, and no run's id."""
    stage: str = ""


_work = Work()
_instruments: dict[str, Any] = {}
_gauges: dict[tuple[Measure, tuple[tuple[str, str], ...]], float] = {}
_lock = threading.Lock()
_keeper: threading.Thread | None = None


def at_work() -> Work:
    """What this process is at, for another one to take up."""
    return _work


def take_up(work: Work) -> None:
    """From now on this process is at that."""
    global _work
    _work = work


def count(measure: Measure, amount: float = 1, /, **labels: str) -> None:
    """Add to a counter."""
    named = _labels(measure, labels)
    instrument = _instrument(measure)
    if instrument is not None and amount > 0:
        instrument.inc(amount, named)


def tell(measure: Measure, value: float, /, **labels: str) -> None:
    """Set a gauge, which stands until it is set anew or this process ends. Told before Ray is there, it is kept."""
    named = _labels(measure, labels)
    with _lock:
        _gauges[measure, tuple(named.items())] = float(value)
    instrument = _instrument(measure)
    if instrument is not None:
        instrument.set(float(value), named)


def tell_progress() -> None:
    """The run has come on."""
    tell(PROGRESS, time.time())


def keep_telling() -> None:
    """Have the gauges of this process stand for as long as it lives."""
    global _keeper
    if _keeper is None:
        _keeper = threading.Thread(target=_refresh, name="dpo-ray-metrics", daemon=True)
        _keeper.start()


def _refresh() -> None:
    while True:
        _tell_again()
        time.sleep(_REFRESH_S)


def _tell_again() -> None:
    with _lock:
        standing = dict(_gauges)
    for (measure, labels), value in standing.items():
        instrument = _instrument(measure)
        if instrument is not None:
            instrument.set(value, dict(labels))


def _labels(measure: Measure, labels: Mapping[str, str]) -> dict[str, str]:
    assert set(labels) == set(measure.labels), (measure.name, labels)
    return {"run": _work.run, "stage": _work.stage, **labels}


def _instrument(measure: Measure) -> Any:
    """Ray's own metric; None where this process has no Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    if measure.name not in _instruments:
        from ray.util.metrics import Counter, Gauge

        kind = Counter if measure.kind == "counter" else Gauge
        _instruments[measure.name] = kind(
            measure.name, description=measure.description, tag_keys=("run", "stage", *measure.labels)
        )
    return _instruments[measure.name]
