"""What a policy was made from, traced back through the manifests and kept beside the published models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dpo_ray.config import Model
from dpo_ray.data.seen_rows import seen_rows, write_seen_rows
from dpo_ray.data.tally import Tally
from dpo_ray.errors import DataError
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact, FileEntry, open_artifact, read_shard
from dpo_ray.storage.lineage import (
    MadeArtifact,
    PolicyLineage,
    ShardLineage,
    SourceFile,
    StartModel,
    ids_file,
    ids_there,
    read_policy,
    write_policy,
)
from dpo_ray.storage.location import Location
from dpo_ray.training.files import KIND, MODEL_FOLDER

STAGE = "lineage"
_SIDE_BY_SIDE = 16  # threads; they mostly wait for a disk or an object store


class Gone(Exception):
    """An artifact on the way is not there any more, or not named; says which."""


def keep_lineage(
    output: Location,
    policy: Artifact,
    *,
    run_id: str,
    models: Mapping[str, Model],
    sources: Mapping[str, SourceFile],
) -> None:
    """Keep what a policy was made from, and the same of each policy that it was trained from.

    Args:
        run_id: of the run that publishes it.
        models: fingerprint of a policy → the model that it was trained from.
        sources: name of a shard of pairs → the file that its rows are from; of shards that it lacks, none is known.

    Raises DataError where the manifests contradict each other.
    """
    now: Artifact | None = policy
    while now is not None and read_policy(output, now.fingerprint) is None:
        try:
            way = Way.of(output, now)
        except Gone as gone:
            say(STAGE, f"what the policy {now.fingerprint} was made from cannot be recorded, for {gone}")
            return
        found = way.lineage(output, run_id=run_id, model=models.get(now.fingerprint), sources=sources)
        way.keep_ids(output)
        write_policy(output, found)  # last: the record vouches for the ids
        now = _policy(output, found.parent) if found.parent is not None else None


def policy_at(output: Location, path: str) -> str | None:
    """The policy of this output folder whose model lies at a path; None where it is none of them."""
    match Location.of(path).uri.removeprefix(f"{output.uri}/").split("/"):
        case ["artifacts", kind, fingerprint, folder] if (kind, folder) == (KIND, MODEL_FOLDER):
            return fingerprint
        case ["models", _, version]:
            return version
    return None


class Way:
    """The artifacts between the pairs and a policy, as their manifests tell."""

    def __init__(self, policy: Artifact, pairs: Artifact, stages: Sequence[Artifact], others: Sequence[Artifact]):
        self.policy = policy
        self.pairs = pairs
        self.stages = stages
        """Each made of the one before, from the tokenized pairs to the rows that were trained on."""
        self.others = others
        """What else they were made of."""

    @classmethod
    def of(cls, output: Location, policy: Artifact) -> Way:
        """Raises Gone where one of them was removed."""
        made = _made_from(output, policy)
        stages = [_input_of(policy, "pairs", made)]
        while (kind := stages[0].manifest.kind) != "tokenized":
            stages.insert(0, _input_of(stages[0], {"mismatched": "reference"}.get(kind, "tokenized"), made))
        pairs = _input_of(stages[0], "pairs", made)
        known = {policy.fingerprint, pairs.fingerprint, *(one.fingerprint for one in stages)}
        return cls(policy, pairs, stages, [one for one in made.values() if one.fingerprint not in known])

    @property
    def rows(self) -> Artifact:
        """What was trained on."""
        return self.stages[-1]

    def lineage(
        self, output: Location, *, run_id: str, model: Model | None, sources: Mapping[str, SourceFile]
    ) -> PolicyLineage:
        """As keep_lineage records it. Raises DataError where the manifests contradict each other."""
        files = list(dict.fromkeys(sources[name] for name in map(_base, self._pairs()) if name in sources))
        place = {file: number for number, file in enumerate(files)}
        in_order = [self.pairs, *self.others, *self.stages, self.policy]  # where they were made in the same second
        made = sorted(in_order, key=lambda one: one.manifest.created)
        return PolicyLineage(
            policy=self.policy.fingerprint,
            run_id=run_id,
            model=StartModel(
                weights=self.policy.manifest.identity["weights"],
                path=model.path if model is not None else None,
                revision=model.revision if model is not None else None,
            ),
            parent=policy_at(output, model.path) if model is not None else None,
            rows_kind=self.rows.manifest.kind,
            sources=files,
            artifacts=[
                MadeArtifact(
                    kind=one.manifest.kind,
                    fingerprint=one.fingerprint,
                    created=one.manifest.created,
                    rows=one.manifest.rows,
                )
                for one in made
            ],
            shards=[
                ShardLineage(
                    pairs=_base(steps[0]),
                    rows=_base(steps[-1]),
                    source=place[sources[_base(steps[0])]] if _base(steps[0]) in sources else None,
                    read=steps[0].counters.get("read", steps[0].rows or 0),
                    dropped=_dropped(steps),
                    trained=(steps[-1].rows or 0) - held_out,
                    held_out=held_out,
                )
                for steps, held_out in zip(self._followed(), self._held_out(), strict=True)
            ],
        )

    def keep_ids(self, output: Location) -> None:
        """Keep the ids of the rows of all shards, of the pairs and of what was trained on, that are not kept yet."""
        for artifact in (self.pairs, self.rows):
            kind = artifact.manifest.kind
            there = ids_there(output, kind)

            def keep(shard: Location, kind: str = kind) -> None:
                write_seen_rows(seen_rows(shard), ids_file(output, kind, shard.name))

            with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
                list(threads.map(keep, [shard for shard in artifact.shards() if shard.name not in there]))

    def _pairs(self) -> list[FileEntry]:
        return _shards(self.pairs)

    def _followed(self) -> Iterator[list[FileEntry]]:
        """Each shard of pairs, and what was made of it, stage by stage.

        The first stage makes a shard of each; a later one makes one shard of those that are equal, as empty ones are.
        """
        first, *later = self.stages
        _require_as_many(self._pairs(), self.pairs, first)
        made_of = []
        for before, after in zip(self.stages, later, strict=False):
            equal = list(dict.fromkeys(entry.sha256 for entry in _shards(before)))
            _require_as_many(equal, before, after)
            made_of.append(dict(zip(equal, _shards(after), strict=True)))
        for entry, tokenized in zip(self._pairs(), _shards(first), strict=True):
            steps = [entry, tokenized]
            for after_of in made_of:
                steps.append(after_of[steps[-1].sha256])
            yield steps

    def _held_out(self) -> Iterator[int]:
        """Of each shard of pairs, the held-out rows among those that are left of it."""

        def count(steps: list[FileEntry]) -> int:
            split = read_shard(self.rows.file(steps[-1].name), columns=["split"])["split"]
            return int(np.sum(split.to_numpy(zero_copy_only=False) == "eval"))

        with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
            yield from threads.map(count, self._followed())


def _policy(output: Location, policy: str) -> Artifact | None:
    try:
        return open_artifact(output / "artifacts" / KIND / policy)
    except FileNotFoundError:
        return None


def policy_artifact(output: Location, policy: str) -> Artifact:
    """The training that made a policy. Raises Gone."""
    found = _policy(output, policy)
    if found is None:
        raise Gone(f"its training {output / 'artifacts' / KIND / policy} was removed")
    return found


def _made_from(output: Location, policy: Artifact) -> dict[str, Artifact]:
    """Fingerprint → artifact: the policy, and all that is there of what it was made from."""
    kinds = [folder.name for folder in (output / "artifacts").children()]
    found = {policy.fingerprint: policy}
    waiting = list(policy.manifest.inputs.items())
    while waiting:
        name, fingerprint = waiting.pop()
        if fingerprint in found:
            continue
        for kind in sorted(kinds, key=lambda kind: kind != name):  # an input is mostly called as its kind is
            try:
                found[fingerprint] = open_artifact(output / "artifacts" / kind / fingerprint)
            except FileNotFoundError:
                continue
            waiting += found[fingerprint].manifest.inputs.items()
            break
    return found


def _input_of(artifact: Artifact, name: str, made: Mapping[str, Artifact]) -> Artifact:
    fingerprint = artifact.manifest.inputs.get(name)
    if fingerprint is None:
        raise Gone(f"{artifact.location} does not say which {name} it was made from")
    if fingerprint not in made:
        raise Gone(f"the artifact {name} {fingerprint}, which {artifact.location} was made from, was removed")
    return made[fingerprint]


def _shards(artifact: Artifact) -> list[FileEntry]:
    return [file for file in artifact.manifest.files if file.rows is not None]


def _require_as_many(shards: Sequence[object], before: Artifact, after: Artifact) -> None:
    if len(shards) != len(_shards(after)):
        raise DataError(
            f"{after.location} has {len(_shards(after))} shards, and was made from the {len(shards)} of "
            f"{before.location}: which rows became which cannot be told. Remove {after.location}, and it is made again."
        )


def _dropped(steps: Sequence[FileEntry]) -> dict[str, int]:
    """Reason → rows, over what was made of a shard of pairs."""
    dropped: dict[str, int] = {}
    for step in steps:
        counters = {"read": 0, "kept": step.rows or 0, **step.counters}
        for reason, rows in Tally.of(counters).dropped.items():
            dropped[reason] = dropped.get(reason, 0) + rows
    return dropped


def _base(entry: FileEntry) -> str:
    return entry.name.rpartition("/")[2]
