"""Which package may use which: the arrows of the layout, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import LONGEST

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("dpo_ray", "tuning", "pipelines", "cluster")
OURS = {*PACKAGES, "tests"}


def sources(package: str) -> list[Path]:
    found = sorted((REPOSITORY / package).rglob("*.py"))
    assert found, f"no source in {package}"
    return found


def imported(source: str) -> set[str]:
    """Every module that a source imports, anywhere in it, as a dotted name; of `from a import b`, a.b as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                names.add(str(node.args[0].value))
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\ndef f():\n    from c import d\n    importlib.import_module('e.f')\nif x:\n    import g as h\n"
    assert imported(source) == {"a.b", "c", "c.d", "e.f", "g"}


@pytest.mark.parametrize("path", sources("dpo_ray"), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_in_the_library_only_on_ray_imports_ray_or_vllm(path: Path):
    if "on_ray" in path.parts:
        return
    assert not tops(path) & {"ray", "vllm"}
    # Nor by way of on_ray.
    assert not any(name.startswith("dpo_ray.on_ray") for name in imported(path.read_text(encoding="utf-8")))


ROOMS = {
    "errors": set(),
    "progress": set(),
    "bins": set(),
    "estimates": set(),
    "histogram": set(),
    "pairs": set(),
    "storage": {"errors", "progress"},
    "machine": {"storage"},
    "origin": set(),
    "rewards": {"errors"},
    "formats": {"errors"},
    "config": {"errors", "formats"},
    "data": {"config", "errors", "estimates", "formats", "histogram", "pairs", "storage"},
    "losses": {"config"},
    "model": {"bins", "config", "errors", "pairs", "progress", "storage"},
    "evaluation": {"config", "errors", "estimates", "histogram", "losses", "pairs", "storage"},
    "report": {"config", "errors", "evaluation"},
    "tracking": {"config", "errors", "progress", "storage"},
    "scoring": {"config", "data", "errors", "model", "origin", "pairs", "storage"},
    "shards": {"bins", "config", "data", "errors", "evaluation", "formats", "model", "pairs", "scoring", "storage"},
    "training": {"bins", "config", "data", "errors", "losses", "model", "pairs", "progress", "storage"},
    "on_ray": {
        "bins", "config", "data", "errors", "evaluation", "losses", "model", "origin", "pairs", "progress",
        "scoring", "shards", "storage", "tracking", "training",
    },
    "api": {"config", "errors", "model"},
}  # fmt: skip
"""Room of dpo_ray → the rooms that it may import. A room is a folder, or a file at the top of the library."""


def module_of(path: Path) -> str:
    names = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def our_modules() -> dict[str, Path]:
    return {module_of(path): path for package in PACKAGES for path in sources(package)}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_line_in_the_table_and_in_the_docstring_of_the_library():
    assert {room_of(m) for m in our_modules() if m.startswith("dpo_ray.")} == set(ROOMS)
    described = ast.get_docstring(ast.parse((REPOSITORY / "dpo_ray" / "__init__.py").read_text())) or ""
    assert re.findall(r"^(\w+)  +\w", described, re.M) == list(ROOMS)


def test_no_arrow_of_the_table_runs_up():
    standing: list[str] = []
    for room, below in ROOMS.items():
        assert below <= set(standing), (room, below - set(standing))
        standing.append(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_line_says_and_nothing_else(room: str):
    modules = our_modules()
    found = set()
    for module, path in modules.items():
        if module.startswith("dpo_ray.") and room_of(module) == room:
            found |= {room_of(n) for n in imported(path.read_text(encoding="utf-8")) if n.startswith("dpo_ray.")}
    # Neither more nor less: a line that allows what nobody needs would hold nothing.
    assert found - {room} == ROOMS[room]


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Those that import each other, by way of others too: what is left when all who import nothing are taken away."""
    left = {module: set(targets) for module, targets in arrows.items()}
    while free := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in free}
    return set(left)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()


def test_no_modules_import_each_other_not_even_inside_of_functions():
    modules = our_modules()
    arrows = {}
    for module, path in modules.items():
        names = imported(path.read_text(encoding="utf-8")) & modules.keys()
        # A package's own modules stand behind its __init__, which may gather them.
        arrows[module] = {name for name in names if name != module and not module.startswith(f"{name}.")}
    assert circles(arrows) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_imports_only_those_below_it(package: str):
    below = {
        "dpo_ray": set(),
        "tuning": {"dpo_ray"},
        "cluster": {"dpo_ray"},
        "pipelines": {"dpo_ray", "tuning", "cluster"},
    }[package]
    for path in sources(package):
        if path != API:
            assert tops(path) & OURS <= below | {package}, path.relative_to(REPOSITORY)


API = REPOSITORY / "dpo_ray" / "api.py"
"""Carries the library to Python programs from above everything, as the command line does to people."""


def test_nothing_uses_the_api_and_the_api_uses_no_ray():
    users = [m for m, path in our_modules().items() if "dpo_ray.api" in imported(path.read_text(encoding="utf-8"))]
    assert users == []
    assert not tops(API) & {"ray", "vllm", "tuning", "cluster"}


def test_importing_the_api_is_cheap():
    loaded = loaded_after("from dpo_ray import api")
    assert "dpo_ray" in loaded and not loaded & (HEAVY | DATA | {"pipelines", "tuning", "typer", "rich"})


def test_the_cluster_uses_the_configuration_errors_tokens_and_hub_names_of_the_library_and_nothing_else():
    rooms = {"dpo_ray.config", "dpo_ray.errors", "dpo_ray.origin"}
    files = ("dpo_ray.on_ray.authentication", "dpo_ray.storage.hub")
    for path in sources("cluster"):
        for name in imported(path.read_text(encoding="utf-8")):
            if name.split(".")[0] == "dpo_ray":
                used = ".".join(name.split(".")[:2])
                assert used in rooms or name.startswith(files), (path, name)


def test_only_the_command_line_uses_the_cluster():
    users = [p.relative_to(REPOSITORY) for p in sources("pipelines") if "cluster" in tops(p)]
    assert users == [Path("pipelines/commands/jobs.py")]


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_reading_a_configuration_needs_neither_ray_nor_vllm_nor_torch():
    loaded = loaded_after("import dpo_ray.config, dpo_ray.errors")
    assert "dpo_ray" in loaded
    assert not loaded & {"ray", "vllm", "torch", "transformers"}


def test_the_command_line_starts_without_ray_and_vllm():
    loaded = loaded_after("import pipelines.cli")
    assert "pipelines" in loaded
    assert not loaded & {"ray", "vllm"}


COMMAND = """
import sys
from pipelines.cli import main

sys.argv[0] = "dpo-ray"
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
print("LOADED", code, *sorted({m.split(".")[0] for m in sys.modules}))
"""


def loaded_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of a command, and what its process has loaded."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, code, *loaded = done.stdout.splitlines()[-1].split()
    return int(code), set(loaded)


HEAVY = {"ray", "vllm", "torch", "transformers"}
DATA = {"pyarrow", "numpy", "jinja2"}
CONFIG = "pipelines/configs/align_cpu.yaml"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["schema"], 0),
        (["run", CONFIG, "-o", "train.no_such_key=1"], 2),
        (["generate", CONFIG], 2),
        (["sweep", CONFIG, "-o", "tune=null"], 2),
        (["train", CONFIG, "--reference", "x", "-o", "train.loss={type: orpo}"], 2),
        (["ingest", CONFIG, "--dry-run"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_file_and_command_line_tell_needs_no_more_than_them(arguments: list[str], code: int):
    found, loaded = loaded_by(*arguments)
    assert found == code
    assert not loaded & (HEAVY | DATA)


def test_a_wrong_path_and_what_an_output_folder_holds_are_told_without_ray(tmp_path: Path):
    found, loaded = loaded_by("run", CONFIG, "-o", f"data.train={tmp_path}/*.parquet")
    assert found == 3 and not loaded & HEAVY
    (tmp_path / "runs" / "first").mkdir(parents=True)
    found, loaded = loaded_by("show", str(tmp_path))
    assert found == 0 and not loaded & HEAVY


def test_a_model_is_looked_at_without_the_libraries_that_compute_with_it(tiny_model: Path):
    loaded = loaded_after(
        "import dpo_ray.config, pipelines.preflight as p\n"
        f"tree = {{'run': {{'name': 'x', 'output': 'x'}}, 'model': {{'path': {str(tiny_model)!r}}}, "
        "'data': {'train': 'x'}}\n"
        "p.require_models(dpo_ray.config.parse_config(tree))\n"
        "from dpo_ray.model.resolve import ModelFolder\n"
        f"folder = ModelFolder({str(tiny_model)!r})\n"
        "folder.tokenizer_hash(), folder.weights_hash(), folder.config()"
    )
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "module",
    [
        "dpo_ray.model.resolve",
        "dpo_ray.model.pin",
        "dpo_ray.on_ray.scan",
        "dpo_ray.on_ray.pool",
        "dpo_ray.on_ray.shard_worker",
        "dpo_ray.on_ray.stream",
        "dpo_ray.on_ray.train_worker",
    ],
)
def test_workers_that_only_carry_rows_do_without_torch(module: str):
    # It would cost each of them seconds at its start and 200 MB.
    assert not loaded_after(f"import {module}") & {"torch", "transformers"}


def test_no_folder_of_tests_is_called_ray():
    # It would shadow the library for whatever runs with the folder of tests on its path.
    assert not (REPOSITORY / "tests" / "ray").exists()


def test_there_is_no_drawer_for_everything():
    for package in PACKAGES:
        assert not [p for p in sources(package) if p.stem in {"utils", "util", "helpers", "common", "misc"}]
