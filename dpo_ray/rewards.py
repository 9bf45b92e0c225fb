"""Reward functions for generated candidates.

A reward is any function `(prompt: str, completion: str, finished: bool) -> float`, named in the configuration
as module:function; higher is better. `prompt` is the text of the user's last turn, `finished` says whether the
model ended its answer by itself instead of running into generate.sampling.max_tokens. What an edit of it makes anew
is told in dpo_ray.reward_source.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from dpo_ray.errors import ConfigError, RewardError
from dpo_ray.origin import own, places, short

Reward = Callable[[str, str, bool], float]

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


def load_reward(name: str) -> Reward:
    """The function behind module:function. Raises ConfigError."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever the module itself does, as a program's argparse does
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        raise _not_there(name, str(error)) if is_missing else _failing(name, error) from error
    if found is None:
        raise _not_there(name, f"module {module!r} has no attribute {function!r}")
    if not callable(found):
        raise ConfigError(f"The reward {name} is not a function but {type(found).__name__}.")
    reward: Reward = found
    return reward


def _not_there(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"The reward {name} cannot be imported ({why}). Name it as module:function, and run where the module can be "
        "imported (in a job, ship it with the working directory)."
    )


def _failing(name: str, error: BaseException) -> ConfigError:
    what = short("".join(traceback.format_exception_only(error))).rstrip(".")
    frames = own(traceback.extract_tb(error.__traceback__)[1:])
    place = f", at {places(frames)}" if frames else ""
    return ConfigError(
        f"The reward {name} cannot be imported, for its module fails: {what}{place}. Mend it, and run the same command "
        "again; DPO_RAY_TRACEBACK=1 shows the whole traceback."
    )


def score_completions(name: str, reward: Reward, row: Mapping[str, Any]) -> list[float]:
    """What the reward gives to each completion of a row of candidates (dpo_ray.pairs.CANDIDATES).

    Args:
        name: as it is configured, for the errors.

    Raises RewardError where it raises, naming the completion and the line of its code, and where it gives something
    else than a finite real number: None, text, an array, a tensor even of one element.
    """
    question = row["prompt"][-1]["content"]
    scores = []
    for number, completion in enumerate(row["completions"], start=1):
        text, finished = completion["text"], completion["finished"]
        where = f"completion {number} of the prompt {row['prompt_id']} ({question[:80]!r} → {text[:80]!r})"
        try:
            value = reward(question, text, finished)
            score = float(value) if isinstance(value, Real) else math.nan
        except Exception as error:
            what = short("".join(traceback.format_exception_only(error))).rstrip(".")
            raise RewardError(
                f"The reward {name} failed on {where}: {what}{_place(error, reward)}. Mend it, and run the same "
                "command again: what is finished is kept. DPO_RAY_TRACEBACK=1 shows the whole traceback."
            ) from error
        if not math.isfinite(score):
            raise RewardError(
                f"The reward {name} gave {short(repr(value))} ({type(value).__name__}) to {where}. It must give a "
                "finite number; of a tensor or an array with one element that is its .item()."
            )
        scores.append(score)
    return scores


def _place(error: Exception, reward: Reward) -> str:
    """Where in the user's code it happened: `, at` file:line, and the calls that led there."""
    code = getattr(inspect.unwrap(reward), "__code__", None)
    frames = own(traceback.extract_tb(error.__traceback__)[1:], code.co_filename if code else None)
    return f", at {places(frames)}" if frames else ""


def brief_answer(prompt: str, completion: str, finished: bool) -> float:
    """How well a text answers in at most two complete sentences, without repetition, on the prompt: 0 to 1.

    The product of four factors, so that none can be traded for another:

    - complete: 1 where the answer ended by itself with a sentence's end, .5 where one of the two holds, else 0
    - brief: 1 up to two sentences, then 2/n for n of them; and 1 from 8 to 60 words, words/8 below, 60/words above
    - fresh: the share of its three-word sequences that are not repeats
    - on topic: .4 + .6 · the share of the prompt's content words that come back, full from one half on;
      and 0 below three words
    """
    words = [w.lower() for w in _WORD.findall(completion)]
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
