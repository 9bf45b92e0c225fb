"""What a policy was made from, kept for as long as models of it may be in use: `dpo-ray gc` removes the artifacts.

<output>/lineage/policies/<fingerprint>.json    a policy: the model it was trained from, source files, artifacts, shards
<output>/lineage/rows/<kind>/<shard>            ids of the rows of a shard, without their texts (dpo_ray.data.seen_rows)

A record is written before its policy is published. Shards are named once, whichever policies were trained on them.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import DataError
from dpo_ray.storage.location import Location

FOLDER = "lineage"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class SourceFile(_Record):
    """A file that rows were read from."""

    uri: str
    """Where it lay; it may have been moved since."""
    key: str
    """The option that named it, such as data.train."""
    sha256: str | None = None
    """Of its bytes; None of prompts, which are known by their rows."""


class StartModel(_Record):
    """The model that a training began with."""

    weights: str
    """Their hash, as the training is known by."""
    path: str | None = None
    """As model.path was; None where it is not known any more."""
    revision: str | None = None


class MadeArtifact(_Record):
    """An artifact on the way from the source files to the policy."""

    kind: str
    fingerprint: str
    created: str
    rows: int | None = None


class ShardLineage(_Record):
    """A shard of pairs, and what became of its rows."""

    pairs: str
    """Name of its file among those of its kind."""
    rows: str
    """Name of the file with the rows that were trained on, or held out, among those of PolicyLineage.rows_kind."""
    source: int | None = None
    """Its file: place in PolicyLineage.sources."""
    read: int
    """Rows of the file that were read for it."""
    dropped: dict[str, int] = {}
    """Reason → rows."""
    trained: int
    """Rows to train on; of them, those that did not fill the last step were left out of it."""
    held_out: int


class PolicyLineage(_Record):
    """What a policy was made from."""

    policy: str
    """Fingerprint of the training; also the version where it is published."""
    run_id: str
    """The run that recorded it."""
    model: StartModel
    parent: str | None = None
    """Fingerprint of the policy that it was trained from; None: it was trained from a model of others."""
    rows_kind: str
    sources: list[SourceFile]
    artifacts: list[MadeArtifact]
    """In the order in which they were made."""
    shards: list[ShardLineage]

    def made(self, kind: str) -> MadeArtifact | None:
        """The artifact of a kind, of several the last one."""
        return next((one for one in reversed(self.artifacts) if one.kind == kind), None)


def ids_file(output: Location, kind: str, shard: str) -> Location:
    """Where the ids of the rows of a shard lie."""
    return output / FOLDER / "rows" / kind / shard


def ids_there(output: Location, kind: str) -> frozenset[str]:
    """Names of the shards of a kind whose ids are kept."""
    return frozenset(info.base_name for info in (output / FOLDER / "rows" / kind).files(recursive=False))


def write_policy(output: Location, record: PolicyLineage) -> None:
    """Keep the record of a policy."""
    _file(output, record.policy).write_bytes(record.model_dump_json(exclude_defaults=True).encode())


def read_policy(output: Location, policy: str) -> PolicyLineage | None:
    """The record of a policy; None where there is none. Raises DataError where it is damaged."""
    try:
        return PolicyLineage.model_validate_json(_file(output, policy).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(
            f"{_file(output, policy)} is damaged ({error.error_count()} errors). Remove it: the run that makes this "
            "policy again writes it anew."
        ) from error


def _file(output: Location, policy: str) -> Location:
    return output / FOLDER / "policies" / f"{policy}.json"
