"""The pages that are made from the code, the configuration's own left aside, which `dpo-ray schema` prints."""

from __future__ import annotations

from functools import partial

from docs.make import commands, foreign, losses, python, troubleshooting

MADE = {
    "commands.md": commands.page,
    "losses.md": losses.page,
    "migrating-llama-factory.md": partial(foreign.page, "LLaMA-Factory"),
    "migrating-trl.md": partial(foreign.page, "TRL"),
    "python.md": python.page,
    "troubleshooting.md": troubleshooting.page,
}
"""File of docs/ → its Markdown."""
