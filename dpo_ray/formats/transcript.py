"""Dialogues in one text: transcripts of HH-RLHF, `\\n\\nHuman: …\\n\\nAssistant: …`, and prompts of HelpSteer2."""

from __future__ import annotations

import re
from typing import Any

from dpo_ray.formats.format import no_pair

_TURN = re.compile(r"(?:^\s*|(?:\r?\n){2})(Human|Assistant): ?")
_MARKED = re.compile(r"\n{0,2}<extra_id_1>(User|Assistant)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


def turns(transcript: str) -> list[dict[str, Any]]:
    """The turns of a transcript as messages. Raises NoPair where it does not begin with one."""
    before, *found = _TURN.split(transcript)
    if before.strip() or not found:
        no_pair("bad_transcript")
    return [{"role": _ROLES[who], "content": said} for who, said in zip(found[::2], found[1::2], strict=True)]


def question(transcript: str) -> list[dict[str, Any]]:
    """The turns of a transcript that ends where the assistant is to speak, or right before. Raises NoPair."""
    found = turns(transcript)
    if found[-1]["role"] == "assistant" and not found[-1]["content"].strip():
        found.pop()
    return found


def marked_turns(prompt: str) -> list[dict[str, Any]]:
    """The turns of a prompt of HelpSteer2: what the user says first, and what follows a mark with whose turn it is."""
    first, *found = _MARKED.split(prompt)
    said = [{"role": _ROLES[who], "content": said} for who, said in zip(found[::2], found[1::2], strict=True)]
    return [{"role": "user", "content": first}, *said]
