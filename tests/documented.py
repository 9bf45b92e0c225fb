"""What README.md and docs/ say: their pages, commands and YAML, and how each command is tried.

`python -m tests.documented` prints how many commands there are, and which test does what with them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines import STAGES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

BLOCK_LANGUAGES = {"bash", "yaml", "text", "python"}
"""What fenced blocks are: commands, parts of configurations, what is printed or drawn."""

How = Literal["executed", "dry run", "validated", "exception"]


@dataclass(frozen=True)
class Tried:
    """How commands that begin so are tried, and where; of an exception why they are not."""

    begins: str
    how: How
    where: str


_COMMANDS_TEST = "tests/unit/test_readme.py"
_CLUSTER_TEST = "tests/unit/cluster/test_commands.py"
TRIED = [
    Tried("dpo-ray data ", "executed", _COMMANDS_TEST),
    Tried("dpo-ray init ", "executed", _COMMANDS_TEST),
    Tried("dpo-ray import-config ", "executed", _COMMANDS_TEST),
    Tried("dpo-ray schema", "executed", _COMMANDS_TEST),
    Tried("dpo-ray gc ", "executed", _COMMANDS_TEST),
    Tried("dpo-ray show ", "executed", _COMMANDS_TEST),
    Tried("dpo-ray lineage ", "executed", _COMMANDS_TEST),
    Tried("dpo-ray watch ", "executed", "tests/unit/test_readme.py"),
    Tried("dpo-ray --install-completion", "executed", "tests/unit/pipelines/test_completion.py"),
    Tried("python -m ", "executed", _COMMANDS_TEST),
    Tried("ray job submit ", "executed", "tests/on_ray/test_submit.py"),
    *(Tried(f"dpo-ray {name} ", "dry run", _COMMANDS_TEST) for name in ("run", *STAGES, "sweep", "iterate")),
    Tried("dpo-ray doctor ", "validated", _COMMANDS_TEST),
    Tried("dpo-ray plan ", "validated", _COMMANDS_TEST),
    Tried("dpo-ray submit ", "validated", _COMMANDS_TEST),
    Tried("dpo-ray job ", "validated", _COMMANDS_TEST),
    Tried("make ", "validated", _COMMANDS_TEST),
    Tried("kubectl ", "exception", f"needs a Kubernetes cluster; what it names is looked at in {_CLUSTER_TEST}"),
    Tried("ray up ", "exception", f"starts machines on EC2; what it names is looked at in {_CLUSTER_TEST}"),
    Tried("sbatch ", "exception", f"needs Slurm; what it names is looked at in {_CLUSTER_TEST}"),
    Tried("source ", "exception", "changes the shell that it is typed into; the tests run in that environment"),
]
"""The first that fits a command holds."""


def blocks(page: Path, language: str | None = None) -> list[str]:
    """Fenced blocks of a page: those in a language, or with None those without one."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == (language or "")]


def languages(page: Path) -> set[str]:
    """Of the fenced blocks of a page; empty where one names none."""
    return {kind for kind, _ in _BLOCK.findall(page.read_text(encoding="utf-8"))}


def commands(page: Path) -> list[str]:
    """Lines of the page's blocks of bash, without their comments."""
    lines = (re.sub(r"\s{2,}#.*", "", line).strip() for block in blocks(page, "bash") for line in block.splitlines())
    return [line for line in lines if line]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
"""Of all pages, each once."""


def tried(command: str) -> Tried:
    """How a command is tried. Raises LookupError where nothing tries it."""
    for one in TRIED:
        if command.startswith(one.begins):
            return one
    raise LookupError(f"{command}: nothing tries this command: add how to tests/documented.py, and a test that does")


def beginning(*starts: str) -> list[str]:
    """The commands that begin so."""
    return [command for command in COMMANDS if command.startswith(starts)]


def told() -> str:
    """How many commands there are, and what is done with them."""
    counts = Counter(tried(command).how for command in COMMANDS)
    named = "{} executed by tests, {} by a dry run, {} validated, {} exceptions".format(
        *(counts[how] for how in ("executed", "dry run", "validated", "exception"))
    )
    lines = [f"{len(COMMANDS)} commands in {len(PAGES)} pages: {named}."]
    for one in TRIED:
        if fitting := [command for command in COMMANDS if tried(command) is one]:
            lines.append(f"  {one.how:<9}  {len(fitting):>2}  {one.begins.strip()}: {one.where}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(told())
