"""Where the files of a model or an adapter lie: a local folder, an object store, the hub. What they are is told there
without fetching weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from dpo_ray.errors import ConfigError
from dpo_ray.model.cache import held
from dpo_ray.model.folders import (
    ADAPTER_CONFIG,
    CONFIG,
    DESCRIPTION,
    HASHES,
    WEIGHTS,
    content,
    file_names,
    matching,
    parse_hashes,
)
from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location
from dpo_ray.storage.packaged import PACKAGE, package_file

_DOWNLOADS = 4  # at once
_HUB_SECONDS = 20.0


class Source(Protocol):
    """The files of a model or an adapter, where they lie."""

    @property
    def place(self) -> str:
        """What it is called, alike whoever names it."""

    def names(self) -> list[str]:
        """Of the files that are there."""

    def content(self, names: list[str]) -> dict[str, str]:
        """Name → what is known of a file's content without fetching weights: its sha256, if anything tells it."""

    def described(self) -> Path:
        """A local folder with all the files that a model is loaded from but the weights."""

    def fetched(self) -> Path:
        """A local folder with all files."""

    def version(self) -> str:
        """Digest of what is there, as it is told at this kind of place: enough to name a copy by."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine's, or one that every node sees."""

    folder: Path

    @property
    def place(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return file_names(self.folder)

    def content(self, names: list[str]) -> dict[str, str]:
        """sha256 of each, read here once."""
        return content(self.folder, names)

    def described(self) -> Path:
        return self.folder

    def fetched(self) -> Path:
        return self.folder

    def version(self) -> str:
        return digest(self.content(self.names()))


@dataclass(frozen=True)
class StoreFolder:
    """A folder of an object store."""

    remote: Location

    @property
    def place(self) -> str:
        return self.remote.uri

    def names(self) -> list[str]:
        return sorted(self._listed)

    def content(self, names: list[str]) -> dict[str, str]:
        """The sha256 of what was exported by this library, which left it beside, and of what is no weights.

        Else no hash is to be had without reading the weights; then place, size and time stand for the content, and
        the same weights at another place count as others.
        """
        small = matching(names, *DESCRIPTION)
        told = {**self._vouched(), **content(self.described(), small)}
        return {name: told.get(name) or digest([self.place, name, *self._listed[name]]) for name in names}

    def described(self) -> Path:
        return self._copied(matching(self._listed, *DESCRIPTION), "described")

    def fetched(self) -> Path:
        return self._copied(self.names(), "")

    def version(self) -> str:
        return digest([self.place, sorted(self._listed.items())])

    @cached_property
    def _listed(self) -> dict[str, tuple[int, int]]:
        """Path below the folder → bytes and time, in ns."""
        return self._list()

    def _list(self) -> dict[str, tuple[int, int]]:
        below = f"{self.remote.uri}/"
        infos = {self.remote.same_store(info.path).uri.removeprefix(below): info for info in self.remote.files()}
        if not {CONFIG, ADAPTER_CONFIG} & infos.keys():
            raise ConfigError(
                f"model.path is {self.remote}, and there is no config.json and no {ADAPTER_CONFIG} in it. Name a "
                "folder written by save_pretrained."
            )
        return {name: (info.size, info.mtime_ns) for name, info in infos.items()}

    def _vouched(self) -> dict[str, str]:
        """Name → sha256, of the files that HASHES was written after."""
        if HASHES not in self._listed:
            return {}
        _, written = self._listed[HASHES]
        told = parse_hashes((self.remote / HASHES).read_bytes().decode())
        older = {name for name, (_, changed) in self._listed.items() if changed <= written}
        return {name: value for name, value in told.items() if name in older}

    def _copied(self, names: list[str], what: str) -> Path:
        """The files in the cache folder, copied once; changed ones are copied again."""
        listed = {name: self._listed[name] for name in names}

        def fill(folder: Path) -> None:
            with ThreadPoolExecutor(_DOWNLOADS) as threads:
                list(threads.map(lambda name: (self.remote / name).copy_to(Location.of(folder / name)), names))
            now = self._list()
            if {name: now.get(name) for name in names} != listed:
                raise ConfigError(
                    f"model.path is {self.remote}, and its files changed while they were copied. Run again when "
                    "whoever writes there has finished."
                )

        key = digest([self.place, what, sorted(listed.items())])
        return held(f"{self.remote.name}-{key}", fill, num_bytes=sum(size for size, _ in listed.values()))


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face hub. Its files are kept in that library's cache."""

    repository: str
    revision: str | None

    @property
    def place(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def commit(self) -> str:
        """The commit that the revision stands for now: asked of the hub, or else as it was at the last download."""
        listing, _ = _listing(self.repository, self.revision)
        return listing.commit if listing is not None else self._downloaded().name

    def names(self) -> list[str]:
        listing, _ = _listing(self.repository, self.revision)
        return sorted(listing.files) if listing is not None else file_names(self._downloaded())

    def content(self, names: list[str]) -> dict[str, str]:
        """sha256 of each: the hub tells it of large files, and small ones are read. Where the hub cannot be asked, as
        offline, all are read from the local copy, and must be in it."""
        listing, _ = _listing(self.repository, self.revision)
        told = {name: value for name, value in listing.files.items() if value} if listing is not None else {}
        rest = [name for name in names if name not in told]
        folder = self._download(rest) if listing is not None and rest else self._downloaded()
        return {name: told[name] if name in told else content(folder, [name])[name] for name in names}

    def described(self) -> Path:
        return self._download(DESCRIPTION)

    def fetched(self) -> Path:
        return self._download((*DESCRIPTION, WEIGHTS))

    def version(self) -> str:
        return digest([self.repository, self.fetched().name])

    def _downloaded(self) -> Path:
        return self._download((*DESCRIPTION, WEIGHTS), offline=True)

    def _download(self, patterns: tuple[str, ...] | list[str], *, offline: bool = False) -> Path:
        """The folder of the commit with these files, and with what was downloaded before."""
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.repository, revision=self.revision, allow_patterns=list(patterns), local_files_only=offline
                )
            )
        except Exception as error:
            _, reason = _listing(self.repository, self.revision)
            raise ConfigError(
                f"model.path is {self.repository}: it is no local folder, and the hub did not give it "
                f"({reason or _short(error)}). Check the name, the network and the access rights, or name a folder."
            ) from error


