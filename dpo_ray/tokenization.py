"""Chat template → token ids of prompt, chosen and rejected.

The prompt is rendered and tokenized once and completions apart from it, so that the prompt's ids are the
same ids on both sides by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    text = whole[len(before) :] if whole.startswith(before) else _guarded(completion, _control_tokens(tokenizer))
    ids = _encode(tokenizer, text)
    control = set(_control_tokens(tokenizer).values())
    ends = [i for i, token in enumerate(ids) if token in control]
    return ids[: ends[-1] + 1] if ends else [*ids, tokenizer.eos_token_id]


# Stands inside whatever a message says that looks like a control token, from rendering to encoding: the text
# then stays text, and only the template opens and ends turns. Private-use characters, in an order nobody writes.
_GUARD = "\ue000\uf8ff\ue000"


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    control = _control_tokens(tokenizer)
    guarded = [{"role": m["role"], "content": _guarded(m["content"], control)} for m in messages]
    return tokenizer.apply_chat_template(guarded, tokenize=False, add_generation_prompt=add_generation_prompt)


def _encode(tokenizer: Any, text: str) -> list[int]:
    pieces = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(_GUARD))
    return [token for piece in pieces for token in piece]


def _guarded(text: str, control: Iterable[str]) -> str:
    for token in control:
        text = text.replace(token, token[:1] + _GUARD + token[1:])
    return text


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text → id of the tokens that stand for structure, not for text."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return added | named
