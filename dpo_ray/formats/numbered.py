"""Two numbered responses, and the number of the better one, as in PKU-SafeRLHF."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, compared, is_text, no_pair, present, text

_RESPONSES = ("response_0", "response_1")


def numbered(name: str, better: str, absent: tuple[str, ...] = ()) -> Format:
    """The format whose column `better` tells the number of the better response."""

    def fits(row: Row) -> bool:
        return is_text(row["prompt"], *(row[name] for name in _RESPONSES)) and _is_number(row[better])

    def fields(row: Row) -> dict[str, Any]:
        number = present(row, better)
        if not _is_number(number):
            no_pair("no_winner")
        first, second = (text(row, response) for response in _RESPONSES)
        return {"prompt": text(row, "prompt"), **compared(first, second, number == 0)}

    about = f"prompt, response_0, response_1, and {better}: 0 or 1"
    return Format(
        name, about, "paired", (("prompt", *_RESPONSES, better),), fits, fields, absent=absent, typed=(better,)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (0, 1)
