"""Rules: functions, named in the configuration as module:function, that score completions.

A rule is called for each completion with the prompt, which is the text of the user's last turn, the completion, and
whether it is finished: whether the model ended it by itself instead of running into sampling.max_tokens. A parameter
of one of these names is given it, too: `answer`, the prompt's answer, text or None; `num_tokens` of the completion;
`logprob`, its summed log-prob in nats under the model that drew it, or None. The configuration's `arguments` are given
by name. It returns a finite number, larger being better, or named parts, whose sum is the score:

    def rule(prompt: str, completion: str, finished: bool, **arguments) -> float | dict[str, float]

With `batch: true` it is called with lists instead, one entry for each completion of a shard, and returns a list.
What an edit of it makes anew is told in dpo_ray.scoring.rule_source.
"""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from dpo_ray.config.reward import Rule
from dpo_ray.errors import ConfigError, RewardError
from dpo_ray.origin import own, places, short
from dpo_ray.scoring.scorer import Row, Scored

Function = Callable[..., Any]

_ALWAYS = ("prompt", "completion", "finished")
_ON_REQUEST = ("answer", "num_tokens", "logprob")


def load_function(name: str) -> Function:
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
        raise ConfigError(f"The reward {name} is not a function but {type(found).__name__}: name one of that module.")
    return found  # type: ignore[no-any-return]


def require_fitting(rule: Rule) -> None:
    """Raises ConfigError where the function cannot be imported, or cannot be called as the rule is."""
    function = load_function(rule.function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is built in nothing is known
        return
    for name in rule.arguments:
        if name in {*_ALWAYS, *_ON_REQUEST}:
            raise ConfigError(f"The reward {rule.function} is given `{name}` by each call: take it out of `arguments`.")
    given = dict(rule.arguments) | dict.fromkeys(_asked_for(function))
    try:
        signature.bind("", "", True, **given)
    except TypeError as error:
        named = ", ".join(rule.arguments) or "none"
        raise ConfigError(
            f"The reward {rule.function}{signature} cannot be called with prompt, completion and finished, and with "
            f"the arguments of the configuration ({named}): {error}. Give the function these parameters, or change "
            "`arguments`."
        ) from None


class RuleScorer:
    """Scores by a rule.

    Raises ConfigError where the function cannot be imported.
    """

    def __init__(self, rule: Rule):
        self._rule = rule
        self._function = load_function(rule.function)
        self._asked_for = _asked_for(self._function)

    def score(self, rows: Sequence[Row]) -> list[list[Scored]]:
        """Raises RewardError where the function raises, naming the completion and the line of its code, and where it
        gives something else than a finite real number or parts of them: None, text, an array, a tensor of one element.
        """
        places = [place for row in rows for place in _places(row)]
        values = iter(self._batch(places) if self._rule.batch else [self._one(place) for place in places])
        return [[next(values) for _ in row["completions"]] for row in rows]

    def _one(self, place: _Place) -> Scored:
        extra = {name: getattr(place, name) for name in self._asked_for}
        try:
            value = self._function(place.prompt, place.completion, place.finished, **extra, **self._rule.arguments)
        except ConfigError:  # of a rule of the library, which says what is wrong with its arguments
            raise
        except Exception as error:
            raise self._failed(error, str(place)) from error
        return self._scored(value, place)

    def _batch(self, places: list[_Place]) -> list[Scored]:
        if not places:
            return []
        given = [[getattr(place, name) for place in places] for name in _ALWAYS]
        extra = {name: [getattr(place, name) for place in places] for name in self._asked_for}
        try:
            values = list(self._function(*given, **extra, **self._rule.arguments))
        except ConfigError:
            raise
        except Exception as error:
            raise self._failed(error, f"{len(places)} completions at once, the first: {places[0]}") from error
        if len(values) != len(places):
            raise RewardError(
                f"The reward {self._rule.function} gave {len(values)} scores to {len(places)} completions. With "
                "batch: true it must give a list with one for each."
            )
        return [self._scored(value, place) for value, place in zip(values, places, strict=True)]

    def _scored(self, value: Any, place: _Place) -> Scored:
        parts = dict(value) if isinstance(value, Mapping) else {}
        numbers = list(parts.values()) if isinstance(value, Mapping) else [value]
        finite = [float(n) for n in numbers if isinstance(n, Real) and math.isfinite(float(n))]
        if not numbers or len(finite) < len(numbers):
            raise RewardError(
                f"The reward {self._rule.function} gave {short(repr(value))} ({type(value).__name__}) to {place}. It "
                "must give a finite number, or named parts that are; of a tensor or an array with one element that is "
                "its .item()."
            )
        return Scored(math.fsum(finite), dict(zip(parts, finite, strict=True)) if parts else {})

    def _failed(self, error: Exception, where: str) -> RewardError:
        what = short("".join(traceback.format_exception_only(error))).rstrip(".")
        return RewardError(
            f"The reward {self._rule.function} failed on {where}: {what}{_line(error, self._function)}. Mend it, and "
            "run the same command again: what is finished is kept. DPO_RAY_TRACEBACK=1 shows the whole traceback."
        )


class _Place(NamedTuple):
    """A completion, and what a rule is told of it."""

    prompt_id: str
    number: int
    prompt: str
    completion: str
    finished: bool
    answer: str | None
    num_tokens: int
    logprob: float | None

    def __str__(self) -> str:
        return (
            f"completion {self.number} of the prompt {self.prompt_id} ({self.prompt[:80]!r} → {self.completion[:80]!r})"
        )


def _places(row: Row) -> Iterator[_Place]:
    for number, completion in enumerate(row["completions"], start=1):
        yield _Place(
            row["prompt_id"],
            number,
            row["prompt"][-1]["content"],
            completion["text"],
            completion["finished"],
            row.get("answer"),
            completion["num_tokens"],
            completion["logprob"],
        )


def _asked_for(function: Function) -> list[str]:
    """What else it is given, by its parameters."""
    try:
        return [name for name in _ON_REQUEST if name in inspect.signature(function).parameters]
    except (TypeError, ValueError):
        return []


def _line(error: Exception, function: Function) -> str:
    """Where in the user's code it happened: `, at` file:line, and the calls that led there."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = own(traceback.extract_tb(error.__traceback__)[1:], code.co_filename if code else None)
    return f", at {places(frames)}" if frames else ""


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
