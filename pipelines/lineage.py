"""From a published model back to its source files, and from a row or a file to the models that have seen it.

The answers come from what is kept in lineage/ when a model is published, and where that is lacking from the artifacts
themselves. Of rows ids alone are read, a shard at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow.compute as pc

from dpo_ray.data.duplicates import REASONS as OF_DUPLICATES
from dpo_ray.data.rules import REASONS as OF_INGEST
from dpo_ray.data.seen_rows import SeenRow, find_in_ids, find_in_shard, is_pair_id
from dpo_ray.errors import ConfigError
from dpo_ray.storage.artifact import MANIFEST, POOL, QUARANTINE, open_artifact, read_shard
from dpo_ray.storage.lineage import PolicyLineage, ShardLineage, ids_file, read_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import Move, complete_versions, history, latest, published_folder
from pipelines.ingest import known_files
from pipelines.trace import Gone, Way, policy_artifact

_SIDE_BY_SIDE = 16  # threads; they mostly wait for a disk or an object store
_LISTED = 10
Answer = dict[str, Any]


@dataclass(frozen=True)
class Version:
    """A published version, or one that was published once."""

    name: str
    version: str
    is_latest: bool
    is_there: bool
    """Its folder has not been removed."""
    first: Move | None
    """The move of the pointer that first named it."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    def told(self) -> Answer:
        """For programs."""
        return {
            "name": self.name,
            "version": self.version,
            "latest": self.is_latest,
            "present": self.is_there,
            "published": self.first.published if self.first is not None else None,
            "run_id": self.first.run_id if self.first is not None else None,
        }


def trace_back(output: Location, asked: str) -> Answer:
    """What is known of a model, a pair or a source file. Raises ConfigError where it is none of them.

    Args:
        asked: a model's name (its latest version), name/version, version or folder; a pair id; a file by its path or
            the end of it, or a partition such as date=2026-11-01.
    """
    if not (output / "models").folders():
        raise ConfigError(f"{output} holds no published model: name the folder given as run.output.")
    if not asked.strip():
        raise ConfigError("Nothing is asked for: name a model, a pair id, a file or a partition.")
    version = _version(output, asked)
    if version is not None:
        return _of_model(output, version)
    if is_pair_id(asked):
        return _of_row(output, asked)
    return _of_file(output, asked)


def versions(output: Location) -> Iterator[Version]:
    """All versions of all names, also those whose folders were removed."""
    for folder in (output / "models" / name for name in (output / "models").folders()):
        complete = complete_versions(folder)
        first: dict[str, Move] = {}
        for move in history(folder):
            first.setdefault(move.version, move)
        standing = latest(folder)
        named = {standing.version} if standing is not None else set()
        for version in sorted({*complete, *first, *named}, key=lambda v: (first[v].published if v in first else "", v)):
            yield Version(
                folder.name,
                version,
                standing is not None and standing.version == version,
                version in complete,
                first.get(version),
            )


def _version(output: Location, asked: str) -> Version | None:
    models, place = f"{output.uri}/models/", Location.of(asked).uri
    inside = place.removeprefix(models) if place.startswith(models) else asked.rstrip("/")
    name, _, version = inside.partition("/")
    if version:
        return next((one for one in versions(output) if (one.name, one.version) == (name, version)), None)
    if name in (output / "models").folders():
        standing = latest(published_folder(output, name))
        if standing is None:
            raise ConfigError(
                f"No version of {name} is the latest one. Name a version, as in {name}/VERSION, or make one the latest "
                "with `dpo-ray promote`."
            )
        return next(one for one in versions(output) if (one.name, one.version) == (name, standing.version))
    return next((one for one in versions(output) if one.version == asked), None)


def lineage_of(output: Location, policy: str) -> PolicyLineage:
    """What a policy was made from. Raises Gone where it was not recorded, and an artifact on the way was removed."""
    found = read_policy(output, policy)
    if found is not None:
        return found
    return Way.of(output, policy_artifact(output, policy)).lineage(output, run_id="", model=None, sources={})


def ancestry(output: Location, policy: str) -> Iterator[PolicyLineage]:
    """The policy, what it was trained from, and so on. Raises Gone where the next is not known."""
    now: str | None = policy
    while now is not None:
        found = lineage_of(output, now)
        yield found
        now = found.parent


