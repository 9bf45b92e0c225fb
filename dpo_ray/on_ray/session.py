"""Connecting to Ray."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpo_ray.errors import ConfigError, DpoRayError
from dpo_ray.on_ray.authentication import MODE, PATH, TOKEN, WAY_IN, described
from dpo_ray.on_ray.metrics import keep_telling
from dpo_ray.on_ray.preemption import watch_for_preemption
from dpo_ray.on_ray.room import Cluster, Host, Need, Nodes, await_room, require_room
from dpo_ray.origin import short
from dpo_ray.progress import WATCHED, say
from dpo_ray.storage.finished import about_to_compute

_HOURS = 3600
_SECONDS_TO_REACH = 20
_TRIES = "RAY_gcs_server_port_wait_time_s"
_WORKER_ENV = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass
class _Session:
    """What this process has of Ray."""

    trains: bool = False
    """Ray Train or Tune will run on it: they ask the dashboard's State API, which takes seconds to start."""
    is_open: bool = False
    has_dashboard: bool = False
    is_given: bool = False
    """It is one that whoever called us had before: it is used as a cluster, and never shut down."""
    has_own_token: bool = False
    """Its embedded Ray asks for a token that nobody else has."""
    wait_minutes: float = 0


_session = _Session()


def expect_training() -> None:
    """Ray Train or Tune will follow: an embedded Ray that is started for an earlier stage will serve them too."""
    _session.trains = True


def wait_at_most(minutes: float) -> None:
    """How long work waits for a cluster to grow, from now on in this process; it does not where nobody says so."""
    _session.wait_minutes = minutes


def look_for_ray() -> None:
    """Called before a run: a Ray that this process has connected to by itself is the one to work on."""
    ray = sys.modules.get("ray")
    _session.is_given = not _session.is_open and ray is not None and ray.is_initialized()


def connect(need: Need, *, trains: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS (as in a Ray job), or start an embedded one on this machine, with room for work;
    where this process has a Ray of its own, that is taken.

    A cluster that is too small is asked to grow, and given the time for it that wait_at_most says.

    Args:
        trains: the work is Ray Train's or Tune's.

    Raises ConfigError where the cluster is too small, for work would wait there for ever.
    """
    about_to_compute("what Ray is asked for")
    _session.trains |= trains
    if _session.is_open and is_embedded() and not _serves(need.all_cpus, trains):
        # It was started for an earlier stage, of which nothing is left in it.
        disconnect()
    _open(max(need.all_cpus, need.wanted_cpus))
    if is_embedded():
        require_room(nodes(), need)
        return
    await_room(Cluster(nodes, _request), need, _session.wait_minutes)


def join() -> None:
    """Join the cluster of RAY_ADDRESS, or take the Ray that this process has, before it is asked for anything.

    Raises ConfigError where none answers.
    """
    assert not is_embedded()
    _open(0)


def nodes() -> Nodes:
    """What each node of the cluster has that is alive. Ray must be connected."""
    import ray

    return [Host(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def _request(bundles: list[dict[str, float]], label_selectors: list[dict[str, str]]) -> None:
    """Of Ray's autoscaler. Its first version (KubeRay's and `ray up` take the second) does not heed labels."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles, bundle_label_selectors=label_selectors or None)


def _open(embedded_cpus: float) -> None:
    """Join the cluster, or start an embedded Ray of so many CPUs, where this process has none."""
    # Lines of different workers that look alike must not be folded into one: they are progress.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    watch_for_preemption(is_embedded())
    # Seconds between two looks of Ray Train at its workers. At each it takes one report of them: with Ray's 2 s those
    # of short steps queue up, and a training waits for them at its end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    if ray.is_initialized():
        if _session.is_given:
            keep_telling()
            quiet_data()
        return
    if is_embedded():
        _start_embedded(embedded_cpus)
    else:
        _join()
    _session.is_open = True
    keep_telling()
    quiet_data()


def is_embedded() -> bool:
    """Whether the work runs on a Ray that this process starts, and not on a cluster."""
    return not os.environ.get("RAY_ADDRESS") and not _session.is_given


