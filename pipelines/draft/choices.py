"""Data, model and machine → the values of a configuration.

Rows are looked at as `dpo-ray data` does, lengths measured as `dpo-ray plan` does, and memory reckoned as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.config import Config, parse_config
from dpo_ray.config.load import put
from dpo_ray.errors import ConfigError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.training.memory import shape_of
from pipelines.draft.hardware import Hardware
from pipelines.plan.counts import Counts, Side
from pipelines.plan.memory import of_training, resident
from pipelines.plan.sample import sample
from pipelines.preview.sheet import Sheet, sheets

_ANY_LENGTH = 1 << 20
_STEP_OF_LIMITS = 64
_STEPS = 50  # that an epoch should have, at least
_LARGEST_BATCH = 64
_GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """One value."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Draft:
    """A configuration, and what it was made by."""

    choices: list[Choice]
    sheets: list[Sheet]
    lacking: str | None
    """What does not fit this machine, whatever was tried."""

    def tree(self) -> dict[str, Any]:
        """As a file has it."""
        tree: dict[str, Any] = {}
        for choice in self.choices:
            put(tree, choice.key, choice.value, source="draft")
        return tree

    def config(self) -> Config:
        """Raises ConfigError where the values do not go together."""
        return parse_config(self.tree(), source="the draft")


def draft(
    source: str, model: str, name: str, output: str, told: Mapping[str, Any], hardware: Hardware, rows: int
) -> Draft:
    """Choose.

    Args:
        source: as data.train names it.
        told: dotted key → value, which stand whatever would be chosen.
        rows: that are looked at, of each format, and measured, of all.

    Raises DataError and ConfigError where a run would: on data that cannot be read, on a model without a chat template.
    """
    told = _folded(told)
    looked = _as_it_is(source, model, name, output, told)
    found = sheets(looked, rows, 0, with_model=False)
    counts = sample(looked, rows)
    plain = Draft(_with(told, list(_choices(looked, found, counts, hardware))), found, None)
    fitted, lacking = _that_fit(plain, counts, hardware, looked, told)
    return Draft(_with(told, [*plain.choices, *fitted]), found, lacking)