def _of_model(output: Location, version: Version) -> Answer:
    answer = {"asked": str(version), "what": "model", **version.told()}
    answer["moves"] = [
        {"action": move.action, "at": move.published, "by": move.by, "why": move.why, "run_id": move.run_id}
        for move in history(published_folder(output, version.name))
        if move.version == version.version
    ]
    policies: list[Answer] = []
    unknown = None
    try:
        for found in ancestry(output, version.version):
            policies.append(_policy(output, found))
    except Gone as gone:
        unknown = str(gone)
    return {**answer, "policies": policies, "unknown": unknown}


def _policy(output: Location, found: PolicyLineage) -> Answer:
    return {
        "policy": found.policy,
        "trained_from": found.model.model_dump() | {"policy": found.parent},
        "recorded_by": found.run_id,
        "artifacts": [
            {**one.model_dump(), "present": (output / "artifacts" / one.kind / one.fingerprint / MANIFEST).exists()}
            for one in found.artifacts
        ],
        "rows": _counted(found.shards),
        "sources": [
            {**source.model_dump(), **_counted(mine), "shards": [shard.pairs for shard in mine]}
            for number, source in enumerate(found.sources)
            for mine in [[shard for shard in found.shards if shard.source == number]]
        ],
    }


def _counted(shards: list[ShardLineage]) -> Answer:
    dropped: Counter[str] = Counter()
    for shard in shards:
        dropped.update(shard.dropped)
    names = ("read", "trained", "held_out")
    return {**{name: sum(getattr(shard, name) for shard in shards) for name in names}, "dropped": dict(dropped)}


def _each_version(output: Location) -> Iterator[tuple[Version, list[PolicyLineage], str | None]]:
    """Each version, what is known of it and of the policies that it was trained from, and why not more is known."""
    for version in versions(output):
        found: list[PolicyLineage] = []
        try:
            for one in ancestry(output, version.version):
                found.append(one)
        except Gone as gone:
            yield version, found, str(gone)
            continue
        yield version, found, None


def _of_row(output: Location, pair_id: str) -> Answer:
    """Which versions have seen a row, and what became of it in each."""
    ids = _Ids(output, pair_id)
    names = {shard.pairs for _, known, _ in _each_version(output) for one in known for shard in one.shards}
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        list(threads.map(lambda name: ids.rows("pairs", name), names))
    models = []
    for version, known, lacking in _each_version(output):
        told = version.told() | {"fate": "absent", "reasons": [], "files": [], "by": None, "why": None}
        for one in known:
            fate = _fate(output, one, ids)
            if _WEIGHT[fate["fate"]] > _WEIGHT[told["fate"]]:
                told |= fate | {"by": one.policy if one.policy != version.version else None}
        if lacking is not None and told["fate"] != "trained":
            told |= {"fate": "unknown", "why": lacking}
        models.append(told)
    return {"asked": pair_id, "what": "row", "models": models}


_WEIGHT = {"absent": 0, "left_out": 1, "held_out": 2, "unknown": 3, "trained": 4}
"""Of a row that a version may have seen in several ways, what is told: the most that may have come of it."""


def _fate(output: Location, one: PolicyLineage, ids: _Ids) -> Answer:
    """What became of a row in the training of a policy."""
    found: Answer = {"fate": "absent", "reasons": [], "files": [], "why": None}
    for shard in one.shards:
        rows = ids.rows("pairs", shard.pairs)
        if rows == []:
            continue
        kept = ids.rows(one.rows_kind, shard.rows)
        reasons: list[str] = []
        why = None
        if rows is None or kept is None:
            gone = shard.pairs if rows is None else shard.rows
            fate, why = "unknown", f"the shard {gone} was removed, and ids of its rows were not kept"
        elif kept:
            fate = "held_out" if kept[0].held_out else "trained"
        else:
            fate, reasons = "left_out", sorted({why for row in rows for why in _reasons(output, one, shard, row)})
        source = one.sources[shard.source].uri if shard.source is not None else None
        found["files"] += [source] if source is not None and rows is not None else []
        found["reasons"] += [reason for reason in reasons if reason not in found["reasons"]]
        if _WEIGHT[fate] > _WEIGHT[found["fate"]]:
            found |= {"fate": fate, "why": why}
    found["files"] = list(dict.fromkeys(found["files"]))
    return found


