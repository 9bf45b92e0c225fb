"""Another trainer's options, each of which is carried over, without meaning here, or lost, and is told so."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

from dpo_ray.config import Config, parse_config
from dpo_ray.config.load import put
from dpo_ray.errors import ConfigError

_WIDTH = 110
OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", "no", "none", "default", "off", [], {})
"""Values by which an option asks for nothing."""
_SECRET = re.compile(r"(hub|hf|auth|access)_token$|api_key$|secret$|password$|webhook_url$|^env$", re.IGNORECASE)


class Reading:
    """What is read of one file, and what came of it."""

    def __init__(self, given: Mapping[str, Any], source: str, whose: str):
        self.given, self.source, self.whose = given, source, whose
        self.tree: dict[str, Any] = {}
        self.carried: dict[str, str] = {}
        self.meaningless: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.decided: list[str] = []

    def has(self, key: str) -> bool:
        """Whether it is given; null is not."""
        return self.given.get(key) is not None

    def value(self, key: str, default: Any = None) -> Any:
        """Of an option, or its default there."""
        return self.given[key] if self.has(key) else default

    def number(self, key: str, default: float) -> float:
        """The same of a number, which YAML may have taken for text (5e-7). Raises ConfigError where it is none."""
        value = self.value(key, default)
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{self.source}: {key}={value!r} is no number: mend it there, or leave it out.") from None

    def set(self, ours: str, value: Any) -> None:
        """A key of ours."""
        put(self.tree, ours, value, source=ours)

    def carry(self, key: str, ours: str, value: Any, note: str = "") -> None:
        """Their option is ours with this value. Where it is not given, the value is their default."""
        self.set(ours, value)
        if self.has(key):
            self.carried[key] = f"{ours}{f': {note}' if note else ''}"
        else:
            self.decided.append(
                f"{ours}={value}: {key} is not given, and this is its default there{f'; {note}' if note else ''}"
            )

    def lose(self, key: str, why: str) -> None:
        """What they do and we do not, where the option is given, asks for something, and is not told of yet."""
        if key not in self.given or key in self.told:
            return
        if any(self.given[key] == off and type(self.given[key]) is type(off) for off in OFF):
            self.meaningless[key] = "it is off"
        else:
            self.lost[key] = why

    def ignore(self, key: str, why: str) -> None:
        """What means nothing here, where it is not told of yet."""
        if key in self.given and key not in self.told:
            self.meaningless[key] = why

    def by_table(self, lost: Mapping[str, str], meaningless: Mapping[str, str]) -> None:
        """Why → names of options, apart by spaces."""
        for table, told in ((lost, self.lose), (meaningless, self.ignore)):
            for why, names in table.items():
                for name in names.split():
                    if name not in self.told:
                        told(name, why)

    @property
    def told(self) -> Collection[str]:
        """Options of which it is said what became of them."""
        return self.carried.keys() | self.meaningless.keys() | self.lost.keys()

    @property
    def unknown(self) -> list[str]:
        """Options that nobody has looked at."""
        return [key for key in self.given if key not in self.told]

    def config(self) -> Config:
        """Raises ConfigError where what was carried over makes no configuration."""
        return parse_config(self.tree, source=f"What {self.source} becomes")

    def written(self, known: Collection[str]) -> str:
        """The file, and what became of each option as a comment below it.

        Args:
            known: names of theirs, for a hint where one is misspelt.
        """
        sections = [name for name in Config.model_fields if name in self.tree]
        tree = {name: self.tree[name] for name in sections}
        lines = [f"# From {self.source}, a configuration of {self.whose}. What became of its options stands below."]
        lines += yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).splitlines()
        lines += _listed("Decided, as it is not said there or said otherwise", self.decided)
        lines += _listed("Not carried over", [self._with_value(key, why) for key, why in self.lost.items()])
        lines += _listed("Unknown", [self._hinted(key, known) for key in self.unknown])
        lines += _listed("Without meaning here", [self._with_value(key, why) for key, why in self.meaningless.items()])
        lines += _listed("Carried over", [f"{key} → {ours}" for key, ours in self.carried.items()])
        return "\n".join(lines) + "\n"

    def _with_value(self, key: str, why: str) -> str:
        if key not in self.given:  # a part of an option
            return f"{key}: {why}"
        return f"{self._shown(key)}: {why}"

    def _shown(self, key: str) -> str:
        """An option with its value, which may be a secret, and files are shared."""
        secret = _SECRET.search(key) is not None and self.given[key] is not None
        return f"{key}=…" if secret else f"{key}={_short(self.given[key])}"

    def _hinted(self, key: str, known: Collection[str]) -> str:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; is {near[0]} meant?" if near else ""
        return f"{self._shown(key)}: no option of {self.whose} that is known here{hint}"


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
    return text if len(text) <= 60 else f"{text[:57]}…"


def _listed(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield "#"
        yield f"# {title}:"
        for entry in entries:
            first, *more = textwrap.wrap(entry, _WIDTH, break_long_words=False)
            yield f"# - {first}"
            yield from (f"#   {line}" for line in more)
