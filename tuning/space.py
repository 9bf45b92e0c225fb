"""The search space: what may be searched, how a point is drawn from it, and the configuration of a point.

A point is a flat mapping of names to plain values. A name is a dotted path; a value inside of an option that was chosen
has the option's label in its name, as in train.loss[ipo].beta, for the same path may be drawn from another distribution
in another option.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, product
from typing import Any, Protocol

from dpo_ray.config import Config, parse_config
from dpo_ray.config.load import put
from dpo_ray.config.tune import Choice, Distribution, Range
from dpo_ray.errors import ConfigError

Point = dict[str, Any]

_MOST_POINTS = 10_000
_MOST_COMBINATIONS = 512  # that are tried before the search, after each path alone


class Draw(Protocol):
    """Where values come from."""

    def number(self, name: str, found: Range) -> float | int: ...

    def label(self, name: str, labels: list[str]) -> str: ...


class Given:
    """The values of a point."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def number(self, name: str, found: Range) -> float | int:
        value: float | int = self.point[name]
        return value

    def label(self, name: str, labels: list[str]) -> str:
        return str(self.point[name])


def drawn(space: Mapping[str, Distribution], draw: Draw) -> dict[str, Any]:
    """Path → value, each drawn."""
    return {path: _value(path, found, draw) for path, found in space.items()}


def labels(choice: Choice) -> list[str]:
    """What options are called in points: a number or a word as itself, a section by its type if that tells it apart."""
    types = Counter(kind for option in choice.options if (kind := _type_of(option)) is not None)
    found = []
    for option in choice.options:
        kind = _type_of(option)
        if kind is not None and types[kind] == 1:
            found.append(kind)
        else:
            found.append(option if isinstance(option, str) else json.dumps(_plain(option), default=str))
    return found


def _type_of(option: Any) -> str | None:
    kind = option.get("type") if isinstance(option, Mapping) else None
    return kind if isinstance(kind, str) else None


def points(space: Mapping[str, Distribution]) -> Iterator[Point]:
    """The grid: every combination, in the order of the space. Raises ConfigError where a range has no end of values."""
    for path, found in _ranges(space):
        if found.kind != "integer":
            raise ConfigError(
                f"tune.space: {path}: a grid needs values, and {found.kind} [{found.low:g}, {found.high:g}] has no end "
                "of them: list some, or set tune.search to random or tpe, with tune.num_trials."
            )
    everything = combinations(space, lambda found: range(int(found.low), int(found.high) + 1))
    for number, point in enumerate(everything):
        if number == _MOST_POINTS:
            raise ConfigError(
                f"tune.space has more than {_MOST_POINTS} combinations: list fewer values, or draw some of them with "
                "tune.search=random or tpe and tune.num_trials."
            )
        yield point


def trial_config(config: Config, point: Point) -> Config:
    """The configuration of one trial: all of it validated again with the point's values. Raises ConfigError."""
    assert config.tune is not None
    values = drawn(config.tune.searched(), Given(point))
    return configured(config, values).model_copy(update={"tune": None})


