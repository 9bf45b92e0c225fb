"""Rules that score completions, for the configuration's `function: dpo_ray.rewards:NAME`.

How a rule is called is told in dpo_ray.scoring.rule. Unless its docstring says otherwise, a rule here gives 0 to 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any, Literal

from dpo_ray.errors import ConfigError

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|approx|[A-Z])\.$")
_FUNCTION_WORDS = """
a about an and any are as at be been before between but by can could describe did do does each explain for
from get give had has have how i if in into is it its just keep kind make many me more most much my name need
of on one only or other our out people person reason same should simple so some someone something such suggest
tell than that the their them then there these they thing this to two up us use used was way we were what when
where which while who why will with would you your
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


def brief_answer(prompt: str, completion: str, finished: bool) -> float:
    """How well a text answers in at most two complete sentences, without repetition, on the prompt: 0 to 1.

    The product of four factors, so that none can be traded for another:

    - complete: 1 where the answer ended by itself with a sentence's end, .5 where one of the two holds, else 0
    - brief: 1 up to two sentences, then 2/n for n of them; and 1 from 8 to 60 words, words/8 below, 60/words above
    - fresh: the share of its three-word sequences that are not repeats
    - on topic: .4 + .6 · the share of the prompt's content words that come back, full from one half on;
      and 0 below three words
    """
    words = _words(completion)
    if len(words) < 3:
        return 0.0
    complete = (0.5 if finished else 0.0) + (0.5 if re.search(r"[.!?][\"'”’)\]]*$", completion.strip()) else 0.0)
    sentences = len(split_sentences(completion))
    brief = min(1.0, 2 / sentences) * min(1.0, len(words) / 8, 60 / len(words))
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    fresh = len(set(trigrams)) / len(trigrams)
    return complete * brief * fresh * (0.4 + 0.6 * min(1.0, 2 * topic_overlap(prompt, completion)))


def split_sentences(text: str) -> list[str]:
    """Sentences, a line break ending one too: a list item counts as a sentence."""
    sentences: list[str] = []
    for line in text.splitlines():
        of_line: list[str] = []
        for piece in filter(None, _SENTENCE_END.split(line.strip())):
            if of_line and _goes_on(of_line[-1], piece):
                of_line[-1] = f"{of_line[-1]} {piece}"
            else:
                of_line.append(piece)
        sentences += of_line
    return sentences


def _goes_on(before: str, after: str) -> bool:
    """Whether the full stop between two pieces ends no sentence: an abbreviation, a list's number, "No. 5"."""
    number = re.fullmatch(r"\d+\.", before) or (before.endswith("No.") and after[:1].isdigit())
    return bool(number or _ABBREVIATION.search(before))


def topic_overlap(prompt: str, completion: str) -> float:
    """Share of the prompt's content words found in the completion, by their first five letters; 1 if it has none."""
    wanted = {_stem(w) for w in _WORD.findall(prompt) if w.lower() not in _STOP_WORDS}
    if not wanted:
        return 1.0
    present = {_stem(w) for w in _WORD.findall(completion)}
    return len(wanted & present) / len(wanted)


def _stem(word: str) -> str:
    return word.lower().removesuffix("s")[:5]


def length_window(
    prompt: str,
    completion: str,
    finished: bool,
    *,
    at_least: int = 0,
    at_most: int | None = None,
    unit: Literal["words", "sentences", "characters"] = "words",
) -> float:
    """1 for a length from `at_least` to `at_most`, both included; below, length / at_least; above, at_most / length."""
    counted = {"words": _words, "sentences": split_sentences, "characters": str.strip}
    if unit not in counted:
        raise ConfigError(f"length_window: unit={unit!r} is not known: name one of {', '.join(counted)}.")
    length = len(counted[unit](completion))  # type: ignore[operator]
    if length < at_least:
        return length / at_least
    return 1.0 if at_most is None or length <= at_most else at_most / length


def fresh(prompt: str, completion: str, finished: bool, *, n: int = 3) -> float:
    """The share of its sequences of n words that are not repeats; 1 for less than n words."""
    words = _words(completion)
    sequences = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(sequences)) / len(sequences) if sequences else 1.0


def likely(prompt: str, completion: str, finished: bool, num_tokens: int, logprob: float | None) -> float:
    """The geometric mean of its tokens' probabilities under the model that drew it: fluent nonsense is unlikely.

    For candidates of one model. Raises ConfigError where the log-prob is not known.
    """
    if logprob is None:
        raise ConfigError(f"likely: the completion {completion[:80]!r} has no log-prob: use it on what vLLM drew.")
    return math.exp(logprob / num_tokens) if num_tokens else 0.0


def is_json(prompt: str, completion: str, finished: bool, *, keys: Sequence[str] = (), fenced: bool = False) -> float:
    """1 for one JSON value and nothing else; with `keys`, for an object that has them all.

    fenced: it may stand in a Markdown block of code.
    """
    text = completion.strip()
    if fenced and (block := re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.S)):
        text = block[1]
    try:
        value = json.loads(text)
    except ValueError:
        return 0.0
    return float(not keys or (isinstance(value, dict) and set(keys) <= value.keys()))


def matches(prompt: str, completion: str, finished: bool, *, pattern: str, whole: bool = False) -> float:
    """1 where the regular expression is found; whole: where it is all of the completion, but for outer white space."""
    text = completion.strip()
    return float(bool(re.fullmatch(pattern, text, re.S) if whole else re.search(pattern, text)))


def without_words(prompt: str, completion: str, finished: bool, *, words: Sequence[str]) -> float:
    """1 where none of these words or phrases occurs, whatever the case."""
    return float(not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", completion, re.I) for word in words))


def in_language(prompt: str, completion: str, finished: bool, *, language: str) -> float:
    """The probability that it is written in a language, named by its code of two letters (ISO 639-1).

    By py3langid, of the extra dpo-ray[language].
    """
    ranked = dict(_language_identifier().rank(completion))
    if language not in ranked:
        raise ConfigError(f"in_language: language={language!r} is not known: name one of {', '.join(sorted(ranked))}.")
    return float(ranked[language])


def exact_answer(
    prompt: str, completion: str, finished: bool, answer: str | None, *, pattern: str | None = None
) -> float:
    """1 where it equals the prompt's answer, but for case, white space and a full stop at the end.

    pattern: a regular expression whose last match is compared instead, or that match's first group, if it has one.
    """
    expected = _required(answer, prompt)
    if pattern is not None:
        found = list(re.finditer(pattern, completion))
        if not found:
            return 0.0
        completion = found[-1][1] if found[-1].re.groups else found[-1][0]
    return float(_normal(completion) == _normal(expected))


def numeric_answer(
    prompt: str, completion: str, finished: bool, answer: str | None, *, tolerance: float = 0.0
) -> float:
    """1 where its last number is the last number of the prompt's answer, or nearer to it than `tolerance`."""
    expected = _last_number(_required(answer, prompt))
    if expected is None:
        raise ConfigError(
            f"numeric_answer: there is no number in the answer {answer!r} of the prompt {prompt[:80]!r}. Write one "
            "into that row's `answer`, or take exact_answer for answers in words."
        )
    found = _last_number(completion)
    return float(found is not None and abs(found - expected) <= Decimal(str(tolerance)))


@cache
def _language_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("in_language needs py3langid: install dpo-ray[language].") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _required(answer: str | None, prompt: str) -> str:
    if answer is None:
        raise ConfigError(
            f"The prompt {prompt[:80]!r} has no answer to compare with: give each row of the prompts an `answer`."
        )
    return answer


def _normal(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
