"""Chat template → token ids of prompt, chosen and rejected, and which of them bear the loss.

The prompt is rendered and tokenized once and completions apart from it, so that the prompt's ids are the
same ids on both sides by construction. An answer of several turns is tokenized in parts, each of the assistant's turns
and what stands between two of them, so that no token belongs to both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray.config import Data, LongPrompts, LossTurns
from dpo_ray.data.dialogues import num_shared
from dpo_ray.data.template import Template
from dpo_ray.data.turns import Span, found_turns, marked_turns, require_calls_written
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.pairs import Answer, Message


def require_chat_template(tokenizer: Any, model_path: str) -> None:
    """Raises ConfigError where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise missing_template(model_path)


def missing_template(model_path: str) -> ConfigError:
    """The error about a model without chat template."""
    return ConfigError(
        f"The model {model_path} has no chat template, so it is not known how its dialogues are written. Use the "
        "instruction-tuned variant of the model, or name a file with its template as model.chat_template."
    )


def require_prompt_room(chat: ChatTokenizer, data: Data) -> None:
    """Raises ConfigError where prompts are to be cut to a limit that leaves nothing of them."""
    if data.long_prompts != "drop":
        [shortest] = chat.prompts([([Message(role="user", content="?")], None)])
        chat.closing_within(shortest, data.max_prompt_tokens)


