"""Chat template → token ids of prompt, chosen and rejected.

The prompt is rendered and tokenized once and completions apart from it, so that the prompt's ids are the
same ids on both sides by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_ray.artifacts import digest
from dpo_ray.errors import ConfigError
from dpo_ray.pairs import Message


def require_chat_template(tokenizer: Any, model_path: str) -> None:
    """Raises ConfigError where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"The model {model_path} has no chat template, so it is not known how its dialogues are written. Use the "
            "instruction-tuned variant of the model, or add a chat_template.jinja to its folder."
        )


def tokenizer_identity(tokenizer: Any) -> str:
    """Digest of what turns a dialogue into ids: vocabulary and merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(
        [
            backend.to_str() if backend is not None else tokenizer.get_vocab(),
            {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            tokenizer.chat_template,
        ]
    )


def prompt_ids(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    """Ids of a dialogue up to the point where the assistant is to speak; special tokens come from the template."""
    return _encode(tokenizer, _render(tokenizer, prompt, add_generation_prompt=True))


def completion_ids(tokenizer: Any, prompt: Sequence[Message], completion: str) -> list[int]:
    """Ids of the assistant's answer with its end-of-turn token.

    What the template writes after the end of the turn (a newline, mostly) is left out: a model that stops at
    the end of its turn never generates it.
    """
    before = _render(tokenizer, prompt, add_generation_prompt=True)
    turn = Message(role="assistant", content=completion)
    whole = _render(tokenizer, [*prompt, turn], add_generation_prompt=False)
    # Some templates rewrite earlier turns or strip the answer; then the answer is taken as it stands.
    text = whole[len(before) :] if whole.startswith(before) else completion
    ids = _encode(tokenizer, text)
    end = tokenizer.eos_token_id
    if end in ids:
        return ids[: len(ids) - ids[::-1].index(end)]
    return [*ids, end]


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
