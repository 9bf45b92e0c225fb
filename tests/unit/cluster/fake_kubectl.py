"""A kubectl that knows a few RayJobs and a story of what becomes of one: what launch.sh asks for, and no more.

Its folder, FAKE_KUBECTL, has `objects.json` (name → RayJob), `story.json` (statuses of a run, one for each look; the
last one stays; text is what kubectl fails with; `unread`: its message cannot be had), `refusals.json` (of creations)
and `calls.jsonl`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(os.environ.get("FAKE_KUBECTL", "."))


def fail(text: str) -> None:
    sys.exit(text)


def read(name: str) -> Any:
    return json.loads((HERE / name).read_text())


def write(name: str, value: Any) -> None:
    (HERE / name).write_text(json.dumps(value))


def option(words: list[str], *names: str) -> str:
    return next(words[at + 1] for at, word in enumerate(words) if word in names)


def merged(found: Any, patch: Any) -> Any:
    """JSON Merge Patch, RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    kept = dict(found) if isinstance(found, dict) else {}
    for key, value in patch.items():
        if value is None:
            kept.pop(key, None)
        else:
            kept[key] = merged(kept.get(key), value)
    return kept


def rendered(found: dict[str, Any], template: str) -> str:
    def value(match: re.Match[str]) -> str:
        at: Any = found
        for key in match[1].split("."):
            at = at.get(key, {}) if isinstance(at, dict) else {}
        return "" if at == {} else str(at)

    return re.sub(r"\{\.([A-Za-z.]+)\}", value, template)


def get(words: list[str]) -> None:
    name, objects, story = words[2], read("objects.json"), read("story.json")
    if name not in objects:
        if "--ignore-not-found" in words:
            return
        fail(f'Error from server (NotFound): rayjobs.ray.io "{name}" not found')
    wanted = option(words, "-o")
    if "jobDeploymentStatus" in wanted:
        status = story.pop(0) if len(story) > 1 else story[0]
        write("story.json", story)
        if isinstance(status, str):
            fail(status)
        objects[name]["status"] = status
        write("objects.json", objects)
    if "status.message" in wanted and objects[name]["status"].pop("unread", 0):
        write("objects.json", objects)
        fail("Unable to connect to the server: EOF")
    if wanted == "name":
        print(f"rayjob.ray.io/{name}")
    elif wanted == "json":
        print(json.dumps(objects[name]))
    else:
        sys.stdout.write(rendered(objects[name], wanted.removeprefix("jsonpath=")))


def create(words: list[str]) -> None:
    made, objects = json.loads(Path(option(words, "-f")).read_text()), read("objects.json")
    refusals = read("refusals.json") if (HERE / "refusals.json").exists() else []
    if refusals:
        refusal, *rest = refusals
        write("refusals.json", rest)
        if "AlreadyExists" in refusal:
            objects[made["metadata"]["name"]] = made
            write("objects.json", objects)
        fail(refusal)
    if "resourceVersion" in made["metadata"]:
        fail("Error from server (BadRequest): resourceVersion should not be set on objects to be created")
    objects[made["metadata"]["name"]] = made
    write("objects.json", objects)
    print(f"rayjob.ray.io/{made['metadata']['name']} created")


def patch(words: list[str]) -> None:
    import yaml  # the other verbs start without

    assert "--local" in words and option(words, "--type") == "merge"
    found, change = Path(option(words, "-f")).read_text(), yaml.safe_load(option(words, "-p"))
    print(json.dumps(merged(json.loads(found), change)))


def main() -> None:
    words = sys.argv[1:]
    with (HERE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    real = os.environ.get("REAL_KUBECTL")
    if words[0] == "patch" and real:
        sys.exit(subprocess.run([real, *words]).returncode)
    {"get": get, "create": create, "patch": patch}[words[0]](words)


if __name__ == "__main__":
    main()
