"""The section `tune`: what a sweep searches, how, and by what it tells trials apart."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator
from typing_extensions import TypeAliasType

from dpo_ray.config.section import Section

RangeKind = Literal["uniform", "loguniform", "integer"]


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    kind: RangeKind
    low: float
    high: float

    def written(self) -> dict[str, Any]:
        """As the YAML has it."""
        return {self.kind: [self.low, self.high]}


@dataclass(frozen=True)
class Choice:
    """One of several values. A mapping among them may hold distributions of its own, drawn where it is chosen."""

    options: tuple[Any, ...]

    def written(self) -> dict[str, Any]:
        return {"choice": [_written(option) for option in self.options]}


Distribution = Range | Choice

_KINDS = ("choice", *get_args(RangeKind))
_HOW = (
    "write {uniform: [low, high]}, {loguniform: [low, high]}, {integer: [low, high]}, {choice: [...]}, or the list of "
    "values alone"
)


def _is_distribution(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in _KINDS


_FOREIGN = {"normal", "lognormal", "randint", "lograndint", "quniform", "qloguniform", "grid_search", "int", "float"}
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6, without a point, as text."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _distribution(where: str, value: Any) -> Distribution:
    if isinstance(value, list | tuple):
        return _choice(where, value)
    if not _is_distribution(value):
        raise ValueError(f"tune.space: {where}: {value!r} is no distribution: {_HOW}")
    [(kind, content)] = value.items()
    if kind == "choice":
        return _choice(where, content)
    numbers = [_number(x) for x in content] if _is_list(content) else []
    if len(numbers) != 2 or not all(_is_finite(x) for x in numbers):
        raise ValueError(f"tune.space: {where}: {kind}: {content!r} is not two numbers: write {{{kind}: [low, high]}}")
    low, high = numbers
    if not low < high:
        raise ValueError(f"tune.space: {where}: {kind}: {content!r} does not rise: write the smaller number first")
    if kind == "loguniform" and not low > 0:
        raise ValueError(
            f"tune.space: {where}: {kind}: {content!r}: a logarithm needs numbers above 0; raise the lower end, or "
            "use uniform"
        )
    if kind == "integer" and not all(float(x).is_integer() for x in numbers):
        raise ValueError(
            f"tune.space: {where}: {kind}: {content!r} are not whole numbers: round them, or take uniform for an "
            "option that may have others"
        )
    return Range(kind, int(low) if kind == "integer" else float(low), int(high) if kind == "integer" else float(high))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _choice(where: str, options: Any) -> Choice:
    if not _is_list(options) or not options:
        raise ValueError(
            f"tune.space: {where}: a choice is a list of values, not {options!r}: write it as in {{choice: [1, 2]}}"
        )
    options = [_number(option) for option in options]
    for number, option in enumerate(options):
        if option in options[:number]:
            raise ValueError(f"tune.space: {where}: the choice has {option!r} twice: name it once")
    return Choice(tuple(_option(f"{where}[{number}]", option) for number, option in enumerate(options)))


def _option(where: str, value: Any) -> Any:
    if _is_distribution(value):
        return _distribution(where, value)
    if isinstance(value, Mapping):
        return {key: _option(f"{where}.{key}", inner) for key, inner in value.items()}
    return _number(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _written(value: Any) -> Any:
    if isinstance(value, Range | Choice):
        return value.written()
    if isinstance(value, Mapping):
        return {key: _written(inner) for key, inner in value.items()}
    return value


def _paths(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths, whether the file nests them or writes them out: -o tune.space.train.epochs=[1, 2] nests."""
    for key, value in space.items():
        path = f"{prefix}{key}"
        near = difflib.get_close_matches(str(key), _KINDS, n=1, cutoff=0.75)
        if prefix and key in _KINDS:
            others = ", ".join(str(other) for other in space if other != key)
            raise ValueError(f"tune.space: {prefix[:-1]}: {key} takes nothing beside it, and there is {others}: {_HOW}")
        if prefix and (near or key in _FOREIGN):
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"tune.space: {prefix[:-1]}: {key} is no distribution{meant}: {_HOW}")
        if isinstance(value, Mapping) and not _is_distribution(value) and value:
            yield from _paths(value, f"{path}.")
        else:
            yield path, value


def _space(value: Any) -> dict[str, Distribution]:
    if not isinstance(value, Mapping):
        raise ValueError(f"tune.space is a mapping of dotted paths to distributions, not {value!r}: {_HOW}")
    space: dict[str, Distribution] = {}
    for path, raw in _paths(value):
        if path in space:
            raise ValueError(f"tune.space names {path} twice, nested and with dots: leave one of them out")
        space[path] = raw if isinstance(raw, Range | Choice) else _distribution(path, raw)
    for path in space:
        for other in space:
            if other.startswith(f"{path}."):
                raise ValueError(
                    f"tune.space searches {path} as a whole and {other} in it: put the distribution of {other} into "
                    f"the options of {path}"
                )
    return space