def _folded(told: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a part of a section that is told too, put into that."""
    found: dict[str, Any] = {}
    for key in sorted(told, key=lambda key: key.count(".")):
        outer = next((other for other in found if key.startswith(f"{other}.") and isinstance(found[other], dict)), None)
        if outer is None:
            found[key] = deepcopy(told[key])
        else:
            put(found[outer], key.removeprefix(f"{outer}."), told[key], source=f"-o {key}")
    return found


def _as_it_is(source: str, model: str, name: str, output: str, told: Mapping[str, Any]) -> Config:
    """What data and model are looked at with: every length, and rows with one answer too."""
    if given := [key for key in told if key.partition(".")[0] == "generate"]:
        raise ConfigError(
            f"-o {given[0]} is of pairs that are sampled, and this is for preference data: begin with "
            "pipelines/configs/demo_cpu.yaml instead."
        )
    tree: dict[str, Any] = {"reference": {"engine": "torch"}}  # which scores with whatever model is asked for
    put(tree, "data", {"max_prompt_tokens": _ANY_LENGTH, "max_completion_tokens": _ANY_LENGTH}, source="draft")
    for key, value in {"run.name": name, "run.output": output, "model.path": model, "data.train": source}.items():
        put(tree, key, value, source=key)
    for key, value in told.items():
        if key.partition(".")[0] in {"run", "model", "data"}:
            put(tree, key, value, source=f"-o {key}")
    return parse_config(tree, source="What is asked for")


def _with(told: Mapping[str, Any], choices: list[Choice]) -> list[Choice]:
    """The choices, but what is told stands: for itself, for what lies in it, and in what it lies in."""
    kept: list[Choice] = []
    for choice in choices:
        inner = {key: value for key, value in told.items() if key.startswith(f"{choice.key}.")}
        if inner and isinstance(choice.value, dict):
            # Of another loss than the chosen one nothing else of it is meant.
            other = inner.get(f"{choice.key}.type", choice.value.get("type")) != choice.value.get("type")
            tree = {choice.key: {} if other else dict(choice.value)}
            for key, value in inner.items():
                put(tree[choice.key], key.removeprefix(f"{choice.key}."), value, source=f"-o {key}")
            kept.append(Choice(choice.key, tree[choice.key], f"{choice.why} {', '.join(inner)} as told with -o."))
        elif not any(choice.key == key or choice.key.startswith(f"{key}.") for key in told):
            kept.append(choice)
    if "data.eval" in told:
        kept = [choice for choice in kept if choice.key != "data.held_out_fraction"]
    held = [choice.key for choice in kept]
    apart = [key for key in told if not any(key.startswith(f"{other}.") for other in held)]
    return [*kept, *(Choice(key, told[key], "As told with -o.") for key in apart)]


def _choices(looked: Config, found: list[Sheet], counts: Counts, hardware: Hardware) -> Iterator[Choice]:
    yield Choice("run.name", looked.run.name, "Of the run, and of the model that it publishes.")
    where = "A local folder; on a cluster a bucket, or a folder that all nodes see."
    yield Choice("run.output", looked.run.output, where)
    yield Choice("model.path", looked.model.path, "Trained, and the reference too.")
    on_gpu = hardware.gpus > 0
    yield _of_dtype(hardware)
    yield from _of_data(found, counts, looked, on_gpu)
    yield from _of_engines(hardware)
    yield from _of_training(found, counts, hardware)


def _of_dtype(hardware: Hardware) -> Choice:
    if hardware.gpus:
        why = "GPUs compute it several times faster; weights and optimizer stay in float32."
        return Choice("model.dtype", "bfloat16", why)
    if hardware.fast_bfloat16:
        why = (
            "This CPU would be up to twice as fast in bfloat16, whose rounding hides held-out margins below a nat or "
            "so, as a short training leaves them."
        )
        return Choice("model.dtype", "float32", why)
    return Choice("model.dtype", "float32", "This CPU has no instructions for bfloat16, and would be slower in it.")


def _of_data(found: list[Sheet], counts: Counts, looked: Config, on_gpu: bool) -> Iterator[Choice]:
    yield Choice("data.train", looked.data.train, f"{_about(found)} About {counts.read:.0f} rows.")
    if len({sheet.format.name for sheet in found}) == 1:
        [name] = {sheet.format.name for sheet in found}
        yield Choice("data.layout", name, f"Recognised by its columns and first rows: {found[0].format.about}.")
    lengths = np.concatenate([counts.train.lengths, counts.held_out.lengths])
    prompts, answers = lengths[:, 0], lengths[:, 1:].max(axis=1)
    context = ModelFolder.of(looked.model).config().get("max_position_embeddings") or _ANY_LENGTH
    completion = min(_limit(answers), max(1, context - 1))
    prompt = min(_limit(prompts), max(1, context - completion))
    yield Choice("data.max_prompt_tokens", prompt, _of_lengths(prompts, prompt, "prompts"))
    yield Choice("data.max_completion_tokens", completion, _of_lengths(answers, completion, "the longer answers"))
    pairs, share = _pairs(counts), _held_out(counts)
    yield Choice(
        "data.held_out_fraction",
        share,
        f"Of about {pairs:.0f} pairs some {share * pairs:.0f} judge the model; the more, the narrower the interval of "
        "its gate.",
    )
    if not on_gpu:
        yield Choice("data.rows_per_shard", 128, "On CPUs a row takes long, and a kill costs a shard at most.")


def _pairs(counts: Counts) -> float:
    return counts.train.pairs + counts.held_out.pairs


def _held_out(counts: Counts) -> float:
    pairs = _pairs(counts)
    return 0.3 if pairs < 300 else 0.2 if pairs < 1000 else 0.1 if pairs < 50_000 else 0.02


def _about(found: list[Sheet]) -> str:
    told = []
    for sheet in found:
        unread = [column for column in sheet.columns if column not in sheet.read]
        of_rows = f", {sheet.dropped.total()} of {sheet.rows} rows dropped" if sheet.dropped else ""
        told.append(
            f"{sheet.format.name} in {len(sheet.files)} file{'s' if len(sheet.files) > 1 else ''}: read "
            f"{', '.join(sheet.read)}; not read {', '.join(unread) or 'none'}{of_rows}."
        )
    return " ".join(told)


def _limit(lengths: np.ndarray) -> int:
    """The longest, or where that is far out the 99th percentile, rounded up."""
    longest, most = int(lengths.max()), float(np.percentile(lengths, 99))
    return _STEP_OF_LIMITS * math.ceil((longest if longest <= 2 * most else most) / _STEP_OF_LIMITS)


def _of_lengths(lengths: np.ndarray, limit: int, what: str) -> str:
    over = float((lengths > limit).mean())
    dropped = f"; {over:.1%} of the pairs are longer and are dropped" if over else ""
    return (
        f"Tokens of {what}: median {np.median(lengths):.0f}, 99% up to {np.percentile(lengths, 99):.0f}, the longest "
        f"{lengths.max()}, of {len(lengths)} measured{dropped}."
    )


def _of_engines(hardware: Hardware) -> Iterator[Choice]:
    if not hardware.gpus:
        why = "On CPUs the trainer's own forward is the faster one: vLLM takes a minute to start."
        yield Choice("reference.engine", "torch", why)
        return
    if not hardware.vllm:
        yield Choice("reference.engine", "torch", "vLLM is not installed (the extra vllm).")
        return
    yield Choice("reference.engine", "vllm", "It is installed; the trainer's own forward is held against its scores.")
    yield Choice("vllm.num_actors", hardware.gpus, "An engine on each GPU, while the trainer does not have them.")
    yield Choice("vllm.gpus_per_actor", 1, "More where a GPU does not hold the model.")


def _of_training(found: list[Sheet], counts: Counts, hardware: Hardware) -> Iterator[Choice]:
    if any(sheet.format.layout == "unpaired" for sheet in found):
        yield Choice("train.loss", {"type": "kto", "beta": 0.1}, "The rows have single answers with a label.")
    else:
        yield Choice("train.loss", {"type": "sigmoid", "beta": 0.1}, "DPO, with the β that most begin with.")
    yield Choice("train.learning_rate", 1e-6, "Of all weights; `dpo-ray sweep` finds a better one.")
    pairs = _pairs(counts) * (1 - _held_out(counts))
    batch = 2 ** max(3, math.floor(math.log2(max(8.0, pairs / _STEPS))))
    batch = max(min(batch, _LARGEST_BATCH), hardware.most_workers)
    steps = max(1, int(pairs // batch))
    yield Choice("train.global_batch_size", batch, f"About {pairs:.0f} pairs to train on make {steps} steps an epoch.")
    yield Choice("train.use_gpu", hardware.gpus > 0, f"Here are {hardware}.")


def _that_fit(
    draft: Draft, counts: Counts, hardware: Hardware, looked: Config, told: Mapping[str, Any]
) -> tuple[list[Choice], str | None]:
    """Workers, and what else must be for the longest pair to have room beside weights, gradients and optimizer; and
    what is lacking where nothing tried makes that room. What is told is reckoned with, and not tried otherwise."""
    shape = shape_of(ModelFolder.of(looked.model))
    process = 0 if hardware.gpus else resident()
    config = draft.config()
    limit = config.data.max_prompt_tokens, config.data.max_completion_tokens
    lengths = np.minimum(counts.train.lengths, np.array([limit[0], limit[1], limit[1]]))
    lacking = None
    tried: list[Choice] = []
    batch = config.train.global_batch_size
    workers = int(told.get("train.num_workers", min(hardware.most_workers, batch)))
    for choices in _attempts(hardware, workers):
        tried = [choice for choice in choices if not _is_told(choice.key, told)]
        attempt = Draft([*draft.choices, *tried], draft.sheets, None).config()
        memory = hardware.of_worker(attempt.train.num_workers)
        found = of_training(attempt, shape, Side(lengths, counts.train.each), None, memory, process)
        lacking = found.lacking
        if lacking is None:
            if not tried:
                return [], None
            size = f"of the {memory / _GIB:.1f} GiB of a worker" if memory is not None else "of a worker"
            *others, last = tried
            why = f"{last.why} About {found.bytes / _GIB:.1f} GiB {size} are used."
            return [*others, Choice(last.key, last.value, why)], None
    return tried, lacking


def _is_told(key: str, told: Mapping[str, Any]) -> bool:
    return any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in told)


def _attempts(hardware: Hardware, workers: int) -> Iterator[list[Choice]]:
    """What is tried, the best first: as many workers as there can be, and then what costs time, workers or weights."""
    again = Choice("train.activation_checkpointing", True, "Without, the longest pair has no room.")
    sharded = Choice("train.strategy", "fsdp", "A GPU does not hold weights, gradients and optimizer by itself.")
    adapters = Choice("model.lora", {"rank": 16, "export": "merged"}, "All weights with their optimizer have no room.")
    faster = Choice("train.learning_rate", 1e-5, "Adapters take larger steps; `dpo-ray sweep` finds a better one.")
    extras: list[list[Choice]] = [[], [again]]
    extras += [[sharded], [sharded, again]] if hardware.gpus and workers > 1 else []
    numbers = [workers] if hardware.gpus else [workers >> n for n in range(workers.bit_length())]
    tried = [(number, extra) for number in numbers for extra in extras]
    tried += [(numbers[-1], [adapters, faster]), (numbers[-1], [adapters, faster, again])]
    for number, extra in tried:
        yield [*extra, *_workers(number, hardware)]


def _workers(number: int, hardware: Hardware) -> Iterator[Choice]:
    if hardware.gpus:
        yield Choice("train.num_workers", number, "One a GPU.")
        return
    cores = max(1, hardware.cores // number)
    yield Choice("train.cpus_per_worker", cores, f"{hardware.cores} cores are there.")
    yield Choice("train.num_workers", number, "Each holds the model.")