def num_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serves(num_cpus: float, trains: bool) -> bool:
    """Whether the embedded Ray that runs is large enough, and has what Ray Train asks."""
    import ray

    return ray.cluster_resources().get("CPU", 0) >= num_cpus and (_session.has_dashboard or not trains)


def disconnect() -> None:
    """Leave the cluster; an embedded one ends."""
    if not _session.is_open:
        return
    import ray

    _session.is_open = False
    ray.shutdown()


def _join() -> None:
    """Join the cluster of RAY_ADDRESS. Raises ConfigError where none answers, or where it refuses us."""
    import ray
    from ray.exceptions import AuthenticationError

    address = os.environ["RAY_ADDRESS"]
    watched = {WATCHED: os.environ[WATCHED]} if WATCHED in os.environ else {}
    try:
        _reach(address)
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({short(str(error))}). {_WAYS_OUT}"
        ) from error
    try:
        with _few_tries():
            joined = ray.init(
                log_to_driver=True,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": {**_WORKER_ENV, **watched}},
            )
    except (OSError, AuthenticationError) as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and what listens there does not let us in ({short(str(error))}); here "
            f"{described()}. {WAY_IN} Where it is no Ray, or one of another version: {_WAYS_OUT}"
        ) from error
    if joined.dashboard_url:
        say("ray", f"on the cluster {address}, whose dashboard is at http://{joined.dashboard_url}")


_WAYS_OUT = (
    "Name the address of one that runs, as in 10.0.0.1:6379 (the dashboard's is another), or unset RAY_ADDRESS: the "
    "work then starts a Ray of its own on this machine."
)


@contextmanager
def _few_tries() -> Iterator[None]:
    """Where somebody listens who is no Ray, two tries of 40 s each, of 20 that Ray makes by itself."""
    if _TRIES in os.environ:
        yield
        return
    os.environ[_TRIES] = "2"
    try:
        yield
    finally:
        del os.environ[_TRIES]  # for a Ray that is started it would be the seconds that its start may take


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for a quarter of an hour, without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # and not a word of Ray's, as `auto` is
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_REACH).close()


def _start_embedded(num_cpus: float) -> None:
    import ray

    # CPUs are what Ray plans with, not cores: a small machine must still hold the trainer and its data feed. One is
    # for what reads, writes and feeds, which mostly waits.
    cpus = max(num_cores() + 1, int(num_cpus + 0.999))
    say("ray", f"starting Ray on this machine with {cpus} logical CPUs")
    # Inherited by all of its processes. As a runtime environment it would have the workers that Ray starts beforehand
    # be of no use.
    for name, value in _WORKER_ENV.items():
        os.environ.setdefault(name, value)
    # Its ports are open to the network, so Ray demands a token. One that Ray makes by itself stays in the user's home,
    # and every Ray that is started there demands it from then on. This one ends with the process, which reads it once.
    if not {MODE, TOKEN, PATH} & os.environ.keys():
        os.environ[TOKEN] = secrets.token_hex(32)
        _session.has_own_token = True
    for attempt in (1, 2):
        try:
            # "local": not another Ray that happens to run on this machine; who means that one sets RAY_ADDRESS.
            started = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=_session.trains,
                log_to_driver=True,
                logging_level=logging.WARNING,
            )
            _session.has_dashboard = _session.trains
            if _session.trains:
                token = f". It asks for a token: set {MODE}=token and {TOKEN} to have chosen it"
                say("ray", f"its dashboard is at http://{started.dashboard_url}{token * _session.has_own_token}")
            return
        except Exception as error:
            # On a busy machine the node's agent can miss its start-up deadline; a second start mostly succeeds.
            ray.shutdown()
            if attempt == 2:
                raise DpoRayError(
                    f"Ray did not start on this machine ({type(error).__name__}: {error}). Its logs are in "
                    "/tmp/ray/session_latest/logs; a busy machine or a full disk are the common causes."
                ) from error
            say("ray", "the start failed; trying once more")


def quiet_data() -> None:
    """Ray Data in this process: our own progress lines instead of its bars, and patience with slow engines."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    # A shard on a slow engine may take long, and while an engine loads nothing moves at all.
    context.execution_no_progress_timeout_s = 6 * _HOURS
    logging.getLogger("ray.data").setLevel(logging.WARNING)