class UniformRange(Section):
    """A number, each as likely as the next."""

    uniform: tuple[float, float]
    """Low and high, both included."""


class LogUniformRange(Section):
    """A number, each order of magnitude as likely as the next."""

    loguniform: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]]
    """Low and high, both included."""


class IntegerRange(Section):
    """A whole number."""

    integer: tuple[int, int]
    """Low and high, both included."""


class WrittenChoice(Section):
    """One of several values. The list alone is short for it."""

    choice: Annotated[list[Any], Field(min_length=1)]
    """Values, or whole sections, whose options may be distributions of their own."""


_Key = Annotated[str, WithJsonSchema({"type": "string", "pattern": rf"^(?!({'|'.join(_KINDS)})$)"})]
_Values = Annotated[list[Any], Field(min_length=1)]
Written = TypeAliasType(
    "Written", "dict[_Key, UniformRange | LogUniformRange | IntegerRange | WrittenChoice | _Values | Written]"
)
"""How the file has a search space, for the schema: dotted paths, or the sections that they go through."""

Space = Annotated[
    dict[str, Distribution],
    PlainValidator(_space, json_schema_input_type=Written),
    PlainSerializer(lambda space: {path: found.written() for path, found in space.items()}),
]

Measure = Literal["accuracy", "margin", "likelihood_drop", "chosen_logps"]
"""What compares trials: accuracy on held-out pairs (larger is better); their mean margin without β, in nats (larger);
by how much the chosen answers have become less likely than under the reference, in nats (smaller); log-likelihood of
the chosen answers, in nats (larger)."""

_REFUSED = {
    **dict.fromkeys(
        ("loss", "eval_loss"),
        "a loss is of another kind and size for each loss and each β, so it would rank these, not the policies",
    ),
    **dict.fromkeys(
        ("rewards/margins", "eval_rewards/margins", "margins", "eval_margins"),
        "it is β times the margin, so the largest β would win by its size; the margin without β is called margin",
    ),
    **dict.fromkeys(
        ("rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected"),
        "rewards are β times log-ratios, so the largest β would win by its size",
    ),
    **dict.fromkeys(("rewards/accuracies", "eval_rewards/accuracies"), "it is called accuracy here"),
}


def _rank_by(value: Any) -> Any:
    known = get_args(Measure)
    if isinstance(value, dict):
        value = {name: _number(weight) for name, weight in value.items()}
    for name in value if isinstance(value, list | tuple | dict) else [value]:
        if name not in known:
            reason = _REFUSED.get(name, "there is no such measure") if isinstance(name, str) else "it is no name"
            raise ValueError(
                f"tune.rank_by={name}: {reason}. Rank by one of {', '.join(known)}, by a weighted sum of them, as in "
                "{accuracy: 1.0, likelihood_drop: 0.001}, or by a list of several objectives"
            )
    for name, weight in value.items() if isinstance(value, dict) else ():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(
                f"tune.rank_by={{{name}: {weight}}}: a weight is a number above 0; each measure counts in its own "
                "direction, so a drop in likelihood is bad with a positive weight"
            )
    return value


RankBy = Annotated[
    Measure | dict[Measure, float] | tuple[Measure, ...],
    BeforeValidator(_rank_by),
]


class FIFO(Section):
    type: Literal["fifo"]
    """Every trial trains to its end."""


class ASHA(Section):
    type: Literal["asha"]
    """Asynchronous successive halving (arXiv:1810.05934): at ever later steps, only the best go on."""
    grace_steps: int | None = Field(None, ge=1)
    """Steps that every trial may train; left out: to its first evaluation."""
    reduction_factor: float = Field(3.0, gt=1.0)
    """Of so many trials one goes on; the next decision is so many times later."""


class MedianStopping(Section):
    type: Literal["median"]
    """A trial ends whose best result so far is below the median of the others' running means."""
    grace_steps: int | None = Field(None, ge=1)
    """Steps that every trial may train; left out: to its first evaluation."""
    min_trials: int = Field(3, ge=2)
    """Others that must have come as far before a trial can be ended."""


_POPULATION = {"pbt", "pb2", "population"}


def _scheduler(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, Mapping) else value
    if isinstance(kind, str) and kind.lower() in _POPULATION:
        raise ValueError(
            f"tune.scheduler.type={kind}: population-based training has a trial go on with another one's weights and "
            "other options from the middle of its training. Ray Tune carries these as checkpoints of its own, while a "
            "trial's are Ray Train's; and no configuration would make the resulting model again, so best.yaml could "
            "not. Use asha or median, and search the schedule's own options (train.schedule, train.warmup_fraction)"
        )
    return {"type": value} if isinstance(value, str) else value


