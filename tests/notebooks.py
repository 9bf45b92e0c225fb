"""Examples as scripts in cells, marked by `# %%`, and the same as notebooks: `make docs` writes the notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.read_text().startswith("# %%"))
_MARK = re.compile(r"^# %%(?: \[(markdown)\])?$", re.M)


def cells(script: str) -> list[tuple[str, str]]:
    """Kind, "markdown" or "code", and text of each cell."""
    _, *parts = _MARK.split(script)
    found = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        text = text.strip("\n")
        found.append(("markdown", re.sub(r"^# ?", "", text, flags=re.M)) if kind else ("code", text))
    return found


def notebook(script: str) -> str:
    """The script as an .ipynb file of nbformat 4.5, without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(notebook(script.read_text()))


if __name__ == "__main__":
    main()