@dataclass(frozen=True)
class _Listing:
    """What the hub says of a commit."""

    commit: str
    files: dict[str, str | None]
    """Name → sha256, where the hub knows it."""


@lru_cache(maxsize=64)
def _listing(repository: str, revision: str | None) -> tuple[_Listing | None, str]:
    """What the hub says, asked once in a process; or None, and why it does not say it."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_HUB_SECONDS)
    except (OfflineModeIsEnabled, HFValidationError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return None, _short(error)  # what was downloaded before may do
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}
    return _Listing(str(info.sha), files), ""


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_hub_id(path: str) -> bool:
    """Whether a model's path is looked up on the hub: org/name, and no such folder here."""
    local = Path(path).expanduser()
    there = "://" in path or local.is_absolute() or path.startswith((".", "~")) or local.exists()
    return not there and path.count("/") == 1


def is_gguf(path: str) -> bool:
    """Whether a model's path names a GGUF file."""
    return path.startswith(PACKAGE) or (Path(path).suffix == ".gguf" and Path(path).expanduser().is_file())


def locate(path: str, revision: str | None) -> Source:
    """Where the files of a model's path lie; a GGUF file is converted, once. Raises ConfigError where nothing is."""
    local = Path(path).expanduser()
    if revision is not None and (path.startswith(PACKAGE) or local.exists()):
        raise ConfigError(
            f"model.revision is {revision}, but model.path={path} is local, and local files have no revisions. Leave "
            "model.revision out, or name a hub id."
        )
    if is_gguf(path):
        return LocalFolder(converted_gguf(package_file(path) if path.startswith(PACKAGE) else local))
    if "://" in path:
        return StoreFolder(Location.of(path))
    if local.is_dir():
        return LocalFolder(local.absolute())
    if not is_hub_id(path):
        raise ConfigError(
            f"model.path is {path}, and there is no such folder. Name a Hugging Face model folder, a "
            ".gguf file or a hub id such as org/name."
        )
    return HubRepository(path, revision)


def converted_gguf(gguf: Path) -> Path:
    """A GGUF file as a Hugging Face folder in float32, made once and kept in the cache folder."""

    def fill(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The tensors are dequantized already; transformers would otherwise refuse to save them.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    return held(f"{gguf.stem}-{file_hash(Location.of(gguf))[:12]}", fill)
