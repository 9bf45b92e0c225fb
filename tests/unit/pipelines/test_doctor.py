"""What the doctor finds: each breakage is made here, and is seen as a line with a way out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray import machine
from dpo_ray.config import Config, parse_config
from dpo_ray.machine import Disk, Machine
from dpo_ray.on_ray.ask_nodes import Answer, Node
from dpo_ray.on_ray.authentication import described
from dpo_ray.on_ray.room import Host
from dpo_ray.on_ray.session import join
from dpo_ray.storage import probe
from pipelines.doctor import examination
from pipelines.doctor.disks import room_on
from pipelines.doctor.examination import Cluster, examine
from pipelines.doctor.lines import Line, exit_code, looked_at
from tests.command_line import CONFIGS, Finished, in_process, overrides
from tests.object_store import BUCKET, object_store
from tests.ray_head import free_ports

GIB = 2**30
NODES = [Node("a", "head (10.0.0.1)", "/tmp/ray/s"), Node("b", "worker (10.0.0.2)", "/tmp/ray/s")]


@pytest.fixture
def tree(tiny_model: Path, tmp_path: Path, write_preferences: Callable[..., Path]) -> dict[str, Any]:
    """A configuration that nothing is wrong with."""
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    return {
        "run": {"name": "n", "output": str(tmp_path / "out")},
        "model": {"path": str(tiny_model)},
        "data": {"train": str(write_preferences(tmp_path / "data", rows))},
        "reference": {"engine": "torch"},
    }


@pytest.fixture(scope="module")
def here() -> Machine:
    """What this machine has, told by itself."""
    return machine.look([], [], {}, False)


def lines(config: Config | dict[str, Any], check: str, cluster: Cluster | None = None, **more: Any) -> list[Line]:
    """What one check finds."""
    config = config if isinstance(config, Config) else parse_config(config)
    everything = examination._Examination(config, cluster, None, more.get("disk_of", machine.disk_of))
    if "here" in more:
        everything.__dict__["here"] = more["here"]
    everything.joined = cluster is not None
    return [line for name, look in everything.checks() if name == check for line in looked_at(name, look)]


def failure(found: list[Line], *said: str, code: int = 2) -> str:
    """The one line that failed."""
    [line] = [line for line in found if line.status == "failed"]
    for text in said:
        assert text in line.said, line.said
    assert line.exit_code == code
    return line.said


def cluster(answers: list[Answer | None], nodes: list[Host] | None = None, **more: Any) -> Cluster:
    return Cluster(
        "10.0.0.1:6379",
        join=more.get("join", lambda: None),
        nodes=lambda: nodes or [Host({"CPU": 8.0})] * 2,
        ask=lambda function, arguments: list(zip(NODES, answers, strict=True)),
        see=more.get("see", lambda output: None),
    )


def answer(found: Machine, late: float = 0.0) -> Answer:
    """Of a node whose clock is so many seconds behind."""
    now = time.time()
    return Answer(replace(found, clock=now - late), now)


def test_a_file_in_the_place_of_the_output(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("")
    tree["run"]["output"] = str(tmp_path / "file" / "out")
    failure(lines(tree, "output"), f"{tmp_path}/file/out", "nothing can be written there", "-o run.output=")


def test_nothing_is_left_of_the_look_at_the_output(tree: dict[str, Any], tmp_path: Path):
    tree["run"]["output"] = str(tmp_path / "deep" / "er" / "out")
    [line] = lines(tree, "output")
    assert line.status == "ok" and "conditionally replaced" in line.said
    assert not (tmp_path / "deep").exists()


@contextmanager
def in_store(tree: dict[str, Any], bucket: str = BUCKET, **kind: bool) -> Iterator[None]:
    with object_store(**kind):
        tree["run"]["output"] = f"s3://{bucket}/out"
        yield


def test_a_store_as_it_should_be_and_a_bucket_that_is_missing(tree: dict[str, Any]):
    with object_store() as store:
        tree["run"]["output"] = f"s3://{BUCKET}/out"
        assert [line.status for line in lines(tree, "output")] == ["ok"]
        assert store.names() == []
        tree["run"]["output"] = "s3://no-such-bucket/out"
        failure(lines(tree, "output"), "s3://no-such-bucket/out", "nothing can be written there", "-o run.output=")


def test_a_store_without_conditional_writes(tree: dict[str, Any]):
    with in_store(tree, conditional=False):
        failure(lines(tree, "output"), "does not heed conditional writes", "a shared folder with file locks")


def test_credentials_that_the_store_does_not_know(tree: dict[str, Any]):
    with in_store(tree, knows_keys=False):
        failure(lines(tree, "output"), "s3://bucket/out", "give this user write access")
        said = failure(lines(tree, "leases"), "AWS_ACCESS_KEY_ID", "aws configure export-credentials")
        assert "not-to-be-logged" not in said


def test_a_clock_of_the_store_that_is_far_from_this_one(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe.time, "time", lambda now=time.time: now() - 3600)
    failure(lines(tree, "output"), "The store's is 3600 s ahead of this machine's", "NTP")
    monkeypatch.setattr(probe.time, "time", lambda now=time.time_ns: now() / 1e9 + 60)
    assert [line.status for line in lines(tree, "output")] == ["ok", "warning"]


@pytest.mark.parametrize(
    ("kept", "check", "said"),
    [
        ("config.json *.safetensors", "model {model}", "There is no tokenizer in"),
        (
            "config.json *.safetensors tokenizer*",
            "tokenizer of model.path",
            "name a file with its template as model.chat_template",
        ),
        ("tokenizer* chat_template*", "model {model}", "Name a folder written by save_pretrained"),
    ],
    ids=["no tokenizer", "no chat template", "no weights"],
)
def test_a_model_folder_that_lacks_something(tree, tiny_model: Path, tmp_path: Path, kept: str, check: str, said: str):
    folder = tmp_path / "model"
    folder.mkdir()
    for pattern in kept.split():
        for file in tiny_model.glob(pattern):
            shutil.copy(file, folder)
    tree["model"]["path"] = str(folder)
    failure(lines(tree, check.format(model=folder)), said)


def test_a_tokenizer_of_another_model_and_limits_beyond_its_positions(tree, tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "vocab_size": 1000}))
    tree["model"]["path"] = str(folder)
    failure(lines(tree, "tokenizer of model.path"), "and the model's vocabulary 1000", "resize the model's embeddings")
    tree |= {"model": {"path": str(tiny_model)}, "data": {**tree["data"], "max_prompt_tokens": 4000}}
    [line] = lines(tree, "tokenizer of model.path")
    assert line.status == "warning" and "is 4512, and the model was made for 2048 positions" in line.said


def test_packages_that_are_missing_or_of_another_version(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "dpo_ray-9.dist-info"
    info.mkdir()
    asked = "Requires-Dist: surely-not-there>=3\nRequires-Dist: pyarrow>=9999\nRequires-Dist: numpy\n"
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: dpo-ray\nVersion: 9\n{asked}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(examination, "modules", lambda config: [])
    found = [line.said for line in lines(tree, "packages") if line.status == "failed"]
    assert len(found) == 2
    assert found[0].startswith("surely-not-there is not installed (surely-not-there>=3 is needed). Install dpo-ray")
    assert "pyarrow is " in found[1] and "pyarrow>=9999 is needed" in found[1]


def test_a_package_that_cannot_be_imported(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(examination, "modules", lambda config: ["json", "vllm", "crashing"])
    found = [line.said for line in lines(tree, "packages") if line.status == "failed"]
    assert "`import vllm` fails: ImportError: libcudart.so.12: cannot open" in found[0] and "Install it" in found[0]
    assert "`import crashing` fails: its import was killed by SIGSEGV" in found[1]
    tree["reference"] = {"engine": "vllm"}
    failure(lines(tree, "engine"), "vLLM cannot be imported: ImportError: libcudart")


def test_a_disk_that_is_nearly_full(tree, here: Machine):
    def disk_of(free: float) -> Callable[[str], Disk]:
        return lambda folder: Disk(folder, 100 * GIB, int(free * GIB))

    # The tiny model's state is some 0.13 GiB; Ray stops at 95%, whatever is needed.
    assert {line.status for line in lines(tree, "disk", disk_of=disk_of(50))} == {"ok"}
    assert {line.status for line in lines(tree, "disk", disk_of=disk_of(9))} == {"warning"}
    failure(lines(tree, "disk", disk_of=disk_of(4)), "it is 96% full", "Ray spills no objects", "RAY_TMPDIR")
    found = [line.said for line in lines(tree, "disk", disk_of=disk_of(0.01)) if line.status == "failed"]
    assert any("2 checkpoints, one more, and the model take about 0.1 GiB" in said for said in found)
    assert any("train.keep_checkpoints" in said and "dpo-ray gc" in said for said in found)


def test_a_stage_that_needs_more_gpus_than_there_are(tree, here: Machine):
    tree["train"] = {"use_gpu": True, "num_workers": 8}
    waits = lines(tree, "cluster", cluster([None, None], [Host({"CPU": 16.0, "GPU": 4.0})]))
    assert [line.status for line in waits] == ["ok", "warning"]
    tree["run"]["wait_for_resources"] = 0
    found = lines(tree, "cluster", cluster([None, None], [Host({"CPU": 16.0, "GPU": 4.0})]))
    failure(found, "train: The Ray cluster has 4 GPUs, but this needs 8", "more or larger nodes")
    alone = [line.said for line in lines(tree, "room", here=here) if line.status == "failed"]
    assert any("train: This machine has 0 GPUs, but this needs 8" in said for said in alone)
    failure(lines(tree, "GPUs", here=here), "has no GPU, and the configuration asks for some", "train.use_gpu=false")


def test_nodes_that_nothing_can_be_put_on(tree, here: Machine, monkeypatch: pytest.MonkeyPatch):
    tree["placement"] = {"data": {"label_selector": {"pool": "cpu"}}, "training": {"label_selector": {"pool": "gpu"}}}
    tree["run"]["wait_for_resources"] = 0
    nodes = [Host({"CPU": 8.0}, {"pool": "cpu"}), Host({"CPU": 8.0}, {"pool": "gpus"})]
    found = lines(tree, "cluster", cluster([None, None], nodes))
    assert [line.said for line in found if "placement.data" in line.said] == ["placement.data (pool=cpu): 1 of 2 nodes"]
    failure(found, "reference, train, evaluate: No node", "(pool=gpu)", "1 with pool=gpus", "`ray start --labels`")
    # On this machine there is nothing to choose from, which is said once.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failure(lines(tree, "placement"), "placement.training (pool=gpu)", "RAY_ADDRESS names none")
    assert [line.status for line in lines(tree, "room", here=here)] == ["ok"]


def test_vllm_is_missed_only_where_its_engines_may_be(tree, here: Machine):
    tree |= {"reference": {"engine": "vllm"}, "placement": {"engines": {"label_selector": {"pool": "gpu"}}}}
    bare = replace(here, unmet=["vllm is not installed"])
    asked = [replace(NODES[0], labels={"pool": "cpu"}), replace(NODES[1], labels={"pool": "gpu"})]
    both = replace(cluster([]), ask=lambda function, arguments: [(node, answer(bare)) for node in asked])
    failure(lines(tree, "nodes", both, here=here), "worker (10.0.0.2): vllm is not installed")


def with_driver(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine with another nvidia-smi."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return machine.look([], [], {}, False)


def test_a_driver_that_does_not_answer(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree["train"] = {"use_gpu": True}
    found = with_driver(
        tmp_path, "echo 'NVIDIA-SMI has failed: no communication with the driver.'; exit 9", monkeypatch
    )
    failure(lines(tree, "GPUs", here=found), "NVIDIA-SMI has failed", "install the driver anew")


def test_gpus_that_pytorch_cannot_use_and_gpus_that_others_hold(tree, tmp_path, monkeypatch: pytest.MonkeyPatch):
    tree |= {"train": {"use_gpu": True}, "vllm": {"gpus_per_actor": 1}, "reference": {"engine": "vllm"}}
    row = "NVIDIA H100 80GB HBM3, 81920, 40960, 580.12"
    found = with_driver(tmp_path, f"echo '{row}'; echo '{row.replace('40960', '0')}'", monkeypatch)
    said = [line.said for line in lines(tree, "GPUs", here=found) if line.status == "failed"]
    assert "has 2 × NVIDIA H100 80GB HBM3, but its PyTorch" in said[0] and "Install the CUDA build" in said[0]
    assert "of GPU 0" in said[1] and "others hold 40.0 of 80.0 GiB" in said[1] and "nvidia-smi names" in said[1]
    assert len(said) == 2
    old = replace(found, torch_cuda="13.0", torch_gpus=0)
    said = [line.said for line in lines(tree, "GPUs", here=old) if line.status == "failed"]
    assert "with driver 580.12, but its PyTorch, built for CUDA 13.0, can use none" in said[0]
    assert "Update the driver" in said[0]
    good = replace(found, torch_cuda="13.0", torch_gpus=2, gpus=found.gpus[1:])
    assert [line.status for line in lines(tree, "GPUs", here=good)] == ["ok"]


def test_nodes_alike_are_in_order(tree, here: Machine):
    assert [line.status for line in lines(tree, "nodes", cluster([answer(here)] * 2), here=here)] == ["ok"]
    # A build for CUDA is no other version.
    cuda = replace(here, versions={**here.versions, "torch": here.versions["torch"].partition("+")[0] + "+cu130"})
    assert [line.status for line in lines(tree, "nodes", cluster([answer(cuda)] * 2), here=here)] == ["ok"]


def test_a_node_with_other_versions(tree, here: Machine):
    other = replace(here, python="3.9.1", versions={**here.versions, "transformers": "4.40.0"})
    found = lines(tree, "nodes", cluster([answer(here), answer(other)]), here=here)
    failure(
        found,
        "worker (10.0.0.2) has other versions",
        "Python 3.9.1",
        f"transformers 4.40.0 ({here.versions['transformers']} here)",
        "one image for all",
    )


def test_a_node_with_another_checkout_of_the_same_version(tree, here: Machine):
    found = lines(tree, "nodes", cluster([answer(replace(here, source="0")), answer(here)]), here=here)
    failure(found, "head (10.0.0.1) has other versions", "another source of dpo-ray", "Install the same on every node")


def test_a_node_whose_clock_is_off(tree, here: Machine):
    found = lines(tree, "nodes", cluster([answer(here), answer(here, late=1200)]), here=here)
    failure(found, "The clock of worker (10.0.0.2) is 1200 s behind this machine's", "NTP")
    found = lines(tree, "nodes", cluster([answer(here), answer(here, late=-20)]), here=here)
    assert [(line.status, "20 s ahead of" in line.said) for line in found] == [("warning", True), ("ok", False)]


def test_nodes_that_do_not_answer_or_lack_the_library(tree, here: Machine):
    failed = Answer(None, time.time(), "ModuleNotFoundError: No module named 'dpo_ray'")
    found = [x for x in lines(tree, "nodes", cluster([None, failed]), here=here) if x.status == "failed"]
    assert "head (10.0.0.1) did not answer within" in found[0].said and "ray status" in found[0].said
    assert "No module named 'dpo_ray'" in found[1].said and "Install the version of this machine" in found[1].said


def test_a_node_with_a_full_disk_and_without_a_package(tree, here: Machine):
    disks = {"Ray's temporary folder": Disk("/tmp/ray/s", 100 * GIB, GIB)}
    other = replace(here, disks=disks, unmet=("peft is not installed (peft is needed)",))
    found = [x.said for x in lines(tree, "nodes", cluster([answer(here), answer(other)]), here=here) if x.exit_code]
    assert found[0].startswith("worker (10.0.0.2): peft is not installed")
    assert "worker (10.0.0.2): Ray's temporary folder, /tmp/ray/s" in found[1] and "it is 99% full" in found[1]


def test_an_address_that_nothing_answers_at(no_ray: None, tree, monkeypatch: pytest.MonkeyPatch):
    [port] = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    found = list(examine_quietly(parse_config(tree), cluster([None, None], join=join), monkeypatch))
    said = failure([x for x in found if x.check == "cluster"], "no Ray cluster answers there", "unset RAY_ADDRESS")
    assert f"127.0.0.1:{port}" in said
    failure([x for x in found if x.check == "nodes"], "was not joined")


def examine_quietly(config: Config, asked: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(examination, "modules", lambda config: [])
    return examine(config, asked)


def test_a_token_that_is_not_there_or_that_others_can_read(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    joined = cluster([None, None])
    assert [(x.status, "no token is sent" in x.said) for x in lines(tree, "Ray's token", joined)] == [("warning", True)]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    failure(lines(tree, "Ray's token", joined), "no token is found here", "ray get-auth-token", "~/.ray/auth_token")
    assert described() == "RAY_AUTH_MODE is token, and no token is found"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret-of-the-cluster")
    token.chmod(0o644)
    found = lines(tree, "Ray's token", joined)
    assert [x.status for x in found] == ["warning", "ok"] and f"chmod 600 {token}" in found[0].said
    assert not any("secret-of-the-cluster" in x.said for x in found)
    token.chmod(0o600)
    assert [x.status for x in lines(tree, "Ray's token", joined)] == ["ok"]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    failure(lines(tree, "Ray's token", joined), "which cannot be read (No such file", "ray get-auth-token")


def test_one_failed_look_stops_no_other_and_none_ends_in_a_traceback(tree, tmp_path, monkeypatch: pytest.MonkeyPatch):
    tree |= {"data": {"train": str(tmp_path / "none.parquet")}, "train": {"use_gpu": True}}
    tree["model"]["path"] = str(tmp_path / "no model")
    tree["run"]["output"] = str(tmp_path / "data" / "train-00000.parquet" / "out")

    def broken(folder: str) -> Disk:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(examination, "modules", lambda config: [])
    found = list(examine(parse_config(tree), None, disk_of=broken))
    failed = [(line.check, line.exit_code) for line in found if line.status == "failed"]
    assert list(dict(failed)) == [
        "data", f"model {tmp_path}/no model", "tokenizer of model.path", "output", "disk", "GPUs", "room"
    ]  # fmt: skip
    assert exit_code(found) == 3  # the data's, which a run would meet first
    [disk] = [line for line in found if line.check == "disk"]
    assert disk.exit_code == 1
    assert "ended with ZeroDivisionError: division by zero" in disk.said and "worth reporting" in disk.said
    assert found[-1].check == "engine" and found[-1].status == "ok"


def doctor(tree: dict[str, Any], *more: str) -> Finished:
    values = {f"{section}__{key}": value for section, part in tree.items() for key, value in part.items()}
    return in_process("doctor", str(CONFIGS / "align_cpu.yaml"), *overrides(**values), *more)


def test_a_person_reads_lines_and_a_program_json(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    half = SimpleNamespace(total=100 * GIB, used=50 * GIB, free=50 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: half)  # whatever is free here
    done = doctor(tree)
    assert done.code == 0, done.log
    assert f"ok      output: {tmp_path}/out: files are written" in done.log
    assert done.log.splitlines()[-1].startswith("Nothing failed in ")
    monkeypatch.setattr(examination, "modules", lambda config: [])
    tree["data"]["train"] = str(tmp_path / "none.parquet")
    done = doctor(tree, "--json")
    assert done.code == 3
    told = json.loads(done.log.splitlines()[-1])
    assert told["exit_code"] == 3
    assert [line["check"] for line in told["lines"] if line["status"] == "failed"] == ["data"]
    assert "and no file is there. Check the path" in done.log


def test_a_configuration_that_is_not_understood_is_a_line_too(tree):
    tree["train"] = {"no_such_key": 1}
    done = doctor(tree, "--json")
    assert done.code == 2
    [line] = json.loads(done.log.splitlines()[-1])["lines"]
    assert (line["check"], line["status"]) == ("file", "failed") and "no_such_key" in line["said"]


def test_a_file_system_that_tells_no_size_is_no_error():
    [(status, said)] = room_on("run.output", Disk("/mnt/bucket", 0, 0), {"run.output": (GIB, "checkpoints")}, "")
    assert status == "warning" and "does not tell how much room it has" in said