def prompt_ids(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    """Ids of one dialogue; see ChatTokenizer.prompts."""
    return ChatTokenizer(tokenizer).prompts([(prompt, None)])[0].ids


def completion_ids(tokenizer: Any, prompt: Sequence[Message], completion: str) -> list[int]:
    """Ids of one answer; see ChatTokenizer.completions."""
    chat = ChatTokenizer(tokenizer)
    return chat.completions([(chat.prompts([(prompt, None)])[0], completion)])[0].ids


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to the point where the assistant is to speak."""

    messages: Sequence[Message]
    tools: list[Any] | None
    """JSON schemas of the functions that the assistant may call; None: the dialogue names none."""
    text: str
    """As the template writes it."""
    ids: list[int]


@dataclass(frozen=True)
class Completion:
    """The assistant's answer to a prompt."""

    text: str
    """What the template writes after the prompt."""
    ids: list[int]
    """With the end-of-turn token as the last one, so never empty."""
    foreign_control_token: bool
    """Whether the answer spells a control token, or more of them are among the ids than the template writes."""
    mask: list[bool] | None = None
    """Which of the ids bear the loss, some at least; None: all of them."""


@dataclass(frozen=True)
class Written:
    """The assistant's answer to a prompt, as the template writes it after the prompt."""

    answer: Answer
    parts: Sequence[tuple[str, bool]]
    """Texts in order, and whether each bears the loss; one of them does."""

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


class ChatTokenizer:
    """A tokenizer and its chat template: dialogues → ids, many at a time.

    Control tokens in a dialogue's own words are taken as text: only the template opens and ends turns.

    Args:
        template_arguments: given to the template by name, beside the messages and the tools.
    """

    def __init__(self, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, template_arguments)
        self.control_ids = self.template.control_ids

    def prompts(self, dialogues: Sequence[tuple[Sequence[Message], list[Any] | None]]) -> list[Prompt]:
        """Dialogues, each with its tools or None, up to the point where the assistant is to speak.

        Special tokens come from the template alone. Raises DataError where the template refuses a dialogue.
        """
        texts = [self.template.render(messages, tools, add_generation_prompt=True) for messages, tools in dialogues]
        ids = self.template.encode(texts)
        return [Prompt(*dialogue, text, i) for dialogue, text, i in zip(dialogues, texts, ids, strict=True)]

    def dialogues(self, dialogues: Sequence[tuple[Sequence[Message], list[Any] | None]]) -> list[list[int]]:
        """The ids of whole dialogues, each with its tools or None, as the template writes them.

        Raises DataError where the template refuses one.
        """
        return self.template.encode(
            [self.template.render(messages, tools, add_generation_prompt=False) for messages, tools in dialogues]
        )

    def completions(self, answers: Sequence[tuple[Prompt, str]]) -> list[Completion]:
        """Answers of one turn to prompts, each with its end-of-turn token, all of it with the loss.

        What the template writes after the end of the turn (a newline, mostly) is left out: a model that stops at
        the end of its turn never generates it.

        Raises DataError where the template refuses a dialogue, ConfigError where nothing can end a turn.
        """
        return self.encoded([self._text_alone(prompt, answer) for prompt, answer in answers])

    def write(self, prompt: Prompt, answers: Sequence[Answer], loss: LossTurns) -> tuple[Prompt, list[Written]] | None:
        """One or two answers to a prompt as the template writes them; only the assistant's turns bear the loss.

        Of turns that both answers begin with, none does. Where the template writes the prompt otherwise before these
        answers than alone, as it does where it leaves out what was reasoned before the user's last words, the prompt
        that is returned is the one before the answers. None: it writes it otherwise before the one than before the
        other.

        Args:
            loss: which of the other turns bear it.

        Raises DataError where the template refuses a dialogue, or where its turns cannot be told.
        """
        if not self.template.marks_turns and all(isinstance(answer, str) for answer in answers):
            return prompt, [self._text_alone(prompt, answer) for answer in answers if isinstance(answer, str)]
        shared = num_shared(answers)
        found = [self._turns(prompt, answer, shared, loss) for answer in answers]
        if not all(whole.startswith(prompt.text) for whole, _ in found):
            before = min((whole[: min(spans)[0]] for whole, spans in found), key=len)
            if not all(whole.startswith(before) for whole, _ in found):
                return None
            prompt = replace(prompt, text=before, ids=self.template.encode([before])[0])
        return prompt, [
            Written(answer, _parts(whole, spans, len(prompt.text)))
            for answer, (whole, spans) in zip(answers, found, strict=True)
        ]

    def encoded(self, answers: Sequence[Written]) -> list[Completion]:
        """Answers as ids, each up to its last end-of-turn token, or with one where the template writes none.

        Raises ConfigError where nothing can end a turn.
        """
        ids = iter(self.template.encode([text for answer in answers for text, _ in answer.parts]))
        return [
            self._completion(answer, [(next(ids), bears_loss) for _, bears_loss in answer.parts]) for answer in answers
        ]

    def fit_prompt(self, prompt: Prompt, limit: int, policy: LongPrompts) -> list[int] | None:
        """The ids of a prompt within a number of tokens, or None where a longer one is to be dropped.

        keep_start: its first tokens, and then what the template writes after the user's last words, so that the
        user's turn still ends and the assistant's begins. keep_end: its last tokens, after the BOS where there was one.

        Raises ConfigError where the limit leaves nothing of the dialogue.
        """
        ids = prompt.ids
        if len(ids) <= limit:
            return ids
        if policy == "drop":
            return None
        closing = self.closing_within(prompt, limit)
        if policy == "keep_start":
            return ids[: limit - len(closing)] + closing
        bos = self._bos(ids)
        end = ids[len(bos) - limit :]
        return end if bos and end[:1] == bos else bos + end

    def closing_within(self, prompt: Prompt, limit: int) -> list[int]:
        """Ids of what the template writes after the user's last words: the end of that turn, the assistant's opening.

        Raises ConfigError where they cannot be told, or where they, a BOS and one token more are over the limit.
        """
        closing = self.template.encode([self._closing(prompt)])[0]
        smallest = len(self._bos(prompt.ids)) + 1 + len(closing)
        if limit < smallest:
            raise ConfigError(
                f"data.max_prompt_tokens is {limit}, but the model's chat template writes {smallest - 1} tokens around "
                f"the user's words, so that nothing would be left of a prompt that is cut. Set it to {smallest} at the "
                "very least, or set data.long_prompts=drop."
            )
        return closing

    def merges_at_boundary(self, turns: Sequence[tuple[Prompt, Completion]]) -> list[bool]:
        """Whether a prompt and its completion, tokenized together, would have other ids where they meet.

        A tokenizer merges characters that often stand together: after a prompt that ends in a newline, an answer that
        begins with one may share a token with it. Trained on are the ids apart, on purpose: the boundary then lies
        between two tokens, both completions follow the very same prompt, and these are the ids that a model continues
        when it is asked. Where such merges are many, though, the model meets ids that it rarely saw before.

        Judged by the text from the prompt's last control token on (tokenizers never merge across one) and by the
        completion's first characters: a few tokens a turn.
        """
        tails = [self._tail(prompt.text) for prompt, _ in turns]
        heads = [completion.text[:_HEAD] for _, completion in turns]
        both = [tail + head for tail, head in zip(tails, heads, strict=True)]
        texts = list(dict.fromkeys([*tails, *heads, *both]))
        ids = dict(zip(texts, self.template.encode(texts), strict=True))
        return [ids[t] + ids[h] != ids[b] for t, h, b in zip(tails, heads, both, strict=True)]

    def uses_tools(self, prompt: Prompt) -> bool:
        """Whether the template writes anything for the prompt's tools."""
        return self.template.render(prompt.messages, None, add_generation_prompt=True) != prompt.text

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether ids begin with two BOS tokens."""
        return len(self._bos(ids)) == 1 and len(self._bos(ids[1:])) == 1

    def ends_twice(self, ids: Sequence[int]) -> bool:
        """Whether ids end with two control tokens, with nothing but white space between them."""
        ends = [i for i in range(len(ids)) if ids[i] in self.control_ids]
        if len(ends) < 2 or ends[-1] != len(ids) - 1:
            return False
        return not self.tokenizer.decode(ids[ends[-2] + 1 : -1]).strip()

    def _text_alone(self, prompt: Prompt, answer: str) -> Written:
        turn = Message(role="assistant", content=answer)
        whole = self.template.render([*prompt.messages, turn], prompt.tools, add_generation_prompt=False)
        # Some templates rewrite earlier turns or strip the answer; then the answer is taken as it stands.
        text = whole[len(prompt.text) :] if whole.startswith(prompt.text) else self.template.guarded(answer)
        return Written(answer, [(text, True)])

    def _turns(self, prompt: Prompt, answer: Answer, shared: int, loss: LossTurns) -> tuple[str, dict[Span, bool]]:
        """The dialogue with an answer as the template writes it, and where in it the assistant's turns of the answer
        stand, each with whether it bears the loss."""
        turns = [Message(role="assistant", content=answer)] if isinstance(answer, str) else list(answer)
        messages, first = [*prompt.messages, *turns], len(prompt.messages)
        if self.template.marks_turns:

            def num_marks(some: Sequence[Message]) -> int:
                return len(self.template.render_marked(some, prompt.tools, add_generation_prompt=True)[1])

            whole, marks = self.template.render_marked(messages, prompt.tools, add_generation_prompt=False)
            spoken = marked_turns(num_marks, messages, first, whole, marks, self.template.control)
        else:

            def render(some: Sequence[Message], *, opened: bool) -> str:
                return self.template.render(some, prompt.tools, add_generation_prompt=opened)

            whole = render(messages, opened=False)
            spoken = [
                [span] for span in found_turns(render, messages, first, prompt.text, whole, self.template.control)
            ]
        require_calls_written(messages, first, whole, spoken)
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        bears = [place >= shared and (loss == "all" or place == places[-1]) for place in places]
        return whole, {span: bear for spans, bear in zip(spoken, bears, strict=True) for span in spans}

    def _completion(self, answer: Written, parts: list[tuple[list[int], bool]]) -> Completion:
        *others, (ids, bears_loss) = parts
        ends = [i for i, token in enumerate(ids) if token in self.control_ids]
        if ends:
            others.append((ids[: ends[-1] + 1], bears_loss))
        elif not bears_loss and others and self.control_ids & {*others[-1][0][-1:]}:
            pass  # what the template writes after the end of the turn
        elif self.tokenizer.eos_token_id is not None:
            others.append(([*ids, self.tokenizer.eos_token_id], bears_loss))
        else:
            raise ConfigError(
                "The model's chat template writes no control token after the assistant's turn, and its tokenizer has "
                "no eos_token, so it is not known how an answer ends. Name an eos_token in its tokenizer_config.json."
            )
        whole = [token for part, _ in others for token in part]
        mask = None if all(bears for _, bears in others) else [bears for part, bears in others for _ in part]
        spelled = any(self.template.control.search(text) for text in _said(answer.answer))
        number = len(ends) + sum(token in self.control_ids for part, _ in parts[:-1] for token in part)
        foreign = spelled or (number > 1 and number > len(self.template.control.findall(answer.text)))
        return Completion(answer.text, whole, foreign, mask)

    def _closing(self, prompt: Prompt) -> str:
        *earlier, last = prompt.messages
        probe = [*earlier, Message(role=last["role"], content=_MARK, more=last.get("more"))]
        rendered = self.template.render(probe, prompt.tools, add_generation_prompt=True)
        _, mark, closing = rendered.rpartition(_MARK)
        if mark and prompt.text.endswith(closing):
            return closing
        # The template rewrites what the user says, or closes by it; what opens the assistant's turn may still be told.
        unopened = self.template.render(prompt.messages, prompt.tools, add_generation_prompt=False)
        if prompt.text.startswith(unopened) and len(unopened) < len(prompt.text):
            return prompt.text[len(unopened) :]
        raise ConfigError(
            "The model's chat template does not let tell the user's words from what it writes around them, so long "
            "prompts cannot be cut. Set data.long_prompts=drop."
        )

    def _bos(self, ids: Sequence[int]) -> list[int]:
        """The BOS that ids begin with, or nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and ids[:1] == [bos] else []

    def _tail(self, text: str) -> str:
        text = text[-_TAIL:]
        places = [found.start() for found in self.template.control.finditer(text)]
        return text[places[-1] :] if places else text


def _parts(whole: str, spans: Mapping[Span, bool], start: int) -> list[tuple[str, bool]]:
    """What stands behind `start` in a dialogue, in parts that bear the loss and parts that do not.

    spans: where the assistant's turns stand, and whether each bears it.
    """
    parts: list[tuple[str, bool]] = []
    for (begin, end), bears_loss in sorted(spans.items()):
        begin = max(begin, start)
        parts += [(whole[start:begin], False), (whole[begin:end], bears_loss)]
        start = end
    return [part for part in [*parts, (whole[start:], False)] if part[0]]


def _said(answer: Answer) -> list[str]:
    """All that is said in an answer."""
    if isinstance(answer, str):
        return [answer]
    return [text for turn in answer for text in (turn["content"], turn.get("more") or "")]


_TOOLS = "Write it as a list of JSON schemas, one for each tool, or leave that column out of the data."


def parse_tools(tools: str | None) -> list[Any] | None:
    """The tools of a row of pairs, from JSON text. Raises DataError."""
    if tools is None:
        return None
    try:
        parsed = json.loads(tools)
    except ValueError as error:
        raise DataError(f"The column tools holds {tools[:60]!r}, which is not JSON ({error}). {_TOOLS}") from error
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise DataError(f"The column tools holds {tools[:60]!r}, which is not a list of JSON schemas. {_TOOLS}")
    return parsed


# Stands for the user's words where only what is written around them is asked for.
_MARK = "\ue000\uf8ff\ue001"

# Characters of the prompt's end and of the completion's beginning that decide whether they would merge.
_TAIL, _HEAD = 64, 16
