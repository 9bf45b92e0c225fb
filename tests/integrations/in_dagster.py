"""Run by the Python of Dagster's environment: materializes the example's assets, and tells what came of each step."""

import importlib.util
import json
import sys
from pathlib import Path

import dagster as dg

answer = Path(sys.argv[1])
request = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("dagster_assets", request["example"])
assert spec is not None and spec.loader is not None
example = importlib.util.module_from_spec(spec)
sys.modules["dagster_assets"] = example
spec.loader.exec_module(example)
example.PAUSE_S = 0


@dg.asset(deps=[example.key("published_model")])
def deployed() -> None:
    """Something of the user's that comes after a model."""


def carry_out(step: dict, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    if step["what"] == "nightly":  # by the job that the schedule starts, with the resources of the environment
        job = example.defs.resolve_job_def("dpo_ray_nightly")
        return job.execute_in_process(instance=instance, raise_on_error=False)
    resource = {"config": request["config"], "output": request["output"], "program": request["program"]}
    assets = {"data": [example.dpo_ray_data], "model": [example.dpo_ray_model, deployed]}[step["what"]]
    tags = {}
    if "range" in step:
        first, last = step["range"]
        tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    return dg.materialize(
        assets,
        resources={"dpo_ray": example.DpoRay(**{**resource, **step.get("resource", {})})},
        instance=instance,
        partition_key=step.get("partition"),
        tags=tags,
        raise_on_error=False,
    )


def told(result: dg.ExecuteInProcessResult) -> dict:
    events = [event.event_type_value for event in result.all_events]
    [failure] = [e.step_failure_data for e in result.all_events if e.is_step_failure] or [None]
    return {
        "success": result.success,
        "run_id": result.run_id,
        "skipped": [event.step_key for event in result.all_events if event.is_step_skipped],
        "retries": events.count("STEP_UP_FOR_RETRY"),
        "checks": [
            {
                "name": check.check_name,
                "passed": check.passed,
                "description": check.description,
                "metadata": {label: value.value for label, value in check.metadata.items()},
            }
            for check in result.get_asset_check_evaluations()
        ],
        "made": [
            {
                "asset": event.asset_key.path[-1],
                "partition": event.partition,
                "version": event.materialization.tags["dagster/data_version"],
                "metadata": {label: value.value for label, value in event.materialization.metadata.items()},
            }
            for event in result.get_asset_materialization_events()
        ],
        "failure": None
        if failure is None or failure.user_failure_data is None
        else {
            "description": failure.user_failure_data.description,
            "metadata": {label: value.value for label, value in failure.user_failure_data.metadata.items()},
        },
    }


dg.Definitions.validate_loadable(example.defs)
with dg.DagsterInstance.ephemeral() as instance:
    found = [told(carry_out(step, instance)) for step in request["steps"]]
    partitions = sorted(instance.get_materialized_partitions(example.key("reference")))
answer.write_text(json.dumps({"steps": found, "materialized": partitions}))
