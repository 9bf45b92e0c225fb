"""dpo-ray in Airflow 3, as jobs on a standing Ray cluster (cluster/manifests/kubernetes/cluster).

A pod with dpo-ray's image submits the job and follows it; Airflow needs the provider cncf.kubernetes alone. Copy this
file to the folder of DAGs, and give the namespace what runs:

    kubectl create configmap -n dpo-ray dpo-ray-run --from-file=run.yaml

It is tested with the packages of requirements-airflow.txt. The DAGs are called as those of airflow_bash.py: load one of
the two files, and unpause one of its DAGs. The task `run` is skipped where the gate failed (exit code 4). A pod that is
lost leaves the job as it is: the next try finds it by its period, and follows it. A job that failed is submitted again,
and goes on from what is finished.
"""

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG, CronDataIntervalTimetable
from kubernetes.client import models as k8s

NAMESPACE = "dpo-ray"
IMAGE = "registry.example.com/dpo-ray-cpu:0.1.0"
ADDRESS = "http://dpo-ray-head-svc:8265"

GATE_FAILED = 4
SUBMIT = ["submit", "/etc/dpo-ray/run.yaml", "--address", ADDRESS, "--period", "{{ dag_run.run_after | ts_nodash }}"]
DAYS = [
    *("-o", "data.since={{ data_interval_start | ds }}"),
    *("-o", "data.until={{ (data_interval_end - macros.timedelta(microseconds=1)) | ds }}"),
    *("-o", "train.start=published"),
]
SETTINGS: dict[str, Any] = {
    "start_date": datetime(2026, 11, 1),
    "catchup": False,
    "max_active_runs": 1,  # one model after the other
    "default_args": {"retries": 2, "retry_delay": timedelta(minutes=5)},
}


def run(chosen: list[str]) -> KubernetesPodOperator:
    """A pod that submits a run over the data that are chosen, and waits for it."""
    return KubernetesPodOperator(
        task_id="run",
        name="dpo-ray-submit",
        namespace=NAMESPACE,
        image=IMAGE,
        cmds=["dpo-ray"],
        arguments=[*SUBMIT, *chosen],
        skip_on_exit_code=GATE_FAILED,
        # The network policy lets the cluster's own pods talk to its head.
        labels={"app.kubernetes.io/part-of": "dpo-ray"},
        env_vars=[
            k8s.V1EnvVar(name="RAY_AUTH_MODE", value="token"),
            # KubeRay's, which it calls after the cluster.
            k8s.V1EnvVar(
                name="RAY_AUTH_TOKEN",
                value_from=k8s.V1EnvVarSource(
                    secret_key_ref=k8s.V1SecretKeySelector(name="dpo-ray", key="auth_token"),
                ),
            ),
        ],
        volumes=[
            k8s.V1Volume(name="config", config_map=k8s.V1ConfigMapVolumeSource(name="dpo-ray-run")),
            k8s.V1Volume(name="tmp", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit="1Gi")),
            k8s.V1Volume(name="home", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit="1Gi")),
        ],
        volume_mounts=[
            k8s.V1VolumeMount(name="config", mount_path="/etc/dpo-ray", read_only=True),
            k8s.V1VolumeMount(name="tmp", mount_path="/tmp"),
            k8s.V1VolumeMount(name="home", mount_path="/home/dpo-ray"),
        ],
        container_resources=k8s.V1ResourceRequirements(
            requests={"cpu": "250m", "memory": "512Mi"}, limits={"cpu": "1", "memory": "1Gi"}
        ),
        automount_service_account_token=False,
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=1000,
            run_as_group=1000,
            fs_group=1000,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        container_security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        startup_timeout_seconds=600,
    )


with DAG("dpo_ray_nightly", schedule="0 2 * * *", **SETTINGS):
    run([])

# A cron line alone has intervals without a length.
with DAG("dpo_ray_days", schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"), **SETTINGS):
    run(DAYS)
