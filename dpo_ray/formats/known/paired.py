"""chosen and rejected beside their prompt, all text or all messages; or, without a prompt, whole dialogues (TRL)."""

from __future__ import annotations

from dpo_ray.formats.format import Row, is_text, is_transcript, is_turns, layout_format
from dpo_ray.formats.known.implicit_prompt import repeats_prompt


def _fits(row: Row) -> bool:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" not in row:
        return all(is_turns(side) and len(side) > 1 for side in (chosen, rejected))
    if is_text(row["prompt"], chosen, rejected):
        return not any(map(is_transcript, (row["prompt"], chosen, rejected)))
    return all(map(is_turns, (row["prompt"], chosen, rejected))) and not repeats_prompt(row)


FORMAT = layout_format("paired", "prompt, chosen, rejected; or chosen and rejected as whole dialogues", _fits)
