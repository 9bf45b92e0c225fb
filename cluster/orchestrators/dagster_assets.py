"""dpo-ray in Dagster: what runs make as assets, the gate as an asset check, days of the data as partitions.

For an environment with Dagster and without dpo-ray, which is started as a process: copy this file there, set DAYS
below, and DPO_RAY_CONFIG and DPO_RAY_OUTPUT in the environment; then `dagster dev -f dagster_assets.py`. It is tested
with the packages of requirements-dagster.txt.

    pairs, tokenized, reference    of a day, or of a range of days in one run (`dpo-ray reference`)
    policy, published_model        of all data, with the check `gate` (`dpo-ray run`); scores of the days are taken over

An asset's data version is its fingerprint, so that what was taken over, or a night without anything new, makes nothing
downstream stale. Where the gate fails (exit code 4), the check fails, published_model is not materialized, and what is
downstream of it is skipped.
"""

import json
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import dagster as dg
from pydantic import Field

# None: the files of data.train are of no days, or there are none (generate). Other keys than days are names of
# partitions: dg.StaticPartitionsDefinition(["language=de", "language=en"]).
DAYS: dg.PartitionsDefinition | None = dg.DailyPartitionsDefinition(start_date="2026-11-01")

GATE_FAILED = 4
HOPELESS = (2, 3)  # configuration and data: another try would end in the same way
RETRIES = 2  # of other failures; each goes on from what is finished
PAUSE_S = 60

# Asset → the stage's names in summary.json, of which a run has at most one, and the folder of its artifacts.
DATA = {
    "pairs": (("ingest", "pair"), "pairs"),
    "tokenized": (("tokenize",), "tokenized"),
    "reference": (("reference",), "reference"),
}
MODEL = {"policy": (("train",), "train")}
PUBLISHED = "published_model"


class DpoRay(dg.ConfigurableResource):
    """The program, and what it is given."""

    config: str
    """The YAML configuration."""
    output: str
    """A folder or a bucket, over the configuration's run.output."""
    program: str = "dpo-ray"
    """Its path, where it is not on PATH: /opt/dpo-ray/bin/dpo-ray."""
    options: list[str] = Field(default_factory=list)
    """Further words of the command line, as ["-o", "train.start=published"]."""
    address: str = ""
    """Dashboard of the Ray cluster that jobs are submitted to; empty: runs are started here."""

    def run(self, context: dg.AssetExecutionContext, command: str) -> tuple[int, dict[str, Any]]:
        """Run a command of dpo-ray.

        Returns its exit code, 0 or 4 (the gate failed), and the run's summary.json. Of other codes raises
        dg.RetryRequested or, at last, dg.Failure.
        """
        attempt = f"-{context.retry_number}" if context.retry_number else ""
        run_id = f"dagster-{context.run_id}{attempt}"
        if self.address:
            words = ["submit", self.config, "--command", command, "--address", self.address, "--submission-id", run_id]
        else:
            words = [command, self.config, "--run-id", run_id]
        given = ["-o", f"run.output={json.dumps(self.output)}", *chosen(context), *self.options]
        code, last = self._follow([self.program, *words, *given], run_id)
        if code not in (0, GATE_FAILED):
            failure = dg.Failure(
                description=f"dpo-ray {command} ended with exit code {code}. {' '.join(last)}",
                metadata={"exit_code": code, "run": f"{self.output}/runs/{run_id}"},
            )
            # Not by a RetryPolicy, which would also start a run again that somebody has ended.
            if code in HOPELESS or context.retry_number >= RETRIES:
                raise failure
            raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=PAUSE_S) from failure
        shown = subprocess.run(
            [self.program, "show", f"{self.output}/runs/{run_id}"], stdout=subprocess.PIPE, text=True, check=True
        )
        return code, json.loads(shown.stdout)

    def _follow(self, command: Sequence[str], run_id: str) -> tuple[int, list[str]]:
        """Exit code and last paragraph of a command. What it says is in the step's log; it is ended with the step."""
        last: deque[str] = deque(maxlen=10)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    sys.stdout.write(line)
                    if line.strip():
                        last.append(line.strip())
                    else:
                        last.clear()
            except BaseException:
                process.send_signal(signal.SIGINT)  # what is finished is kept
                if self.address:
                    subprocess.run([self.program, "job", "cancel", run_id, "--address", self.address], check=False)
                raise
        return process.returncode, list(last)