_Scheduler = Annotated[FIFO | ASHA | MedianStopping, Field(discriminator="type")]
Scheduler = Annotated[
    _Scheduler,
    BeforeValidator(_scheduler, json_schema_input_type=Literal["fifo", "asha", "median"] | _Scheduler),
]


class RepeatBest(Section):
    """The best trials once more, for their luck with a seed to even out."""

    k: int = Field(3, ge=1)
    """So many of the best trials are trained again."""
    seeds: int = Field(2, ge=1)
    """With so many other seeds each. The model is chosen by the mean over all of its seeds."""


class Tune(Section):
    """What a sweep searches, and how it tells trials apart."""

    space: Space = Field(default_factory=dict)
    """Dotted path → distribution: a range, or a choice of values or of whole sections, which may hold distributions."""
    beta: tuple[float, ...] | None = Field(None, min_length=1)
    """Short for the choice of train.loss.beta in `space`."""
    learning_rate: tuple[float, ...] | None = Field(None, min_length=1)
    """Short for the choice of train.learning_rate in `space`."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid: all combinations. random: independent draws. tpe: Optuna's tree-structured Parzen estimator, which draws
    where earlier trials were good, for one objective or several."""
    num_trials: int | None = Field(None, ge=1)
    """Trials of random and tpe, in all; a larger number goes on with the sweep. A grid has as many as it has points."""
    rank_by: RankBy = "accuracy"
    """The measure that decides; a mapping of measures to weights above 0, each of which counts in its own direction,
    and which are added up; or a list, for several objectives at once: the Pareto front is reported, and the first one
    chooses from it."""
    scheduler: Scheduler = FIFO(type="fifo")
    """Which trials are ended before their last step."""
    ranked_fraction: float = Field(0.5, gt=0.0, lt=1.0)
    """Share of the held-out prompts, by their hash, that trials are measured and ranked on. The model that is chosen is
    judged on the others, which had no part in choosing it."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials that train at the same time; left out: as many as the cluster has room for."""
    max_failures: int = Field(1, ge=0)
    """How often a trial that failed is tried again, from its last checkpoint."""
    repeat_best: RepeatBest | None = None
    """Train the best trials again with other seeds, and choose by their means; left out: by one training each."""
    keep_models: int = Field(3, ge=1)
    """The models of so many of the best trials stay; those that the sweep has trained besides are removed."""

    def searched(self) -> dict[str, Distribution]:
        """The space, with what is short for a part of it."""
        short = {"train.loss.beta": self.beta, "train.learning_rate": self.learning_rate}
        return {**self.space, **{path: Choice(values) for path, values in short.items() if values is not None}}

    def objectives(self) -> tuple[dict[Measure, float], ...]:
        """Each a weighted sum of measures."""
        if isinstance(self.rank_by, dict):
            return (self.rank_by,)
        names = (self.rank_by,) if isinstance(self.rank_by, str) else self.rank_by
        return tuple({name: 1.0} for name in names)

    @model_validator(mode="after")
    def _combinations(self) -> Tune:
        for path, values in (("train.loss.beta", self.beta), ("train.learning_rate", self.learning_rate)):
            short = f"tune.{path.rpartition('.')[2]}"
            if values is not None and path in self.space:
                raise ValueError(f"{short} and tune.space both have values for {path}: leave one of them out")
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"{short}={list(values)} has a value twice: name each once")
            if values is not None and path == "train.loss.beta" and "train.loss" in self.space:
                raise ValueError(
                    f"{short} goes with one loss, and tune.space searches train.loss: put beta into its options"
                )
        if not self.searched():
            raise ValueError(
                "tune names nothing to search: give tune.space, as in {train.learning_rate: {loguniform: [1.0e-7, "
                "1.0e-5]}}, or the lists tune.beta and tune.learning_rate"
            )
        if self.search == "grid" and self.num_trials is not None:
            raise ValueError(
                f"tune.num_trials={self.num_trials} goes with tune.search=random or tpe: a grid has as many trials as "
                "it has points. Leave it out"
            )
        if self.search != "grid" and self.num_trials is None:
            raise ValueError(
                f"tune.search={self.search} needs tune.num_trials: set it to the number of trials, as in "
                "tune.num_trials=20"
            )
        if isinstance(self.rank_by, dict) and not self.rank_by:
            raise ValueError(
                "tune.rank_by names no measure: name one, as in accuracy, or several with weights, as in {accuracy: "
                "1.0}"
            )
        if isinstance(self.rank_by, tuple) and (len(self.rank_by) < 2 or len(set(self.rank_by)) < len(self.rank_by)):
            raise ValueError(
                f"tune.rank_by={list(self.rank_by)}: a list is for several objectives; name two different ones at "
                "least, or one without a list"
            )
        return self