def configured(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with these values at their dotted paths. Raises ConfigError."""
    # Only what was said: a default of one loss is no option of another.
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree.setdefault("train", {}).setdefault("loss", config.train.loss.model_dump(mode="json", exclude_unset=True))
    for path, value in values.items():
        put(tree, path, value, source=f"tune.space: {path}")
    shown = ", ".join(f"{path}={json.dumps(value, default=str)}" for path, value in values.items())
    try:
        one = parse_config(tree, source=f"tune.space, with {shown}")
    except ConfigError as error:
        hint = ""
        if "fractional part" in str(error):
            hint = " A range of whole numbers is written {integer: [low, high]}."
        elif "train.loss.type" in values:
            hint = (
                " Losses differ in their options: search train.loss as a whole, as in {choice: [{type: sigmoid, beta: "
                "{loguniform: [0.01, 0.5]}}, {type: orpo}]}."
            )
        elif any(
            isinstance(inner, list) for value in values.values() if isinstance(value, dict) for inner in value.values()
        ):
            hint = " Inside of an option a list is a value: what is to be drawn there is written {choice: [...]}."
        if not hint:
            raise
        raise ConfigError(f"{error}{hint}") from None
    assert config.tune is not None
    train = one.train.model_copy(update={"eval_fraction": config.tune.ranked_fraction})
    return one.model_copy(update={"train": train})


def require_space(config: Config) -> None:
    """Everything about the search that can be known to be wrong before anything runs. Raises ConfigError."""
    if config.tune is None:
        raise ConfigError(
            "There is no section tune: add tune.space, as in {train.learning_rate: {loguniform: [1.0e-7, 1.0e-5]}}, or "
            "the lists tune.beta and tune.learning_rate."
        )
    space = config.tune.searched()
    for path in space:
        _require_searchable(config, path)
    if config.train.eval_fraction not in (1.0, config.tune.ranked_fraction):
        raise ConfigError(
            f"train.eval_fraction={config.train.eval_fraction:g} and tune.ranked_fraction="
            f"{config.tune.ranked_fraction:g} both say which part of the held-out prompts steers: in a sweep the "
            "latter does. Leave train.eval_fraction out."
        )
    if config.tune.search == "grid":
        sum(1 for _ in points(space))
    if config.tune.scheduler.type != "fifo" and config.train.eval_every_steps is None:
        raise ConfigError(
            f"tune.scheduler.type={config.tune.scheduler.type} ends trials by what they measure on their way, and "
            "train.eval_every_steps is not set: set it to the steps between two evaluations."
        )
    for path, found in _ranges({path: found for path, found in space.items() if prepares(path)}):
        raise ConfigError(
            f"tune.space: {path}: each value of it needs rows of its own, with their own reference pass, and a range "
            f"({found.kind}) has too many: list the values."
        )
    _require_comparable(config, extreme_configs(config))


def extreme_configs(config: Config) -> list[Config]:
    """The configurations at the ends of all ranges, for each option. Raises ConfigError where one cannot be."""
    assert config.tune is not None
    return [configured(config, values) for values in _extremes(config.tune.searched())]


_PREPARES = {
    "data.max_prompt_tokens",
    "data.max_completion_tokens",
    "data.long_prompts",
    "data.long_completions",
    "model.path",
    "model.revision",
    "model.dtype",
}
"""Paths that change what trials are trained on: each of their values is prepared before the trials."""


def _require_searchable(config: Config, path: str) -> None:
    """Raises ConfigError for what exists in the configuration, but not for a sweep."""
    top = path.partition(".")[0]
    if path in Config.model_fields:
        raise ConfigError(
            f"tune.space: {path} cannot be searched as a whole, for all that an option leaves out would fall back to "
            f"its default: search what is in it, each by its own path, as in {path}.<key>."
        )
    if path == "data.train" and config.data.eval is not None:
        return
    if path == "run.seed":
        reason = (
            "the seed decides which prompts are held out, so its trials would be measured on different pairs. "
            "tune.repeat_best repeats the best trials with other seeds, on the same pairs"
        )
    elif top in {"run", "tune", "report"}:
        reason = "it is about the whole sweep"
    elif top in {"evaluate", "publish"}:
        reason = "it is about the model that the sweep has chosen, and trials are not measured by it"
    elif top in {"vllm", "reference"}:
        reason = "it decides how the reference is computed, not what trials learn"
    elif top in {"data", "generate"} and path not in _PREPARES:
        reason = (
            "it changes which pairs are held out, so trials would not be measured on the same ones"
            + ", unless held-out pairs are named as data.eval" * (path == "data.train")
        )
    elif path == "train.start":
        reason = "trials start from model.path; search that"
    elif top == "train" and not _changes_training(config, path):
        reason = "it decides where and how fast trials train, and not what they learn: all its values give one model"
    elif path in {"train.eval_every_steps", "train.eval_pairs", "train.eval_fraction"}:
        reason = "it decides what trials are measured on, which must be the same for all"
    elif path == "model.lora.quantization":
        reason = "it changes the reference, which is the same for all trials"
    elif top == "train" or path == "model.lora" or path.startswith("model.lora.") or path in _PREPARES:
        return
    elif top == "model":
        reason = "it is about the model's files"
    else:
        return  # no such path: the configuration says so itself
    raise ConfigError(f"tune.space: {path} cannot be searched: {reason}. Take it out of tune.space.")


def _changes_training(config: Config, path: str) -> bool:
    name = path.split(".")[1] if "." in path else ""
    return name not in type(config.train).model_fields or config.train.changes_result(name)


def prepares(path: str) -> bool:
    """Whether trials with other values of it need other rows."""
    return path in _PREPARES or path == "data.train"


def _require_comparable(config: Config, trials: list[Config]) -> None:
    """Raises ConfigError where trials of the space would be ranked by what is not the same for all of them."""
    assert config.tune is not None
    measures = {name for objective in config.tune.objectives() for name in objective}
    without = next((one.train.loss.type for one in trials if not one.train.loss.needs_reference), None)
    if "likelihood_drop" in measures and without is not None:
        raise ConfigError(
            f"tune.rank_by=likelihood_drop compares with the reference, and train.loss.type={without} learns without "
            "one: rank by chosen_logps, which needs none."
        )
    other_rows = sorted(path for path in config.tune.searched() if prepares(path) and path != "data.train")
    in_nats = sorted(measures - {"accuracy"})
    if in_nats and other_rows:
        raise ConfigError(
            f"tune.rank_by={in_nats[0]} is in nats, and {other_rows[0]} changes the answers' tokens or the model that "
            "they are measured by, so its values would be ranked, not what was learnt: rank by accuracy."
        )
    bases = {one.model.lora.quantization if one.model.lora is not None else None for one in trials}
    if len(bases) > 1:
        raise ConfigError(
            "tune.space: model.lora.quantization is not the same in all options of model.lora, but it changes the "
            "reference, which is the same for all trials: give it the same value in each, or leave it out."
        )
    kinds = {_margin_kind(one) for one in trials}
    weighted = sorted(measures & {"margin", "likelihood_drop"})
    if weighted and len(kinds) > 1:
        raise ConfigError(
            f"tune.rank_by={weighted[0]}, and the losses of tune.space measure it differently "
            f"({'; '.join(sorted(kinds))}): rank by accuracy."
        )


def _margin_kind(config: Config) -> str:
    loss = getattr(config.train.loss, "rewarding", config.train.loss)  # of a weighted sum the term that is reported
    if loss.type == "orpo":
        return "log odds of a mean over tokens"
    against = "against the reference" if loss.needs_reference else "without a reference"
    divergence = getattr(getattr(loss, "divergence", None), "type", "reverse_kl")
    shaped = "" if divergence == "reverse_kl" else f" under {divergence}"
    tail = "" if loss.token_tail_weight in (None, 1.0) else f" with a tail of weight {loss.token_tail_weight:g}"
    return f"{'a mean over tokens' if loss.averages_tokens else 'a sum over tokens'} {against}{shaped}{tail}"


def margins_compare(space: Mapping[str, Distribution]) -> bool:
    """Whether the margins of all trials are the same quantity: no more than the strength of the loss is searched."""
    same = {"train.loss.beta", "train.loss.label_smoothing", "train.loss.nll_weight"}
    return not any(prepares(path) or (path.startswith("train.loss") and path not in same) for path in space)


def _value(name: str, found: Any, draw: Draw) -> Any:
    if isinstance(found, Range):
        return draw.number(name, found)
    if isinstance(found, Choice):
        named = labels(found)
        label = draw.label(name, named)
        return _filled(f"{name}[{label}]", found.options[named.index(label)], draw)
    return _filled(name, found, draw)


def _filled(name: str, option: Any, draw: Draw) -> Any:
    if isinstance(option, Range | Choice):
        return _value(name, option, draw)
    if isinstance(option, Mapping):
        return {key: _value(f"{name}.{key}", inner, draw) for key, inner in option.items()}
    return option


def _plain(option: Any) -> Any:
    if isinstance(option, Range | Choice):
        return option.written()
    if isinstance(option, Mapping):
        return {key: _plain(inner) for key, inner in option.items()}
    return option


def _ranges(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Range]]:
    for name, found in space.items():
        yield from _ranges_in(f"{prefix}{name}", found)


def _ranges_in(name: str, found: Any) -> Iterator[tuple[str, Range]]:
    if isinstance(found, Range):
        yield name, found
    elif isinstance(found, Choice):
        for label, option in zip(labels(found), found.options, strict=True):
            yield from _ranges_in(f"{name}[{label}]", option)
    elif isinstance(found, Mapping):
        yield from _ranges(found, f"{name}.")


def combinations(space: Mapping[str, Any], values: Callable[[Range], Iterable[float | int]]) -> Iterator[Point]:
    """Every combination, in the order of the space.

    Args:
        values: which of a range are taken.
    """
    parts = [list(_points_of(path, found, values)) for path, found in space.items()]
    for chosen in product(*parts):
        yield {name: value for part in chosen for name, value in part.items()}


def _points_of(name: str, found: Any, values: Any) -> Iterator[Point]:
    if isinstance(found, Range):
        yield from ({name: value} for value in values(found))
    elif isinstance(found, Choice):
        for label, option in zip(labels(found), found.options, strict=True):
            for inner in _points_of(f"{name}[{label}]", option, values):
                yield {name: label, **inner}
    elif isinstance(found, Mapping):
        yield from combinations({f"{name}.{key}": inner for key, inner in found.items()}, values)
    else:
        yield {}


def _extremes(space: Mapping[str, Distribution]) -> Iterator[dict[str, Any]]:
    """Values at the ends of all ranges and inside, for each option: each path beside the others' first, then all."""

    def ends(found: Range) -> tuple[float | int, ...]:
        inside = found.low + 0.382 * (found.high - found.low)  # no whole number, unless the range is of these
        return found.low, found.high, round(inside) if found.kind == "integer" else inside

    firsts = {path: next(_points_of(path, found, ends)) for path, found in space.items()}
    for path, found in space.items():
        for point in _points_of(path, found, ends):
            whole = {name: value for part in {**firsts, path: point}.values() for name, value in part.items()}
            yield drawn(space, Given(whole))
    for point in islice(combinations(space, ends), _MOST_COMBINATIONS):
        yield drawn(space, Given(point))
