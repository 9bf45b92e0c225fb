"""The examples in docs/examples: that a notebook is its script, and that their configurations are ones."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from dpo_ray import api
from tests.notebooks import EXAMPLES, SCRIPTS, cells, notebook


def test_there_are_examples():
    assert [script.name for script in SCRIPTS] == ["own_reward.py", "sweep.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_its_script(script: Path):
    """`make docs` writes it anew."""
    assert script.with_suffix(".ipynb").read_text() == notebook(script.read_text())


def test_cells_are_found():
    script = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\na = 1\n# a comment\n\n# %%\nb = 2\n"
    assert cells(script) == [("markdown", "# Title\n\nText."), ("code", "a = 1\n# a comment"), ("code", "b = 2")]
    kinds = [cell["cell_type"] for cell in json.loads(notebook(script))["cells"]]
    assert kinds == ["markdown", "code", "code"]


class Begun(Exception):
    """What an example asks for first is reached."""


@pytest.mark.parametrize(
    ("script", "first"), [("own_reward.py", "generate"), ("sweep.py", "sweep")], ids=["own_reward", "sweep"]
)
def test_an_example_comes_to_its_first_call(script: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given: list[api.Config] = []

    def begun(config: api.Config) -> None:
        given.append(config)
        raise Begun

    monkeypatch.setattr(api, first, begun)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Begun):
        runpy.run_path(str(EXAMPLES / script))
    [config] = given
    assert config.run.output.startswith("out/") and (tmp_path / "out").is_dir()


def test_the_reward_of_the_example_prefers_what_it_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "house_style", raising=False)
    from house_style import house_style

    def score(completion: str, finished: bool = True) -> float:
        return sum(house_style("Why?", completion, finished, words=4).values())

    assert score("So it is.") > score("So it is.", finished=False) > score("- so\n- it is")
    assert score("So it is.") > score("So it is, and it is so for more than one reason.")
