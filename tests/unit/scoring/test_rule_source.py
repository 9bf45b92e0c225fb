"""What a reward is known by: edits that change what it may give change it, and no others do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.scoring import rule_source
from dpo_ray.scoring.rule_source import require_same_source, reward_identity

SOURCE = '''"""A module of rewards."""

from __future__ import annotations

import functools
import re

from my_words import common

WORDS = {"cats": 1.0}
WORDS["dogs"] = 0.5
LIMIT = 60
WORD = re.compile(r"\\w+")
UNUSED = 1


def logged(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)

    return call


class Weigher:
    """Adds weights up."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, words):
        return sum(weight(word) for word in words[: self.limit])


def weight(word):
    return WORDS.get(word, 0.0) + common(word)


@logged
def score(prompt: str, completion: str, finished: bool) -> float:
    """The weight of its words."""
    return Weigher(LIMIT)(WORD.findall(completion))


def even(prompt, completion, finished):
    return odd(prompt, completion[1:], finished) if completion else 1.0


def odd(prompt, completion, finished):
    return even(prompt, completion[1:], finished) if completion else 0.0


def other(prompt, completion, finished):
    return 0.0


halved = functools.partial(weight, "cats")
alias = common

if __name__ == "__main__":
    print(score("", "cats", True))
'''


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """identity(source, function, …): of a reward in a module of this source, as a process that starts now sees it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "my_words.py").write_text("def common(word):\n    return 0.0\n")
    before = set(sys.modules)

    def forget() -> None:
        for name in set(sys.modules) - before:
            if name.startswith("my_"):
                del sys.modules[name]
        importlib.invalidate_caches()
        rule_source._identity.cache_clear()

    def build(source: str = SOURCE, function: str = "score", **others: str) -> dict[str, str | int]:
        (tmp_path / "my_rewards.py").write_text(source)
        for name, text in others.items():
            (tmp_path / f"{name}.py").write_text(text)
        forget()
        return reward_identity(f"my_rewards:{function}")

    yield build
    forget()


Identity = Callable[..., dict[str, str | int]]


def edited(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1, old
    return SOURCE.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Weigher(LIMIT)(WORD.findall(completion))", "Weigher(LIMIT)(WORD.findall(prompt))"),
        ("self.limit = limit", "self.limit = 2 * limit"),
        ("sum(weight(word)", "max(weight(word)"),
        ("WORDS.get(word, 0.0)", "WORDS.get(word, 0.1)"),
        ("LIMIT = 60", "LIMIT = 61"),
        ('{"cats": 1.0}', '{"cats": 1.5}'),
        ('WORDS["dogs"] = 0.5', 'WORDS["dogs"] = 0.25'),
        ('re.compile(r"\\w+")', 're.compile(r"\\w")'),
        ("return function(*arguments)", "return -function(*arguments)"),
        ("from my_words import common", "from my_words import uncommon as common"),
        ("finished: bool) -> float", "finished: bool = True) -> float"),
        ("@logged\n", ""),
    ],
    ids=[
        "body",
        "class",
        "a class's method",
        "helper of a helper",
        "constant",
        "constant of a helper",
        "change of a constant",
        "regular expression",
        "decorator",
        "import",
        "default",
        "decorated",
    ],
)
def test_an_edit_of_what_the_reward_uses_changes_its_identity(identity: Identity, old: str, new: str):
    words = "def common(word):\n    return 0.0\nuncommon = common\n"
    assert identity(edited(old, new), my_words=words) != identity(SOURCE, my_words=words)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    return 0.0\n\n\nhalved", "    return 9.0\n\n\nhalved"),
        ("UNUSED = 1", "UNUSED = 2"),
        ('"""The weight of its words."""', '"""Said otherwise."""'),
        ('    """The weight of its words."""\n', ""),
        ('"""Adds weights up."""', '"""Weighs.\n\n    In full."""'),
        ('"""A module of rewards."""', "# Nothing."),
        ("LIMIT = 60", "LIMIT = 60  # words"),
        ("LIMIT = 60", "\n\nLIMIT = (\n    60\n)"),
        ("return WORDS.get(word, 0.0) + common(word)", "return (WORDS.get(word, 0.0)\n            + common(word))"),
        ('    print(score("", "cats", True))', '    print(score("", "dogs", True))'),
    ],
    ids=[
        "another function",
        "another constant",
        "docstring",
        "no docstring",
        "docstring of a class",
        "docstring of the module",
        "comment",
        "lines",
        "white space",
        "main block",
    ],
)
def test_any_other_edit_leaves_it(identity: Identity, old: str, new: str):
    assert identity(edited(old, new)) == identity(SOURCE)


REGISTRY = """SCORERS = {}


def register(function):
    SCORERS[function.__name__] = function
    return function


@register
def brevity(completion):
    return 1.0


def score(prompt, completion, finished):
    return sum(scorer(completion) for scorer in SCORERS.values())
"""
LOADED = """WORDS = None


def load():
    global WORDS
    WORDS = {"cats": 1.0}


def prepare():
    load()


%s


def score(prompt, completion, finished):
    return WORDS.get(completion, 0.0)
"""


@pytest.mark.parametrize(
    "source", [REGISTRY, LOADED % "prepare()", LOADED % "READY = prepare()", LOADED % "if True:\n    prepare()"]
)
def test_what_a_decorator_or_a_call_sets_is_covered(identity: Identity, source: str):
    assert identity(source.replace("1.0", "2.0")) != identity(source)


@pytest.mark.parametrize(
    ("imports", "decorator", "table"),
    [
        ("import my_hub", "@my_hub.register", "my_hub.TABLE"),
        ("from my_hub import TABLE, register", "@register", "TABLE"),
        ("import my_hub as hub\n\n\ndef mine(f):\n    return hub.register(f)", "@mine", "hub.TABLE"),
    ],
    ids=["module", "names", "by way of a function"],
)
def test_what_is_registered_in_another_module_is_covered(identity: Identity, imports: str, decorator: str, table: str):
    hub = "TABLE = {}\n\n\ndef register(f):\n    TABLE[f.__name__] = f\n    return f\n"
    source = (
        f"{imports}\n\n\n{decorator}\ndef helper(text):\n    return 1.0\n\n\n"
        f"def score(p, c, f):\n    return {table}['helper'](c)\n"
    )
    assert identity(source.replace("1.0", "2.0"), my_hub=hub) != identity(source, my_hub=hub)


def test_what_a_statement_sets_in_the_standard_library_is_covered(identity: Identity):
    source = "import random\n\nrandom.seed(1)\n\n\ndef score(p, c, f):\n    return random.random()\n"
    assert identity(source.replace("seed(1)", "seed(2)")) != identity(source)


def test_a_library_that_both_call_ties_nothing_together(identity: Identity):
    source = (
        "import re\nWORD = re.compile('a')\nOTHER = re.compile('b')\n\n\n"
        "def score(p, c, f):\n    return len(WORD.findall(c))\n"
    )
    assert identity(source.replace("'b'", "'c'")) == identity(source)
    assert identity(source.replace("'a'", "'c'")) != identity(source)


def test_rewards_of_one_module_differ(identity: Identity):
    assert len({identity(SOURCE, name)["reward_source"] for name in ("score", "even", "odd", "other", "halved")}) == 5


def test_functions_that_call_each_other_are_covered_both(identity: Identity):
    assert identity(edited("completion else 0.0", "completion else 0.5"), "even") != identity(SOURCE, "even")


def test_a_callable_that_is_no_function_is_covered_with_what_makes_it(identity: Identity):
    assert identity(edited("WORDS.get(word, 0.0)", "1.0"), "halved") != identity(SOURCE, "halved")
    assert identity(edited('weight, "cats"', 'weight, "dogs"'), "halved") != identity(SOURCE, "halved")
    instance = "class Judge:\n    def __call__(self, p, c, f):\n        return {}\n\n\nscore = Judge()\n"
    assert identity(instance.format(1.0)) != identity(instance.format(2.0))


def test_what_is_bound_in_branches_is_covered(identity: Identity):
    source = (
        "try:\n    import no_such_module\nexcept ImportError:\n    FACTOR = {}\n\n\n"
        "def score(p, c, f):\n    return FACTOR\n"
    )
    assert identity(source.format(1.0)) != identity(source.format(2.0))


def test_a_global_that_a_function_sets_is_covered(identity: Identity):
    source = "_seen = {}\n\n\ndef score(p, c, f):\n    global _seen\n    _seen = c\n    return 0.0\n"
    assert identity(source.format(1)) != identity(source.format(2))


def test_a_helper_of_another_module_is_not_covered_but_by_a_version(identity: Identity):
    other = "def common(word):\n    return {}\n"
    assert identity(SOURCE, my_words=other.format(0.0)) == identity(SOURCE, my_words=other.format(1.0))
    versioned = SOURCE + "REWARD_VERSION = str(common(''))\n"
    first = identity(versioned, my_words=other.format(0.0))
    assert first["reward_version"] == "0.0"
    second = identity(versioned, my_words=other.format(1.0))
    assert first != second and first["reward_source"] == second["reward_source"]


def test_a_version_that_is_no_text_or_number_is_refused(identity: Identity):
    with pytest.raises(ConfigError, match=r"REWARD_VERSION of my_rewards is a list"):
        identity(SOURCE + "REWARD_VERSION = [1]\n")


def test_a_reward_from_another_module_is_followed_to_its_definition(identity: Identity):
    relayed = "from my_relay import score\n"
    relay = "from my_home import length as score\n"
    home = "def length(p, c, f):\n    return {} * len(c)\n"
    first = identity(relayed, my_relay=relay, my_home=home.format(1))
    assert first != identity(relayed, my_relay=relay, my_home=home.format(2))
    # The way to it is no part of it.
    assert first == identity("# Moved.\n" + relayed, my_relay="import re\n" + relay, my_home=home.format(1))


def test_a_relative_import_is_followed(identity: Identity, tmp_path: Path):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import score\n")
    (package / "inner.py").write_text("def score(p, c, f):\n    return 1.0\n")
    first = reward_identity("my_package:score")
    (package / "inner.py").write_text("def score(p, c, f):\n    return 2.0\n")
    identity()  # forgets what was imported
    assert reward_identity("my_package:score")["reward_source"] != first["reward_source"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from my_words import common\n\nscore = common\n", "another name of what it imports"),
        ("import my_words\n\nscore = my_words.common\n", "another name of what it imports"),
        ("from my_words import *\n\nscore2 = 1\n", "no statement of my_rewards defines"),
        ("globals()['score'] = len\n", "no statement of my_rewards defines"),
        ("try:\n    from my_words import common as score\nexcept ImportError:\n    raise\n", "imported in a branch"),
        ("from math import fsum as score\n", "math has no source"),
    ],
    ids=["alias", "alias of an attribute", "star", "not by a statement", "branch", "compiled"],
)
def test_a_reward_whose_source_cannot_be_found_is_refused_with_the_way_out(identity: Identity, source: str, said: str):
    name = "score2" if "score2" in source else "score"
    source = source.replace("score2 = 1\n", "")
    words = "def common(word):\n    return 0.0\n\n\ndef score2(p, c, f):\n    return 0.0\n"
    with pytest.raises(ConfigError) as caught:
        identity(source, name, my_words=words)
    assert said in str(caught.value)
    assert f"my_rewards:{name}" in str(caught.value) and "define a function" in str(caught.value)


def test_it_is_what_this_process_has_imported_that_counts(identity: Identity, tmp_path: Path):
    before = identity()
    (tmp_path / "my_rewards.py").write_text(edited("LIMIT = 60", "LIMIT = 61"))
    assert reward_identity("my_rewards:score") == before


def test_a_process_that_has_another_source_refuses_to_score(identity: Identity):
    there = str(identity()["reward_source"])
    require_same_source("my_rewards:score", there)
    identity(edited("LIMIT = 60", "LIMIT = 61"))
    with pytest.raises(ConfigError, match=r"my_rewards:score has another source .* than the driver"):
        require_same_source("my_rewards:score", there)


def test_a_reward_that_cannot_be_imported_is_told_as_such():
    with pytest.raises(ConfigError, match=r"no_such_module_anywhere:f cannot be imported"):
        reward_identity("no_such_module_anywhere:f")


def test_the_demo_reward_has_an_identity():
    assert set(reward_identity("dpo_ray.rewards:brief_answer")) == {"reward", "reward_source"}
