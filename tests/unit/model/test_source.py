"""What a model is known by where its weights are not fetched, on the hub and in an object store; pinned revisions."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from dpo_ray.config import ImplicitReward, Judge, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.model import source
from dpo_ray.model.folders import HASHES
from dpo_ray.model.pin import pinned
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.storage.location import Location
from tests.object_store import ObjectStore, object_store, upload

COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    source._listing.cache_clear()
    yield tmp_path / "cache"
    source._listing.cache_clear()


class Hub:
    """Stands for the hub, with the library's own interface: one repository, whose large files are in LFS."""

    def __init__(self, folder: Path, downloads: Path):
        self.folder, self.downloads = folder, downloads
        self.reachable = True
        self.asked = 0
        self.fetched: set[str] = set()

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool, timeout: float) -> Any:
        self.asked += 1
        if not self.reachable:
            raise OfflineModeIsEnabled("no hub")
        assert files_metadata and repository == "org/model" and revision in {None, "main", COMMIT}
        siblings = []
        for file in self.folder.iterdir():
            lfs = SimpleNamespace(sha256=hashlib.sha256(file.read_bytes()).hexdigest())
            siblings.append(SimpleNamespace(rfilename=file.name, lfs=lfs if "safetensors" in file.name else None))
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        target = self.downloads / COMMIT
        if local_files_only or not self.reachable:
            if not target.is_dir():
                raise FileNotFoundError("nothing was downloaded before")
            return str(target)
        target.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in self.folder.glob(pattern):
                shutil.copy(file, target)
                self.fetched.add(file.name)
        return str(target)


@pytest.fixture
def hub(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(small_model, tmp_path / "downloads")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_model_of_the_hub_is_known_as_its_copy_in_a_folder_and_no_weights_are_fetched(hub: Hub, small_model: Path):
    there, here = ModelFolder("org/model"), ModelFolder(str(small_model))
    assert there.weights_hash() == here.weights_hash()
    assert there.tokenizer_hash() == here.tokenizer_hash()
    assert there.config() == here.config()
    assert there.tokenizer().get_vocab() == here.tokenizer().get_vocab()
    assert "config.json" in hub.fetched and "model.safetensors" not in hub.fetched
    assert (there.path / "model.safetensors").read_bytes() == (small_model / "model.safetensors").read_bytes()


def test_without_the_hub_the_local_copy_is_read_and_known_alike(hub: Hub, small_model: Path):
    expected = ModelFolder("org/model").weights_hash()
    assert ModelFolder("org/model").path.name == COMMIT
    hub.reachable = False
    source._listing.cache_clear()
    offline = ModelFolder("org/model")
    assert offline.weights_hash() == expected == ModelFolder(str(small_model)).weights_hash()
    assert offline.path.name == COMMIT


def test_without_the_hub_and_without_a_copy_it_is_said_why(hub: Hub):
    hub.reachable = False
    for question in (ModelFolder.weights_hash, lambda folder: folder.path):
        with pytest.raises(ConfigError, match=r"org/model.*the hub did not give it \(OfflineModeIsEnabled: no hub\)"):
            question(ModelFolder("org/model"))


def test_every_hub_id_of_a_configuration_gets_its_commit(hub: Hub, small_model: Path):
    reward = [
        {"type": "reward_model", "path": "org/model", "name": "a"},
        {"type": "judge", "model": "org/model", "name": "b"},
        {"type": "implicit", "policy": "org/model", "reference": "org/model", "name": "c"},
        {"function": "dpo_ray.rewards:brevity", "name": "d"},
    ]
    config = pinned(
        parse_config(
            {
                "run": {"name": "n", "output": "o"},
                "model": {"path": "org/model"},
                "generate": {
                    "prompts": "p",
                    "models": [{"samples": 1, "path": "org/model", "revision": "main"}, {"samples": 1}],
                    "reward": reward,
                },
                "evaluate": {"win_rate": {"against": {"path": str(small_model)}}},
            }
        )
    )
    assert config.generate is not None and config.evaluate.win_rate is not None
    assert config.model.revision == COMMIT
    assert [one.revision for one in config.generate.models] == [COMMIT, None]
    of_reward_model, judge, implicit, _ = config.generate.reward
    assert of_reward_model.revision == COMMIT
    assert isinstance(judge, Judge) and judge.revision == COMMIT
    assert isinstance(implicit, ImplicitReward)
    assert implicit.policy_revision == implicit.reference_revision == COMMIT
    assert config.evaluate.win_rate.against is not None and config.evaluate.win_rate.against.revision is None
    assert ModelFolder.of(config.model).path.name == COMMIT


def test_a_revision_that_nobody_can_resolve_stays_for_who_needs_the_model(hub: Hub):
    hub.reachable = False
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "org/model", "revision": "main"}}
    assert pinned(parse_config(tree | {"data": {"train": "x"}})).model.revision == "main"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def sums(folder: Path) -> bytes:
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(folder.iterdir())]
    return "".join(lines).encode()


def test_in_an_object_store_a_model_is_described_without_its_weights(
    store: ObjectStore, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = upload(small_model, "described/model")
    fetched: list[str] = []
    download = Location._download

    def noted(location: Location, target: Path) -> None:
        fetched.append(location.name)
        download(location, target)

    monkeypatch.setattr(Location, "_download", noted)
    there, here = ModelFolder(uri), ModelFolder(str(small_model))
    assert there.config() == here.config()
    assert there.tokenizer_hash() == here.tokenizer_hash()
    first = there.weights_hash()
    assert ModelFolder(uri).weights_hash() == first != here.weights_hash()
    assert "config.json" in fetched and "model.safetensors" not in fetched
    assert (there.path / "model.safetensors").is_file() and "model.safetensors" in fetched


def test_what_was_exported_here_is_known_by_content_in_an_object_store_too(
    store: ObjectStore, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = upload(small_model, "vouched/model")
    (Location.of(uri) / HASHES).write_bytes(sums(small_model))
    assert ModelFolder(uri).weights_hash() == ModelFolder(str(small_model)).weights_hash()
    # Whoever changes a file later leaves the hashes behind.
    monkeypatch.setattr(source.StoreFolder, "_listed", _younger(uri, "model.safetensors"))
    assert ModelFolder(uri).weights_hash() != ModelFolder(str(small_model)).weights_hash()


def _younger(uri: str, name: str) -> dict[str, tuple[int, int]]:
    """The listing, with a file that was written after the hashes."""
    listed = dict(source.StoreFolder(Location.of(uri))._listed)
    return listed | {name: (listed[name][0], listed[HASHES][1] + 1)}
