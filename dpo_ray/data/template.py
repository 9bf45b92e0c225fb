"""Dialogues → text by a chat template, and text → ids, in which only the template writes control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from jinja2 import TemplateError

from dpo_ray.data.turns import Span, marks_turns
from dpo_ray.errors import DataError
from dpo_ray.pairs import Message


class Template:
    """A tokenizer and its chat template.

    Control tokens in a dialogue's own words are taken as text: what is rendered has guards in them, which encode knows.

    Args:
        arguments: given to the template by name, beside the messages and the tools.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        # Anew for each instance: it is slow to ask for.
        control = _control_tokens(tokenizer)
        self.control_ids = frozenset(control.values())
        spelled = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True) if token)
        self.control = re.compile(spelled or r"(?!)")
        """Matches control tokens as they are spelled; without any, it is nowhere found."""
        # Every place where one begins, also inside another.
        self._beginning = re.compile(f"(?=(?:{spelled or '(?!)'}))(.)", re.DOTALL)
        templates = getattr(tokenizer, "chat_template", None) or ""
        self.marks_turns = any(map(marks_turns, templates.values() if isinstance(templates, dict) else [templates]))
        """Whether the template marks what the assistant says."""

    def render(self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool) -> str:
        """A dialogue as the template writes it. Raises DataError where it refuses it."""
        with _refusals(messages):
            rendered: str = self.tokenizer.apply_chat_template(
                self.shown(messages),
                tools=None if tools is None else self._guarded_json(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.arguments,
            )
            return rendered

    def render_marked(
        self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """A dialogue as the template writes it, and where it marks what the assistant says. Raises DataError."""
        # Not by apply_chat_template: that one tells tokens alone, of a text without guards.
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals(messages):
            rendered: Any = render_jinja_template(
                conversations=[self.shown(messages)],
                tools=None if tools is None else self._guarded_json(tools),
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **self.arguments},
            )
            [whole], [spans] = rendered
            return whole, [(start, end) for start, end in spans]

    def shown(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as templates know them, with guards."""
        return [
            {
                "role": message["role"],
                "content": self.guarded(message["content"]),
                **self._guarded_json(json.loads(message.get("more") or "{}")),
            }
            for message in messages
        ]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that were rendered, or cut out of such."""
        pieces = [text.split(_GUARD) for text in texts]
        if not pieces:
            return []
        encoded = self.tokenizer(
            list(chain.from_iterable(pieces)), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids = iter(encoded["input_ids"])
        return [list(chain.from_iterable(islice(ids, len(p)))) for p in pieces]

    def guarded(self, text: str) -> str:
        """A text in which no control token is spelled any more."""
        return self._beginning.sub(_GUARDED, text) if self.control.search(text) else text

    def _guarded_json(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.guarded(value)
        if isinstance(value, list):
            return [self._guarded_json(v) for v in value]
        if isinstance(value, dict):
            return {self.guarded(k): self._guarded_json(v) for k, v in value.items()}
        return value


# What Jinja raises, and what the Python in an expression does: "abc".index("z"), 1 / 0, a range over the sandbox's
# limit, a macro that calls itself.
_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


@contextmanager
def _refusals(messages: Sequence[Message]) -> Iterator[None]:
    """Raises DataError where the template refuses the messages, or cannot take what they hold."""
    try:
        yield
    except _FAULTS as error:
        raise DataError(
            f"The model's chat template refuses a dialogue of the roles {', '.join(m['role'] for m in messages)} "
            f"that begins with {messages[0]['content'][:60]!r}: {error}. Leave such dialogues out of the data, or "
            "name a template that takes them as model.chat_template."
        ) from error


# Stands inside whatever a message says that looks like a control token, from rendering to encoding: the text
# then stays text, and only the template opens and ends turns. Private-use characters, in an order nobody writes.
_GUARD = "\ue000\uf8ff\ue000"
_GUARDED = rf"\1{_GUARD}"


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text → id of the tokens that stand for structure, not for text."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return added | named
