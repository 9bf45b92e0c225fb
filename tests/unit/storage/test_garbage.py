"""What goes of an output folder: by hand, and that nothing which is referred to ever does."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.storage.claim import Claim
from dpo_ray.storage.garbage import Records, Refers, Removal, Stored, fingerprints_in, garbage

DAY = 86400.0
NOW = 100 * DAY
A, B, C = ("a" * 16, "b" * 16, "c" * 16)


def file(name: str, age_days: float = 30.0, size: int = 1) -> Stored:
    return Stored(name, size, NOW - age_days * DAY)


def refers(*files: str, inputs: tuple[str, ...] = ()) -> Refers:
    return Refers(frozenset(inputs), frozenset(files))


def chosen(files: list[Stored], records: Records) -> dict[str, str]:
    """Name of a file that goes → as what."""
    removals = garbage(files, records, NOW, 7 * DAY)
    found = {one.name: removal.what for removal in removals for one in removal.files}
    assert len(found) == sum(len(removal.files) for removal in removals), "a file goes twice"
    return found


def artifact(folder: str, age_days: float = 30.0, *more: str) -> list[Stored]:
    return [file(f"{folder}/{name}", age_days) for name in ("manifest.json", "claim.json", *more)]


def test_an_artifact_that_nothing_names_goes_with_the_shards_that_only_it_has():
    shards = [file(f"pairs/shards/{n}") for n in ("1-x.parquet", "2-x.parquet", "quarantine/1-x.parquet")]
    files = [*artifact(f"pairs/{A}"), *artifact(f"pairs/{B}"), *shards]
    records = Records(
        manifests={
            f"pairs/{A}": refers("shards/1-x.parquet", "shards/quarantine/1-x.parquet", "shards/2-x.parquet"),
            f"pairs/{B}": refers("shards/2-x.parquet"),
        },
        named=frozenset({B}),
    )
    assert chosen(files, records) == {
        f"pairs/{A}/manifest.json": "artifacts",
        f"pairs/{A}/claim.json": "artifacts",
        "pairs/shards/1-x.parquet": "shards",
        "pairs/shards/quarantine/1-x.parquet": "shards",
    }


@pytest.mark.parametrize("young", ["manifest.json", "claim.json", "checkpoints/step-8/model"])
def test_an_artifact_that_was_used_or_worked_on_of_late_is_spared(young: str):
    files = [*artifact(f"train/{A}"), file(f"train/{A}/checkpoints/step-8/model")]
    files = [file(f.name, 6.9) if f.name.endswith(young) else f for f in files]
    found = chosen(files, Records(manifests={f"train/{A}": refers()}))
    assert set(found) <= {f"train/{A}/checkpoints/step-8/model"}  # beside a manifest it is left over, if it is old
    assert chosen(files, Records()) == {}  # without a manifest all of it is spared


def test_what_something_spared_was_made_from_is_spared_across_kinds():
    files = [f for kind, name in (("pairs", A), ("tokenized", B), ("train", C)) for f in artifact(f"{kind}/{name}")]
    manifests = {
        f"pairs/{A}": refers(),
        f"tokenized/{B}": refers(inputs=(A,)),
        f"train/{C}": refers(inputs=(B, "not-a-fingerprint")),
    }
    assert chosen(files, Records(manifests=manifests, named=frozenset({C}))) == {}
    assert len(chosen(files, Records(manifests=manifests, named=frozenset({A})))) == 4
    # A stage at work has no manifest yet, but a claim that names its inputs.
    at_work = [*files[:4], file(f"train/{C}/claim.json", 0.1)]
    claims = {f"train/{C}": Claim(inputs={"rows": B})}
    assert chosen(at_work, Records(manifests={k: manifests[k] for k in list(manifests)[:2]}, claims=claims)) == {}


def test_old_shards_that_a_stage_at_work_has_taken_up_are_spared_whatever_their_content():
    shards = [file(f"pairs/shards/{n}.parquet") for n in ("1-x", "1-y", "quarantine/1-y", "2-x")]
    claims = {f"pairs/{A}": Claim(tasks=["1"])}
    assert set(chosen([file(f"pairs/{A}/claim.json", 1), *shards], Records(claims=claims))) == {
        "pairs/shards/2-x.parquet"
    }
    # It was killed, and nobody has gone on with it.
    assert len(chosen([file(f"pairs/{A}/claim.json", 8), *shards], Records(claims=claims))) == 5


def test_a_quarantine_goes_after_its_shard():
    names = ["pairs/shards/quarantine/1-x.parquet", "pairs/shards/1-x.parquet", "pairs/shards/2-x.parquet"]
    removals = garbage([file(name) for name in names], Records(), NOW, 7 * DAY)
    assert [[f.name for f in removal.files] for removal in removals] == [names[1:], names[:1]]


def test_shards_of_an_older_layout_and_unfinished_folders_go_and_other_things_are_not_touched():
    old = [file(f"pairs/{A}/{n}") for n in ("manifest.json", "1.parquet", "quarantine/1.parquet")]
    unfinished = [file(f"train/{B}/checkpoints/x"), file(f"reference/{B}/attempts/1.json")]
    others = [file(n) for n in ("notes.txt", "pairs/notes.txt", f"pairs/{A[:8]}/x", "mine/folder/x")]
    records = Records(manifests={f"pairs/{A}": refers("1.parquet", "quarantine/1.parquet")})
    found = chosen([*old, *unfinished, *others], records)
    assert found == {f.name: "artifacts" for f in old} | {f.name: "unfinished artifacts" for f in unfinished}


def test_what_lies_beside_a_manifest_that_does_not_name_it_goes_when_it_is_old():
    files = [
        *artifact(f"train/{A}", 30, "model/x", "checkpoints/y", "attempts/z", ".model.1.partial"),
        file(f"train/{A}/checkpoints/young", 1),
    ]
    found = chosen(files, Records(manifests={f"train/{A}": refers("model/x")}, named=frozenset({A})))
    assert found == {
        f"train/{A}/checkpoints/y": "left over",
        f"train/{A}/attempts/z": "left over",
        f"train/{A}/.model.1.partial": "unfinished writes",
    }


def test_unfinished_writes_and_markers_of_killed_gcs_go():
    names = ["pairs/shards/.1-x.parquet.0.partial", "pairs/shards/quarantine/.1-x.parquet.0.partial", "gc/abc.json"]
    assert chosen([file(n) for n in names], Records()) == dict.fromkeys(names, "unfinished writes")
    assert chosen([file(n, 1) for n in names], Records()) == {}


def test_where_a_record_cannot_be_read_nothing_of_its_kind_goes():
    files = [*artifact(f"pairs/{A}"), *artifact(f"pairs/{B}"), file("pairs/shards/1-x.parquet"), *artifact(f"eval/{C}")]
    manifests = {f"pairs/{B}": refers(), f"eval/{C}": refers()}
    found = chosen(files, Records(manifests=manifests, unreadable=frozenset({f"pairs/{A}"})))
    assert {name.split("/")[0] for name in found} == {"eval"}


def test_fingerprints_are_found_in_any_record():
    text = (
        f'{{"fingerprint": "{A}", "path": "/out/artifacts/train/{B}/model", "sha256": "{"d" * 64}", "x": "{"e" * 15}"}}'
    )
    assert fingerprints_in(text) == {A, B}


FINGERPRINTS = [letter * 16 for letter in "abcdef"]
KINDS = ["pairs", "train"]
SHARDS = [f"shards/{where}{task}-{n}.parquet" for where in ("", "quarantine/") for task in "123" for n in "xy"]
OWN = ["claim.json", "model/x", "checkpoints/y", ".z.partial"]
folders = st.sampled_from([f"{kind}/{name}" for kind in KINDS for name in FINGERPRINTS])


@st.composite
def outputs(draw: st.DrawFn) -> tuple[list[Stored], Records]:
    manifests = draw(
        st.dictionaries(
            folders,
            st.builds(
                Refers,
                st.frozensets(st.sampled_from([*FINGERPRINTS, "file"]), max_size=2),
                st.frozensets(st.sampled_from([*SHARDS, "model/x"]), max_size=5),
            ),
            max_size=6,
        )
    )
    claims = draw(
        st.dictionaries(
            folders,
            st.builds(
                Claim,
                inputs=st.dictionaries(st.sampled_from("ab"), st.sampled_from(FINGERPRINTS), max_size=2),
                tasks=st.lists(st.sampled_from("123"), max_size=2),
            ),
            max_size=4,
        )
    )
    names = {f"{folder}/manifest.json" for folder in manifests} | {f"{folder}/claim.json" for folder in claims}
    names |= {f"{folder}/{name}" for folder in manifests for name in manifests[folder].files if name == "model/x"}
    names |= {f"{kind}/{name}" for kind in KINDS for name in draw(st.sets(st.sampled_from(SHARDS)))}
    names |= draw(st.sets(st.builds("{}/{}".format, folders, st.sampled_from(OWN)), max_size=6))
    ages = st.sampled_from([0.0, 6.99, 7.0, 8.0, 50.0])
    files = [file(name, draw(ages)) for name in sorted(names)]
    named = draw(st.frozensets(st.sampled_from(FINGERPRINTS), max_size=2))
    unreadable = draw(st.frozensets(st.sampled_from(sorted(claims) or [f"pairs/{A}"]), max_size=1))
    claims = {folder: one for folder, one in claims.items() if folder not in unreadable}
    return files, Records(manifests, claims, named, unreadable)


def referred(files: list[Stored], records: Records) -> set[str]:
    """Names that have to stay, found out another way: again and again until nothing is added."""
    alive = {"/".join(f.name.split("/")[:2]) for f in files if NOW - f.written < 7 * DAY and "/shards/" not in f.name}
    alive |= {"/".join(f.name.split("/")[:2]) for f in files if f.name.split("/")[1] in records.named}
    young = set(alive)
    while True:
        inputs = {i for folder in alive if folder in records.manifests for i in records.manifests[folder].inputs}
        inputs |= {i for folder in alive if folder in records.claims for i in records.claims[folder].inputs.values()}
        more = {"/".join(f.name.split("/")[:2]) for f in files if f.name.split("/")[1] in inputs} - alive
        if not more:
            break
        alive |= more
    names = {f"{folder}/manifest.json" for folder in alive}
    for folder in alive & records.manifests.keys():
        names |= {f"{folder}/{n}" for n in records.manifests[folder].files}
        names |= {f"{folder.split('/')[0]}/{n}" for n in records.manifests[folder].files}
    for folder in young & records.claims.keys():
        if any(f.name.startswith(f"{folder}/") and NOW - f.written < 7 * DAY for f in files):
            tasks = set(records.claims[folder].tasks)
            kind = folder.split("/")[0]
            names |= {f"{kind}/{n}" for n in SHARDS if n.rpartition("/")[2][0] in tasks}
    return names


@given(outputs())
def test_nothing_that_is_referred_to_or_young_is_ever_chosen(output: tuple[list[Stored], Records]):
    files, records = output
    gone = {f.name: f for removal in garbage(files, records, NOW, 7 * DAY) for f in removal.files}
    assert not gone.keys() & referred(files, records)
    assert all(NOW - f.written >= 7 * DAY for f in gone.values())
    for name in gone.keys() & {f"{kind}/{n}" for kind in KINDS for n in SHARDS if "quarantine" in n}:
        shard = name.replace("/quarantine/", "/")
        assert shard in gone or shard not in {f.name for f in files}
    assert not [n for n in gone for folder in records.unreadable if n.startswith(f"{folder.split('/')[0]}/")]


@given(outputs(), st.integers(0, 40))
def test_a_kill_at_any_moment_leaves_every_manifest_that_is_still_there_with_all_its_files(
    output: tuple[list[Stored], Records], killed_after: int
):
    files, records = output
    removals = garbage(files, records, NOW, 7 * DAY)
    gone = set(in_order(removals)[:killed_after])
    left = {f.name for f in files} - gone
    for folder, manifest in records.manifests.items():
        if f"{folder}/manifest.json" in left:
            kind = folder.split("/")[0]
            named = {f"{kind}/{n}" if n.startswith("shards/") else f"{folder}/{n}" for n in manifest.files}
            assert not named & gone
    # Who looks again finds the rest, and no more than that.
    again = garbage([f for f in files if f.name in left], without(records, gone), NOW, 7 * DAY)
    assert {f.name for r in again for f in r.files} == {f.name for r in removals for f in r.files} - gone


def in_order(removals: list[Removal]) -> list[str]:
    """As pipelines.gc removes them."""
    manifests = [f"{r.folder}/manifest.json" for r in removals if r.what == "artifacts"]
    rest = [f.name for f in chain.from_iterable(r.files for r in removals) if f.name not in manifests]
    return [*manifests, *rest]


def without(records: Records, gone: set[str]) -> Records:
    return Records(
        {folder: one for folder, one in records.manifests.items() if f"{folder}/manifest.json" not in gone},
        {folder: one for folder, one in records.claims.items() if f"{folder}/claim.json" not in gone},
        records.named,
        records.unreadable,
    )


@given(outputs())
def test_what_is_old_and_named_by_nothing_is_chosen(output: tuple[list[Stored], Records]):
    files, records = output
    old = [Stored(f.name, f.bytes, NOW - 50 * DAY) for f in files]
    nothing = Records(records.manifests, records.claims)
    assert {f.name for r in garbage(old, nothing, NOW, 7 * DAY) for f in r.files} == {f.name for f in old}
