"""Ray Tune over beta and learning rate: trials only train, all on the same rows, which are scored once."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dpo_ray.config import Config, Tune
from dpo_ray.errors import DataError, DpoRayError
from dpo_ray.evaluation.agreement import margin_noise
from dpo_ray.evaluation.held_out import held_out_margins
from dpo_ray.evaluation.margins import preference_accuracy
from dpo_ray.on_ray.score import score_policy
from dpo_ray.on_ray.session import connect
from dpo_ray.on_ray.trainer import train_policy
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.plan import build_index
from tuning.results import describe, ranked
from tuning.space import grid

_DRIVER_CPUS = 0.1  # a trial's own process only waits for its workers


def run_sweep(
    output: Location, config: Config, rows: Artifact, calibration: Artifact | None, folder: Location
) -> dict[str, Any]:
    """Train and measure every point of the grid. Returns the trials, best first, and writes them to `folder`.

    Args:
        rows, calibration: the reference artifact and its calibration; for a loss without a reference the tokenized
            pairs and None.

    A trial's policy and scores are artifacts like any other: a sweep that was killed, or is widened, computes
    only the trials that are missing. Raises DataError where there is nothing to measure them on, DpoRayError where a
    trial failed.
    """
    options = config.tune
    assert options is not None
    if not len(build_index(rows.shards(), "eval")):
        raise DataError(
            "A sweep ranks its trials by held-out accuracy, and there is no held-out pair: raise "
            "data.held_out_fraction, or name data.eval."
        )
    points = grid(config)
    per_token = config.train.loss.averages_tokens
    noise = margin_noise(calibration.manifest.metrics, per_token=per_token) if calibration is not None else 0.0
    say("sweep", f"{len(points)} trials on the {rows.manifest.kind} artifact {rows.fingerprint}")
    trials = ranked([_measured(trial) for trial in _run(output, config, options, rows, noise)])
    found = {
        rows.manifest.kind: rows.fingerprint,
        "trials": [{**trial, "line": describe(trial)} for trial in trials],
    }
    (folder / "sweep.json").write_bytes(json.dumps(found, indent=1).encode())
    return found


def _run(output: Location, config: Config, options: Tune, rows: Artifact, noise: float) -> list[dict[str, Any]]:
    train = config.train
    workers = train.num_workers * train.cpus_per_worker + 1 + _DRIVER_CPUS
    connect(
        workers * options.max_concurrent_trials,
        (train.num_workers if train.use_gpu else 0) * options.max_concurrent_trials,
        why="tune.max_concurrent_trials trials at once, each with train.num_workers workers and a CPU to feed them",
        trains=True,
    )
    from ray import tune

    def trial(point: dict[str, Any]) -> None:
        # A closure, so that the workers need no module but dpo_ray.
        mine = point["config"]
        policy, _ = train_policy(output, mine, rows)
        scores, _ = score_policy(output, mine, policy, rows)
        margins = held_out_margins(mine.train.loss, scores, rows)
        accuracy = preference_accuracy(margins, noise)
        tune.report(
            {
                "accuracy": accuracy.as_dict() if accuracy else None,
                "mean_margin": float(np.mean(margins)),
                "policy": policy.fingerprint,
                "first_step_loss": policy.manifest.metrics["first_step_loss"],
            }
        )

    filesystem, storage_path = (output / "sweeps").filesystem()
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": _DRIVER_CPUS}),
        param_space={"config": tune.grid_search(grid(config))},
        tune_config=tune.TuneConfig(max_concurrent_trials=options.max_concurrent_trials),
        run_config=tune.RunConfig(name="sweep", storage_path=storage_path, storage_filesystem=filesystem, verbose=1),
    )
    results = tuner.fit()
    failed = [str(error).strip().splitlines()[-1] for error in results.errors]
    if failed:
        raise DpoRayError(
            f"{len(failed)} of {len(results)} trials failed, the first with: {failed[0]} Finished trials are "
            "kept: the same command computes the others only."
        )
    return [{**result.metrics, "config": result.config["config"]} for result in results]


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    train = result["config"].train
    kept = ("accuracy", "mean_margin", "policy", "first_step_loss")
    return {
        "beta": getattr(train.loss, "beta", None),
        "learning_rate": train.learning_rate,
        **{name: result[name] for name in kept},
    }
