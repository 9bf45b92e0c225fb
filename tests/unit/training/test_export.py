"""The trained model as a folder: its files, their dtype and their hashes, written by one rank or by several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from dpo_ray.config import LoRA, Model
from dpo_ray.model.folders import HASHES, stored_dtype
from dpo_ray.model.policy import load_policy
from dpo_ray.storage.artifact import FileEntry
from dpo_ray.storage.location import Location
from dpo_ray.training.checkpoint import load_weights
from dpo_ray.training.export import export_policy
from dpo_ray.training.files import MODEL_FOLDER
from dpo_ray.training.parallel import Rank
from tests.object_store import BUCKET, ObjectStore, object_store
from tests.training import Gang, Trained, random_pairs, scored, small_model

ALONE = Rank(0, 1, torch.device("cpu"))


def export(target: Path | str, source: Path, policy: Any = None, **more: Any) -> list[FileEntry]:
    lora = more.pop("lora", None)
    return export_policy(
        Location.of(target),
        policy=policy or load_policy(source, lora=lora),
        source=source,
        options=Model(path=str(source), lora=lora),
        **{"dtype": None, "me": ALONE} | more,
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of all files of a model."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def changed(source: Path, **more: Any) -> Any:
    policy = load_policy(source, **more)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return policy


def test_a_template_named_by_its_file_is_published_with_the_model(small_model: Path, tmp_path: Path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    for lora in (None, LoRA(rank=2)):
        target = tmp_path / f"published-{lora is not None}"
        options = Model(path=str(small_model), chat_template=str(template), lora=lora)
        policy = load_policy(small_model, lora=lora)
        export_policy(Location.of(target), policy=policy, source=small_model, options=options, dtype=None, me=ALONE)
        assert AutoTokenizer.from_pretrained(target).chat_template == template.read_text()


def test_what_is_trained_whole_is_exported_whole(small_model: Path, tmp_path: Path):
    policy = load_policy(small_model)
    with torch.no_grad():
        policy.model.norm.weight += 0.5
    export(tmp_path / "out", small_model, policy)
    found, before = tensors(tmp_path / "out"), tensors(small_model)
    assert found.keys() == before.keys()  # tied weights once
    assert torch.equal(found.pop("model.norm.weight"), before.pop("model.norm.weight") + 0.5)
    assert all(torch.equal(found[name], before[name]) for name in before)
    # Nothing of how it was trained stays in the configuration.
    assert (tmp_path / "out" / "config.json").read_text() == (small_model / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
def test_left_out_the_dtype_is_that_of_the_base(tmp_path: Path, own: torch.dtype):
    base = small_model(tmp_path / "base", dtype=own)
    policy = changed(base)
    name = str(own).removeprefix("torch.")
    assert stored_dtype(base) == name
    export(tmp_path / "out", base, policy)
    expected = policy.state_dict()
    for key, value in tensors(tmp_path / "out").items():
        assert value.dtype == own and torch.equal(value, expected[key].to(own)), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == own


def test_a_dtype_that_is_asked_for_is_that_of_the_files(small_model: Path, tmp_path: Path):
    export(tmp_path / "out", small_model, dtype="bfloat16")
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize(("asked", "found"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_an_adapter_alone_is_in_float32_unless_asked_otherwise(tmp_path: Path, asked: Any, found: torch.dtype):
    base = small_model(tmp_path / "base", dtype=torch.bfloat16)
    export(tmp_path / "out", base, lora=LoRA(rank=2), dtype=asked)
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {found}


def test_the_entries_and_the_hashes_are_those_of_the_files(small_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    for lora in (None, LoRA(rank=2)):
        entries = export(out, small_model, lora=lora)
        assert {e.name for e in entries} == {f.name for f in out.iterdir()}
        for entry in entries:
            data = (out / entry.name).read_bytes()
            assert (entry.bytes, entry.sha256, entry.rows) == (len(data), hashlib.sha256(data).hexdigest(), None)
        lines = (out / HASHES).read_text().splitlines()
        assert {tuple(line.split("  ")) for line in lines} == {(e.sha256, e.name) for e in entries if e.name != HASHES}


def test_a_large_model_is_in_several_files_with_an_index(small_model: Path, tmp_path: Path):
    policy = changed(small_model)
    out = tmp_path / "out"
    export(out, small_model, policy, file_bytes=40_000)
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for name in files:
        with safe_open(out / name, "pt") as opened:
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 40_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(out).values())
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in policy.state_dict().items())


def test_what_an_attempt_before_left_is_gone(small_model: Path, tmp_path: Path):
    export(tmp_path / "out", small_model, file_bytes=40_000)
    export(tmp_path / "out", small_model)
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("file_bytes", [4_000, 4_000_000_000])
def test_a_model_that_is_held_in_another_form_than_its_files_is_saved_in_theirs(tmp_path: Path, file_bytes: int):
    """transformers stacks the experts of a layer as it loads them."""
    base = small_model(tmp_path / "base")
    config = MixtralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(base)
    policy = changed(base)
    export(tmp_path / "out", base, policy, file_bytes=file_bytes)
    before, found = tensors(base), tensors(tmp_path / "out")
    assert any(".experts.2." in name for name in before) and found.keys() == before.keys()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in before.items()}
    again = load_policy(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in policy.state_dict().items())


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def test_in_an_object_store_the_files_are_the_same(small_model: Path, tmp_path: Path, store: ObjectStore):
    place = f"s3://{BUCKET}/exported"
    export(tmp_path / "out", small_model, file_bytes=40_000)
    Location.of(f"{place}/model.safetensors").write_bytes(b"of an attempt before")
    entries = export(place, small_model, file_bytes=40_000)
    assert {name.removeprefix("exported/") for name in store.names("exported/")} == {e.name for e in entries}
    for entry in entries:
        assert (Location.of(place) / entry.name).read_bytes() == (tmp_path / "out" / entry.name).read_bytes()


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(2, tmp_path_factory.mktemp("gang") / "store")
    yield gang
    gang.end()


@pytest.mark.parametrize("lora", [None, {"rank": 2, "export": "merged"}, {"rank": 2}])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_write_side_by_side_make_one_whole_model(
    small_model: Path, gang: Gang, tmp_path: Path, strategy: str, lora: Any
):
    pairs = scored(random_pairs(8), small_model)
    model = Model.model_validate({"path": str(small_model), "lora": lora})
    gang.run(model, pairs, tmp_path, strategy=strategy, export_dtype="bfloat16", export_file_bytes=40_000)
    found = tensors(tmp_path / MODEL_FOLDER)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    if lora == {"rank": 2}:
        assert all(".lora_" in name for name in found)
        return
    assert found.keys() == tensors(small_model).keys()
    if lora is None:
        policy = load_policy(small_model)
        load_weights(Location.of(Trained(tmp_path).last), policy=policy, average=None)
        expected = policy.state_dict()
        assert all(torch.equal(value, expected[name].bfloat16()) for name, value in found.items())
    assert len(list((tmp_path / MODEL_FOLDER).glob("*.safetensors"))) > 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / MODEL_FOLDER).dtype == torch.bfloat16
    files = json.loads((Trained(tmp_path).last / "exported.json").read_text())
    assert {f["name"] for f in files} == {f.name for f in (tmp_path / MODEL_FOLDER).iterdir()}