def _reasons(output: Location, one: PolicyLineage, shard: ShardLineage, row: SeenRow) -> list[str]:
    """Why a row was left out: one reason, or those that it may have been where that is not recorded row by row."""
    made = one.made("duplicates")
    possible = [reason for reason in shard.dropped if reason not in OF_INGEST]
    if made is None or len(possible) == 1:
        return possible
    try:
        files = open_artifact(output / "artifacts" / made.kind / made.fingerprint).shards()
    except FileNotFoundError:
        return possible
    wanted = (pc.field("shard") == shard.pairs) & (pc.field("row") == row.row)
    for file in files:
        if file.exists():
            for reason in read_shard(file, columns=["reason"], rows=wanted)["reason"].to_pylist():
                return [reason]
    return [reason for reason in possible if reason not in OF_DUPLICATES]


class _Ids:
    """The rows with an id, shard by shard; each is looked at once."""

    def __init__(self, output: Location, pair_id: str):
        self.rows = lru_cache(maxsize=None)(self._rows)
        self._output = output
        self._pair_id = pair_id

    def _rows(self, kind: str, shard: str) -> list[SeenRow] | None:
        """None where neither the ids nor the shard are there any more."""
        try:
            return find_in_ids(ids_file(self._output, kind, shard), self._pair_id)
        except FileNotFoundError:
            pass
        try:
            return find_in_shard(self._output / "artifacts" / kind / POOL / shard, self._pair_id)
        except FileNotFoundError:
            return None


def _of_file(output: Location, asked: str) -> Answer:
    """Which versions were made with a file, and what became of its rows."""
    models, unknown, count = [], [], 0
    # Where it lay, and its bytes: of a file that was changed in place each of them.
    found: dict[tuple[str, str | None], None] = dict.fromkeys(
        sorted((uri, sha256) for uri, sha256 in known_files(output) if _is_named(uri, asked))
    )
    hashes = {sha256 for _, sha256 in found}
    for version, known, lacking in _each_version(output):
        count += 1
        for one in known:
            mine = [n for n, file in enumerate(one.sources) if _is_named(file.uri, asked) or file.sha256 in hashes]
            if not mine:
                continue
            found |= dict.fromkeys((one.sources[n].uri, one.sources[n].sha256) for n in mine)
            shards = [shard for shard in one.shards if shard.source in mine]
            by = one.policy if one.policy != version.version else None
            models.append(version.told() | _counted(shards) | {"by": by, "files": [one.sources[n].uri for n in mine]})
        if lacking is not None or any(not one.sources for one in known):
            unknown.append(version.told() | {"why": lacking or "its source files were not recorded"})
    if not found:
        raise ConfigError(
            f"{asked} is no model, no pair id (16 hex digits) and no file that a run below {output} has read. Name a "
            f"model ({', '.join((output / 'models').folders())}), a pair id, a file by its "
            "path or the end of it, or a partition such as date=2026-11-01."
        )
    files = [{"uri": uri, "sha256": sha256} for uri, sha256 in found]
    return {
        "asked": asked,
        "what": "file",
        "files": files,
        "published_models": count,
        "models": models,
        "unknown": unknown,
        "quarantined": _quarantined(output, {uri for uri, _ in found}),
    }


def _is_named(uri: str, asked: str) -> bool:
    """Whether a file's place is what was asked for, ends in it, or has it among its folders."""
    return uri == asked or uri.endswith(f"/{asked}") or asked in uri.split("/") or uri == Location.of(asked).uri


def _quarantined(output: Location, uris: set[str]) -> list[Answer]:
    """The first rows of these files that were quarantined, as far as the quarantines have not been removed."""
    found: list[Answer] = []
    for info in (output / "artifacts" / "pairs" / POOL / QUARANTINE).files(recursive=False):
        if info.base_name.startswith("."):
            continue
        place = output.same_store(info.path)
        table = read_shard(place, columns=["source", "row", "reason"], rows=pc.field("source").isin(sorted(uris)))
        found += table.slice(0, _LISTED - len(found)).to_pylist()
        if len(found) == _LISTED:
            break
    return found


