"""Data sets of the Hugging Face hub: which files one has, and each of them in that library's cache on this machine.

A file is named hf://datasets/<owner>/<name>@<commit>/<path>: it never changes, and each node that reads it fetches it
once. Where the hub cannot be asked, what was downloaded before is what there is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from dpo_ray.errors import DataError

SCHEME = "hf://"
_SECONDS = 20.0
_PLACE = re.compile(
    r"(?:hf://datasets/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[\w.-]+|[^/]+))?(?:/(?P<path>.*))?"
)
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^/]+)?")
_FILE = re.compile(r".*\.(parquet|arrow|jsonl|ndjson|json|csv|tsv)(\.gz|\.zst)?")


class HubPath(NamedTuple):
    """Files of a data set of the hub."""

    repository: str
    revision: str | None
    """A branch, tag or commit; None: the main branch."""
    path: str
    """Of a file, of a folder or a glob; empty: of all files."""

    @classmethod
    def of(cls, place: str) -> HubPath:
        """Raises DataError where it is spelled wrong."""
        found = _PLACE.fullmatch(place)
        if found is None:
            raise DataError(
                f"{place} names no data set of the hub. Spell it hf://datasets/owner/name, with @revision behind the "
                "name and the path of a file, a folder or a glob behind that, if any."
            )
        revision = found["revision"]
        return cls(found["repository"], unquote(revision) if revision else None, (found["path"] or "").strip("/"))

    def uri(self, commit: str, name: str) -> str:
        """Of one of its files, as a commit has it."""
        return f"{SCHEME}datasets/{self.repository}@{quote(commit, safe='')}/{name}"


def is_hub_place(place: str) -> bool:
    """Whether files are looked up on the hub: hf://datasets/…, or owner/name where there is no such folder here.

    What is called as files of rows are is never asked for there: it is a path of here, with a mistake in it maybe.
    """
    if place.startswith(SCHEME):
        return True
    return bool(_NAME.fullmatch(place)) and not _FILE.fullmatch(place) and not Path(place).exists()


def hub_files(place: HubPath) -> dict[str, str]:
    """Path → URI of all files of the data set. Raises DataError where neither the hub nor the cache knows it."""
    commit, names = _listed(place.repository, place.revision)
    return {name: place.uri(commit, name) for name in names}


def fetched(uri: str) -> str:
    """The path of a file in this machine's cache, where it is downloaded to. Raises DataError."""
    from huggingface_hub import hf_hub_download

    place = HubPath.of(uri)
    try:
        return str(hf_hub_download(place.repository, place.path, repo_type="dataset", revision=place.revision))
    except Exception as error:
        raise DataError(
            f"{uri} could not be fetched from the hub ({_short(error)}). Check the network and the access rights of "
            f"every node, or download the data set (hf download --repo-type dataset {place.repository}) to where all "
            "nodes see it and name that folder."
        ) from error


@lru_cache(maxsize=64)
def _listed(repository: str, revision: str | None) -> tuple[str, tuple[str, ...]]:
    """The commit, and the paths of its files: asked of the hub, or else those that were downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    reason, hub = "", HfApi()
    try:
        # What a branch stood for is kept, so that without the hub it still stands for that.
        commit = hub.resolve_revision(repository, repo_type="dataset", revision=revision).resolved
        try:
            info = hub.dataset_info(repository, revision=commit, timeout=_SECONDS)
            return commit, tuple(file.rfilename for file in info.siblings or ())
        except Exception as error:  # what was downloaded before may do
            reason = _short(error)
        folder = snapshot_download(repository, repo_type="dataset", revision=commit, local_files_only=True)
    except Exception as error:
        raise DataError(
            f"{repository} is no file or folder here, and as a data set the hub did not give it "
            f"({reason or _short(error)}). Check the path; or the name, the network and the access rights (HF_TOKEN)."
        ) from error
    root = Path(str(folder))
    return commit, tuple(sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
