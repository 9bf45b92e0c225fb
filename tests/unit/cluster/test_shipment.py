"""What travels with a job, and what is refused before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import shipment
from cluster.shipment import CONFIG, packed, runtime_env
from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError


def config(*functions: str) -> Config:
    reward: list[dict[str, Any]] = [{"function": function, "name": f"r{n}"} for n, function in enumerate(functions)]
    generate = {"prompts": "/data/prompts.jsonl", "reward": reward} if reward else None
    values = {"run": {"name": "n", "output": "/out"}, "model": {"path": "/model"}} | (
        {"generate": generate} if generate else {}
    )
    return parse_config(values if generate else values | {"data": {"train": "/data"}})


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    (folder / "rules" / "__pycache__").mkdir(parents=True)
    (folder / "rules" / "__pycache__" / "a.cpython-311.pyc").touch()
    (folder / "rules" / "__init__.py").touch()
    (folder / "rules" / "brief.py").write_text("brief = True")
    (folder / "short.py").write_text("short = True")
    (folder / "unused.py").touch()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_modules_of_rules_that_lie_here_travel_and_no_others(here: Path):
    rules = ("rules.brief:brief", "short:short", "dpo_ray.rewards:likely", "elsewhere:one")
    with packed(config(*rules), here, []) as (folder, told):
        assert names(folder) == [CONFIG, "rules/__init__.py", "rules/brief.py", "short.py"]
        assert told == ["rules", "short.py"]
        assert "function: short:short" in (folder / CONFIG).read_text()
    assert not folder.exists()


def test_what_is_named_travels_too_and_a_module_only_once(here: Path):
    with packed(config("short:short"), here, [here / "short.py", here / "unused.py"]) as (folder, told):
        assert told == ["short.py", "unused.py"]
    with packed(config(), here, []) as (folder, told):
        assert names(folder) == [CONFIG] and told == []


def test_what_cannot_travel_is_refused_by_name(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with (
        pytest.raises(ConfigError, match=r"--ship .*/missing: there is no such"),
        packed(config(), here, [here / "missing"]),
    ):
        pass
    (tmp_path / "short.py").touch()
    both = [here / "short.py", tmp_path / "short.py"]
    with (
        pytest.raises(ConfigError, match=r"something else that travels is called short\.py"),
        packed(config(), here, both),
    ):
        pass
    (tmp_path / CONFIG).touch()
    with pytest.raises(ConfigError, match=r"is called config\.yaml"), packed(config(), here, [tmp_path / CONFIG]):
        pass
    monkeypatch.setattr(shipment, "_LIMIT", 10)
    with pytest.raises(ConfigError, match="takes 0 MiB, of 0 at most"), packed(config(), here, []):
        pass


@pytest.mark.parametrize(
    ("section", "key", "path"),
    [
        ("data", "train", "pairs.jsonl"),
        ("data", "train", "data/*.parquet"),
        ("data", "train", ["/shared/a", "b/a.jsonl"]),
        ("data", "train", [{"name": "a", "path": "/shared/a"}, {"name": "b", "path": "mine/b.jsonl"}]),
        ("data", "eval", "rules"),
        ("model", "path", "rules"),
        ("data", "train", "."),
        ("evaluate", "sets", {"bench": "bench.parquet"}),
        ("evaluate", "win_rate", {"against": {"path": "rules"}}),
        ("evaluate", "win_rate", {"reward": {"type": "reward_model", "path": "rules"}}),
        ("evaluate", "win_rate", {"reward": {"type": "implicit", "policy": "/m", "reference": "rules"}}),
        ("evaluate", "win_rate", {"reward": {"type": "judge", "model": "/m", "template": "ask.jinja"}}),
        ("evaluate", "tasks", {"names": ["mine"], "include_path": "tasks"}),
        ("model", "chat_template", "chat.jinja"),
    ],
)
def test_a_relative_path_that_does_not_travel_is_refused(here: Path, section: str, key: str, path: Any):
    tree = config().model_dump(mode="json", exclude_unset=True)
    tree.setdefault(section, {})[key] = path
    with (
        pytest.raises(ConfigError, match=rf"^{section}\.{key}.* a relative path, .*: --ship "),
        packed(parse_config(tree), here, []),
    ):
        pass


@pytest.mark.parametrize(
    ("section", "key", "path"),
    [
        ("data", "train", "owner/pairs"),
        ("data", "train", "s3://bucket/pairs"),
        ("data", "train", "short.py"),
        ("model", "path", "owner/model"),
        ("model", "path", "gpt2"),
        ("model", "path", "package://a/b.gguf"),
    ],
)
def test_what_the_nodes_reach_is_not(here: Path, section: str, key: str, path: str):
    tree = config().model_dump(mode="json", exclude_unset=True)
    tree.setdefault(section, {})[key] = path
    with packed(parse_config(tree), here, [here / "short.py"]):
        pass


def test_the_jobs_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "told")
    assert runtime_env(tmp_path, [], None) == {"working_dir": str(tmp_path)}
    file = tmp_path / "env.yaml"
    file.write_text("pip: [textstat]\nenv_vars: {MY_KEY: other, ANOTHER: one}\n")
    made = runtime_env(tmp_path, ["MY_KEY"], file)
    assert made == {
        "working_dir": str(tmp_path),
        "pip": ["textstat"],
        "env_vars": {"MY_KEY": "told", "ANOTHER": "one"},
    }
    file.write_text("pip: [textstat]\nenv_vars:\n")  # all lines of it taken out
    assert runtime_env(tmp_path, ["MY_KEY"], file)["env_vars"] == {"MY_KEY": "told"}
    with pytest.raises(ConfigError, match="--env NOT_THERE: this variable is not set here"):
        runtime_env(tmp_path, ["NOT_THERE"], None)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("[1, 2", r"cannot be read \(.*line 1.*\)\. Name a YAML file"),
        ("- textstat", "is to hold fields by name, and holds list. Write fields"),
        ("working_dir: /somewhere", "has working_dir, which is made of the configuration"),
        ("pip: 3", "is no runtime environment of Ray"),
        ("pipe: [textstat]", "has pipe, which Ray's runtime environments lack. Take it out, or name one of .*pip"),
    ],
)
def test_what_is_no_runtime_environment_is_refused(tmp_path: Path, content: str | None, told: str):
    file = tmp_path / "env.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=told):
        runtime_env(tmp_path, [], file)
