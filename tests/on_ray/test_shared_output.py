"""A local run.output on a cluster: every node has to see it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import shared_output
from dpo_ray.on_ray.ask_nodes import Node
from dpo_ray.on_ray.shared_output import read_token, require_seen_by_all
from dpo_ray.storage.location import Location
from tests.command_line import CONFIGS, LONGEST, dpo_ray, overrides
from tests.on_ray.test_main_job import preference_rows
from tests.ray_head import ray_head

NODES = [Node("a", "head (10.0.0.1)"), Node("b", "worker (10.0.0.2)"), Node("c", "late (10.0.0.3)")]


def test_a_node_that_does_not_see_it_is_named(tmp_path: Path):
    def read(nodes: Sequence[Node], file: Path) -> list[str | None]:
        return [read_token(str(file)), "", None]

    with pytest.raises(ConfigError, match=r"of the 3 nodes .* 1 does not see .*: worker \(10\.0\.0\.2\)\. .*s3://"):
        require_seen_by_all(Location.of(tmp_path), NODES, read)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_all_see_is_taken_and_nodes_without_an_answer_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    require_seen_by_all(Location.of(tmp_path), NODES, lambda nodes, file: [file.read_text(), file.read_text(), None])
    said = capfd.readouterr().err
    assert "is seen on late (10.0.0.3) could not be found out" in said
    assert "is seen by 2 nodes; those that join later have to see it too" in said


def test_another_file_of_the_same_name_is_not_the_same_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="3 do not see"):
        require_seen_by_all(Location.of(tmp_path), NODES, lambda nodes, file: ["other"] * 3)


def test_an_object_store_is_not_asked():
    def read(nodes: Sequence[Node], file: Path) -> list[str | None]:
        raise AssertionError

    require_seen_by_all(Location.of("s3://bucket/out"), NODES, read)


def test_a_token_that_does_not_appear_is_waited_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_output, "_SECONDS_TO_APPEAR", 0.1)
    assert read_token(str(tmp_path / "none")) == ""


@pytest.mark.ray
def test_a_node_with_a_folder_of_its_own_at_that_place_is_refused(tmp_path: Path, write_preferences):
    output = tmp_path / "out"
    output.mkdir()
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", str(output)]).returncode != 0:
        pytest.skip("this user may not mount a folder of its own for one process (unshare -m, as root)")
    write_preferences(tmp_path / "data", preference_rows(0, 12))
    arguments = overrides(run__output=str(output), model__path="none", data__train=str(tmp_path / "data"))
    command = ["ingest", str(CONFIGS / "align_cpu.yaml"), *arguments]
    own = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(output)]
    with ray_head() as head:
        done = dpo_ray(*command, env=head.env)
        assert done.code == 0, done.log
        with head.node(wrapped=own):
            deadline = time.monotonic() + LONGEST
            while (done := dpo_ray(*command, env=head.env)).code == 0 and time.monotonic() < deadline:
                pass  # it has not joined yet
    assert done.code == 2, done.log
    assert f"run.output is {output}, a local folder, and of the 2 nodes of the Ray cluster 1 does not see" in done.log