def chosen(context: dg.AssetExecutionContext) -> list[str]:
    """The options that choose the files of the step's partitions: days as a period, others by name."""
    partitions = context.assets_def.partitions_def
    if partitions is None:
        return []
    if isinstance(partitions, dg.TimeWindowPartitionsDefinition):
        window = context.partition_time_window
        last = window.end - timedelta(microseconds=1)
        return ["-o", f"data.since={window.start:%Y-%m-%d}", "-o", f"data.until={last:%Y-%m-%d}"]
    return ["-o", f"data.partitions={json.dumps(list(context.partition_keys))}"]


def made(
    summary: dict[str, Any], output: str, assets: Mapping[str, tuple[Sequence[str], str]], told: dict[str, Any]
) -> Iterator[dg.MaterializeResult]:
    """The assets that a run has; of a stage that it has not, as the reference of a loss without one, there is none.

    told: asset → its entry in the summary beside the stage's.
    """
    for name, (stages, kind) in assets.items():
        stage = next((summary["stages"][one] for one in stages if one in summary["stages"]), None)
        if stage is None:
            continue
        rows = stage["rows"]
        metadata = {
            **(told.get(name) or {}),
            "dagster/row_count": rows["kept"],
            "rows": rows,
            "reused": stage["reused"],
            "seconds": stage["seconds"],
            "manifest": dg.MetadataValue.path(f"{output}/artifacts/{kind}/{stage['fingerprint']}/manifest.json"),
            "run_id": summary["run_id"],
        }
        yield dg.MaterializeResult(
            asset_key=key(name),
            metadata={label: value for label, value in metadata.items() if value is not None},
            data_version=dg.DataVersion(stage["fingerprint"]),
        )


def key(name: str) -> dg.AssetKey:
    return dg.AssetKey(["dpo_ray", name])


def specs(names: Sequence[str], after: str | None = None) -> list[dg.AssetSpec]:
    """Each asset is made from the one before it."""
    before = [after, *names[:-1]]
    return [
        dg.AssetSpec(key(name), deps=[key(one)] if one else [], skippable=True, group_name="dpo_ray")
        for name, one in zip(names, before, strict=True)
    ]


@dg.multi_asset(
    specs=specs([*DATA]),
    partitions_def=DAYS,
    backfill_policy=dg.BackfillPolicy.single_run() if DAYS is not None else None,
)
def dpo_ray_data(context: dg.AssetExecutionContext, dpo_ray: DpoRay) -> Iterator[dg.MaterializeResult]:
    """Preference data of the chosen days, up to their reference log-probs."""
    _, summary = dpo_ray.run(context, "reference")
    told = {"pairs": {"input": summary["input"]} if "input" in summary else None, "tokenized": summary["data"]}
    yield from made(summary, dpo_ray.output, DATA, {**told, "reference": summary.get("reference")})


@dg.multi_asset(
    specs=specs([*MODEL, PUBLISHED], after=[*DATA][-1]),
    check_specs=[dg.AssetCheckSpec("gate", asset=key("policy"), description="publish.gate of the configuration")],
)
def dpo_ray_model(context: dg.AssetExecutionContext, dpo_ray: DpoRay) -> Iterator[dg.MaterializeResult]:
    """The model that all data make, and what is published of it."""
    code, summary = dpo_ray.run(context, "run")
    measures = {name: (summary.get("eval") or {}).get(name) for name in ("accuracy", "win_rate")}
    told = {"policy": {**summary.get("train", {}), **measures}}
    gate = dg.AssetCheckResult(
        passed=code == 0,
        check_name="gate",
        asset_key=key("policy"),
        description=" ".join(summary["reasons"]) or None,
        metadata={"exit_code": code, **{name: value for name, value in measures.items() if value is not None}},
    )
    for result in made(summary, dpo_ray.output, MODEL, told):
        yield result._replace(check_results=[gate])
    if code != GATE_FAILED:
        version = summary["published"].rpartition("/")[2]
        yield dg.MaterializeResult(
            asset_key=key(PUBLISHED),
            metadata={
                "model": dg.MetadataValue.path(summary["published"]),
                "nothing_new": bool(summary.get("nothing_new")),
                "cost": summary["cost"],
                "report": dg.MetadataValue.path(f"{dpo_ray.output}/runs/{summary['run_id']}/report.html"),
            },
            data_version=dg.DataVersion(version),
        )


nightly = dg.define_asset_job("dpo_ray_nightly", selection=dg.AssetSelection.assets(dpo_ray_model))

defs = dg.Definitions(
    assets=[dpo_ray_data, dpo_ray_model],
    jobs=[nightly],
    schedules=[dg.ScheduleDefinition(job=nightly, cron_schedule="0 2 * * *", execution_timezone="UTC")],
    resources={"dpo_ray": DpoRay(config=dg.EnvVar("DPO_RAY_CONFIG"), output=dg.EnvVar("DPO_RAY_OUTPUT"))},
)
