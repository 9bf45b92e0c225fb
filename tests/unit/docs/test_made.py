"""Pages of docs/ that are made from the code are of this code, and what makes them leaves nothing out."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from docs.make import foreign, losses, troubleshooting
from docs.make.pages import MADE
from dpo_ray import errors
from dpo_ray.config.losses import Loss
from pipelines.cli import app
from tests.documented import ROOT


@pytest.mark.parametrize("name", MADE)
def test_what_is_published_is_of_this_code(name: str):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == MADE[name](), "the code has changed: `make docs` writes the pages anew"


def test_a_message_is_read_as_it_is_told():
    source = """
WAY_OUT = "Take the other."
def told(x): return f"{x} is no pair of two: give both"
def why(x): return f"Or {x:g} less."
def f(self, x, said):
    if x:
        raise ConfigError(f"train.{x}={self.value:g} is too much, for {len(x)} are there. " + f"{WAY_OUT}")
    if said:
        message = "There is nothing to be found here"
        raise DataError(message)
    raise DataError(told(x))
    raise DataError(f"{x} is by far too much for this. {why(x)}")
    raise ValueError("not for people to see at all")
    raise ConfigError(str(x))
"""
    assert list(troubleshooting.raised(source)) == [
        ("ConfigError", "train.‹x›=‹value› is too much, for … are there. Take the other."),
        ("DataError", "There is nothing to be found here"),
        ("DataError", "‹x› is no pair of two: give both"),
        ("DataError", "‹x› is by far too much for this. Or ‹x› less."),
    ]
    assert ("ConfigError", "not for people to see at all") in troubleshooting.raised(source, in_config=True)


@pytest.mark.parametrize(
    ("text", "said", "way_out"),
    [
        ("It is full. Make room.", "It is full.", "Make room."),
        ("tune.space has none of it: leave it out", "tune.space has none of it", "Leave it out"),
        ("It has no room (known: a, b c d)", "It has no room (known: a, b c d)", ""),
    ],
)
def test_a_message_says_what_is_wrong_and_the_way_out(text: str, said: str, way_out: str):
    assert troubleshooting.split(text) == (said, way_out)


def test_every_message_has_a_way_out_of_its_own():
    without = [one.text for one in troubleshooting.messages() if not troubleshooting.split(one.text)[1]]
    assert not without, "say the way out in a last sentence, or behind a last colon"


def test_every_exit_code_has_its_messages():
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.DpoRayError)]
    page = MADE["troubleshooting.md"]()
    assert {int(code) for code in re.findall(r"^## Exit code (\d+):", page, re.M)} == {kind.exit_code for kind in kinds}
    told = list(troubleshooting.messages())
    assert {one.code for one in told} == {kind.exit_code for kind in kinds} and len(told) > 300


def test_every_loss_has_a_formula_and_a_word_for_when():
    union, _ = get_args(Loss)
    types = {get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(union)}
    page = MADE["losses.md"]()
    assert types == set(losses.REASONS)
    for name in types:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert ("\n> " in section) == (name != "weighted"), name
        assert re.search(r"σ|max\(|²|KL\(", section) or name == "weighted", name


@pytest.mark.parametrize("whose", ["TRL", "LLaMA-Factory"])
def test_a_value_is_given_for_every_option_that_is_decided_by_its_value(whose: str):
    assert foreign.own_options(whose) <= foreign.values(whose)
    told = [foreign.becomes(whose, key)[0] for key in foreign.own_options(whose)]
    assert told.count("carried") > 0.7 * len(told)


def test_every_command_has_a_section():
    page = MADE["commands.md"]()
    names = [one.name or one.callback.__name__.replace("_", "-") for one in app.registered_commands]
    assert len(names) > 15
    for name in names:
        assert re.search(rf"^## dpo-ray {name}$", page, re.M), name
