"""dpo-ray in Airflow 3, on the workers themselves: every night what is new, and days of the data by their interval.

For an environment with Airflow and without dpo-ray, which is started as a process: copy this file to the folder of
DAGs, and set for the workers DPO_RAY_CONFIG (the YAML), DPO_RAY_OUTPUT (a folder or a bucket, over its run.output) and,
where dpo-ray is not on PATH, DPO_RAY. It is tested with the packages of requirements-airflow.txt.

    dpo_ray_nightly    all data; what is new is told by content, and where nothing is, the tasks succeed within seconds
    dpo_ray_days       files of the data interval, training on from the last published model. Through days, in order:
                       airflow backfill create --dag-id dpo_ray_days --from-date 2026-11-01 --to-date 2026-11-07

Both publish under the configuration's name: unpause one of them. The task `run` is skipped where the gate failed (exit
code 4), and with it what comes after: nothing was published. Other exit codes are failures, and Airflow's retries go on
from what is finished.
"""

import json
import os
import subprocess
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, CronDataIntervalTimetable, task

GATE_FAILED = 4
RUN = "{{ dag.dag_id }}.{{ run_id }}.{{ ti.try_number }}"
COMMAND = '"${DPO_RAY:-dpo-ray}" run "$DPO_RAY_CONFIG" -o "run.output=$DPO_RAY_OUTPUT" --run-id "$RUN"'
DAYS = (
    " --since {{ data_interval_start | ds }} --until {{ (data_interval_end - macros.timedelta(microseconds=1)) | ds }}"
    " -o train.start=published"
)
SETTINGS: dict[str, Any] = {
    "start_date": datetime(2026, 11, 1),
    "catchup": False,
    "max_active_runs": 1,  # one model after the other
    "default_args": {"retries": 2, "retry_delay": timedelta(minutes=5)},
}


@task
def published(run: str) -> dict[str, Any]:
    """The model that stands and what it was measured at, for what comes next."""
    folder = f"{os.environ['DPO_RAY_OUTPUT']}/runs/{run}"
    shown = subprocess.run(
        [os.environ.get("DPO_RAY", "dpo-ray"), "show", folder], stdout=subprocess.PIPE, text=True, check=True
    )
    summary = json.loads(shown.stdout)
    return {
        "model": summary["published"],
        "nothing_new": bool(summary.get("nothing_new")),
        "input": summary.get("input"),
        "accuracy": (summary.get("eval") or {}).get("accuracy"),
    }


def tasks(chosen: str = "") -> None:
    """A run over the data that are chosen, and what it has published."""
    run = BashOperator(
        task_id="run",
        bash_command=f'{COMMAND}{chosen} && echo "$RUN"',  # the last line is what `published` is handed
        env={"RUN": RUN},
        append_env=True,
        skip_on_exit_code=GATE_FAILED,
    )
    published(run.output)


with DAG("dpo_ray_nightly", schedule="0 2 * * *", **SETTINGS):
    tasks()

# A cron line alone has intervals without a length.
with DAG("dpo_ray_days", schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"), **SETTINGS):
    tasks(DAYS)