def lines(answer: Answer, *, as_json: bool = False) -> Iterator[str]:
    """What a person, or a program, is told."""
    if as_json:
        yield json.dumps(answer, indent=1, ensure_ascii=False)
        return
    yield from {"model": _model_lines, "row": _row_lines, "file": _file_lines}[answer["what"]](answer)


def _named(told: Answer) -> str:
    notes = [
        *(["latest"] if told["latest"] else []),
        *([f"published {told['published']}"] if told["published"] else []),
        *([] if told["present"] else ["its folder was removed"]),
    ]
    return f"{told['name']}/{told['version']}" + (f" ({', '.join(notes)})" if notes else "")


def _model_lines(answer: Answer) -> Iterator[str]:
    yield f"Model {_named(answer)}"
    for move in answer["moves"]:
        why = f": {move['why']}" if move["why"] else ""
        yield f"  {move['action']} at {move['at']} by {move['by']}, run {move['run_id']}{why}"
    for number, one in enumerate(answer["policies"]):
        begun = one["trained_from"]
        of = f", the policy {begun['policy']}, whose data it has seen as well" if begun["policy"] else ""
        which = "It" if number == 0 else f"The policy {one['policy']}"
        yield f"{which} was trained from {begun['path'] or 'a model'} (weights {begun['weights']}){of}"
        for made in one["artifacts"]:
            rows = f", {made['rows']} rows" if made["rows"] is not None else ""
            gone = "" if made["present"] else ", removed since"
            yield f"  {made['kind']} {made['fingerprint']}{rows}, made {made['created']}{gone}"
        yield f"  rows: {_rows(one['rows'])}"
        for source in one["sources"]:
            yield f"  {source['uri']} ({source['key']}), {len(source['shards'])} shards: {_rows(source)}"
        if not one["sources"]:
            yield "  its source files were not recorded"
    if answer["unknown"]:
        yield f"Nothing more is known, for {answer['unknown']}"


def _rows(counted: Answer) -> str:
    dropped = "".join(f", {rows} {reason}" for reason, rows in counted["dropped"].items())
    return f"{counted['read']} read, {counted['trained']} trained on, {counted['held_out']} held out{dropped}"


def _row_lines(answer: Answer) -> Iterator[str]:
    models = answer["models"]
    seen = [one for one in models if one["fate"] == "trained"]
    yield f"Pair {answer['asked']}: {len(seen)} of {len(models)} published models were trained on it"
    for one in models:
        yield f"  {_named(one)}: {_told_fate(one)}"
        for file in one["files"]:
            yield f"    from {file}"


def _told_fate(one: Answer) -> str:
    match one["fate"]:
        case "trained" if one["by"] is not None:
            return f"trained on by {one['by']}, which it was trained from"
        case "trained":
            others = f"; a copy of it was left out ({', '.join(one['reasons'])})" if one["reasons"] else ""
            return f"trained on{others}"
        case "held_out":
            return "held out: it was measured on this row, and not trained on it"
        case "left_out":
            return f"left out ({' or '.join(one['reasons']) or 'the reason was not recorded'})"
        case "unknown":
            return f"not known, for {one['why']}"
    return "not in its data"


def _file_lines(answer: Answer) -> Iterator[str]:
    models = answer["models"]
    trained = {(one["name"], one["version"]) for one in models if one["trained"]}
    total = answer["published_models"]
    yield f"{answer['asked']}: {len(trained)} of {total} published models were trained on rows of it"
    for file in answer["files"]:
        yield f"  {file['uri']}" + (f" (sha256 {file['sha256'][:16]}…)" if file["sha256"] else "")
    for one in models:
        by = f", by {one['by']}, which it was trained from" if one["by"] else ""
        yield f"  {_named(one)}: {_rows(one)}{by}"
    for one in answer["unknown"]:
        yield f"  {_named(one)}: not known, for {one['why']}"
    for row in answer["quarantined"]:
        yield f"  quarantined: row {row['row']} of {row['source']}, {row['reason']}"
