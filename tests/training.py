"""The training loop without Ray: pairs from memory, checkpoints in a folder, one process or a gang of them."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dpo_ray.config import Model, Train
from dpo_ray.config.tolerance import Tolerance
from dpo_ray.data.pairing import mismatched
from dpo_ray.evaluation.agreement import require_same_start
from dpo_ray.model import attention
from dpo_ray.model.pair_scorer import PairScorer
from dpo_ray.model.policy import CompletionScorer, compute_in, load_policy
from dpo_ray.pairs import TokenizedPair
from dpo_ray.storage.location import Location
from dpo_ray.training import export, loop
from dpo_ray.training.batch import Share, Step, batch_weight
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.export import FILE_BYTES
from dpo_ray.training.files import MODEL_FOLDER, read_history
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.longest import LongestPair, LongestPairs
from dpo_ray.training.loop import train
from dpo_ray.training.parallel import Rank
from dpo_ray.training.plan import microbatches
from dpo_ray.training.rehearsal import try_out
from dpo_ray.training.step import Learner
from tests import gradients

VOCABULARY = 512


def small_model(folder: Path, *, dtype: torch.dtype = torch.float32, **larger: int) -> Path:
    """A random two-layer Llama with a small vocabulary and a tokenizer of its own: half a second for ten steps.

    Args:
        larger: other sizes, as LlamaConfig names them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **larger}))
        model.to(dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of numbers, for a model of at least VOCABULARY words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def random_pairs(count: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> list[TokenizedPair]:
    """Pairs of random tokens and lengths, each with a mismatched completion, without reference log-probs."""
    random = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=random))
        return torch.randint(3, vocabulary, (length,), generator=random).tolist()

    return [TokenizedPair(f"pair-{i}", ids(12), ids(8), ids(8), mismatched_ids=ids(8)) for i in range(count)]


def scored(pairs: Sequence[TokenizedPair], folder: Path, dtype: torch.dtype = torch.float32) -> list[TokenizedPair]:
    """The same with reference log-probs by the trainer's own forward."""
    policy = load_policy(folder)
    compute_in(policy, dtype)
    scorer = CompletionScorer(policy).eval()
    done = []
    with torch.no_grad():
        for pair in pairs:
            values = scorer(scorer.collate([pair])).logprobs.tolist()
            cut = len(pair.chosen_ids)
            pair = replace(pair, chosen_ref_logprobs=values[:cut], rejected_ref_logprobs=values[cut:])
            if pair.mismatched_ids:
                other = scorer(scorer.collate(mismatched([pair]))).logprobs
                pair = replace(pair, mismatched_ref_logprobs=other.tolist())
            done.append(pair)
    return done


def with_reference(pairs: Sequence[TokenizedPair], scorer: PairScorer) -> list[TokenizedPair]:
    """The same with the reference log-probs that the reference stage would give them."""
    sides = zip(pairs, *scorer.score(pairs), strict=True)
    return [replace(p, chosen_ref_logprobs=chosen, rejected_ref_logprobs=rejected) for p, chosen, rejected in sides]


def shares(pairs: Sequence[TokenizedPair], me: Rank, tokens_per_microbatch: int) -> Share:
    """A rank's share of a batch, spread as the step plan spreads it."""
    lengths = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs], dtype=np.int32)
    rows = np.arange(len(pairs), dtype=np.int32)
    index = PlanIndex.of(["memory"], np.array([0, len(pairs)]), rows, lengths, read=len(pairs))
    mine = microbatches(index, rows, me.world_size, tokens_per_microbatch, hidden_size=64)[me.rank]
    filler = min(pairs, key=lambda p: p.num_tokens)
    return Share([[pairs[row] for row in group] for group in mine], filler, batch_weight(p.weight for p in pairs))


def feed(pairs: Sequence[TokenizedPair], options: Train, me: Rank) -> Callable[[int], list[Step]]:
    """Steps of global_batch_size pairs, in order."""
    size, tokens = options.global_batch_size, options.tokens_per_microbatch
    assert tokens != "auto"
    batches = [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]
    steps = [Step(n, shares(batch, me, tokens)) for n, batch in enumerate(batches)]
    return lambda start: steps[start:]


class Kept:
    """Keeps every checkpoint below a folder; may die after one, as a killed worker would."""

    def __init__(self, folder: Path, die_at: int | None = None):
        self.folder = folder
        self.die_at = die_at

    def keep(self, metrics: dict[str, Any], folder: Path, *, wait: bool) -> None:
        shutil.copytree(folder, self.folder / f"step-{metrics['step']}", copy_function=shutil.move, dirs_exist_ok=True)
        shutil.rmtree(folder)
        if dist.is_initialized():
            dist.barrier()
        if metrics["step"] == self.die_at:
            raise InterruptedError("killed")

    def report(self, metrics: dict[str, Any]) -> None:
        """Nobody steers."""

    def steps(self) -> set[int]:
        return {int(folder.name.removeprefix("step-")) for folder in self.folder.glob("step-*")}

    def of_step(self, step: int) -> Location:
        return Location.of(self.folder / f"step-{step}")


class Trained:
    """What a training left in its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        steps = sorted(folder.glob("step-*"), key=lambda f: int(f.name.removeprefix("step-")))
        self.checkpoints = [int(f.name.removeprefix("step-")) for f in steps]
        self.last = steps[-1]
        self.model = folder / MODEL_FOLDER
        self.metrics = read_history(Location.of(self.last))

    def of(self, name: str) -> list[float]:
        """One metric over the logged steps."""
        return [m[name] for m in self.metrics]

    @property
    def losses(self) -> list[float]:
        return self.of("loss")

    @property
    def gradients(self) -> list[gradients.Gradients]:
        """Of every step taken, where they were recorded."""
        return gradients.read(self.folder)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the exported model."""
        return load_file(self.model / "model.safetensors")


def run(
    model: Path | Model,
    pairs: Sequence[TokenizedPair],
    folder: Path,
    *,
    me: Rank | None = None,
    held_out: Sequence[TokenizedPair] = (),
    resume: Path | Location | None = None,
    die_at: int | None = None,
    num_steps: int | None = None,
    reference_tolerance: Tolerance | None = Tolerance(),
    packed: bool = True,
    record_gradients: bool = False,
    factor_of_rank_1: float | None = None,
    tries_longest: bool = False,
    memory_ends_on_rank: int | None = None,
    is_forewarned: Callable[[], bool] | None = None,
    steps_from: Callable[[int], Iterable[Step]] | None = None,
    sources: tuple[str, ...] = (),
    told: Callable[[dict[str, Any], int], None] | None = None,
    export_file_bytes: int = FILE_BYTES,
    **values: Any,
) -> TrainState:
    """Train on the pairs, as one worker or as one rank of a gang.

    Args:
        packed: whether the model may run on packed pairs; otherwise they are padded.
        record_gradients: leave them beside the checkpoints, and take the smooth AdamW of tests.gradients.
        factor_of_rank_1: a fault: what rank 1's gradients are multiplied by before they travel.
        tries_longest: the longest pair is tried before the first step, as on a GPU.
        memory_ends_on_rank: a fault: where it is tried, this rank has too little memory.
        is_forewarned, told, sources: as `train` takes them.
        steps_from: as `train` takes it; None: the pairs in order.
        export_file_bytes: of weights in a file of the trained model, at most.
        values: of the section `train`.
    """
    me = me or Rank(0, 1, torch.device("cpu"))
    model = model if isinstance(model, Model) else Model(path=str(model))
    options = Train.model_validate(
        {"learning_rate": 1e-3, "global_batch_size": 8, "checkpoint_every_steps": 100, "tokens_per_microbatch": 64}
        | values
    )
    assert options.tokens_per_microbatch != "auto"
    layout = nullcontext() if packed else mock.patch.object(attention, "serves", return_value=False)
    record = gradients.recorded(folder, me.rank) if record_gradients else nullcontext()
    fault = gradients.multiplied(factor_of_rank_1) if factor_of_rank_1 and me.rank == 1 else nullcontext()
    tried = mock.patch.object(loop, "require_that_it_fits", _try_out) if tries_longest else nullcontext()
    ends = mock.patch.object(Learner, "rehearse", memory_ends) if memory_ends_on_rank == me.rank else nullcontext()
    smaller = mock.patch.object(export.export_policy, "__kwdefaults__", {"file_bytes": export_file_bytes})
    with layout, record, fault, tried, ends, smaller, one_thread():
        return train(
            model,
            options,
            seed=0,
            num_steps=num_steps or len(pairs) // options.global_batch_size,
            pairs_per_epoch=len(pairs),
            me=me,
            steps_from=steps_from or feed(pairs, options, me),
            sources=sources,
            held_out=shares(held_out, me, options.tokens_per_microbatch) if held_out else None,
            checkpoints=Kept(folder, die_at),
            export_to=Location.of(folder / MODEL_FOLDER),
            resume=Location.of(resume) if isinstance(resume, Path) else resume,
            require_reference=None
            if reference_tolerance is None
            else partial(require_same_start, reference_tolerance.limits(model.dtype)),
            longest=longest_of(pairs) if tries_longest else None,
            **({"is_forewarned": is_forewarned} if is_forewarned is not None else {}),
            **({"told": told} if told is not None else {}),
        )


def longest_of(pairs: Sequence[TokenizedPair]) -> LongestPairs:
    def padded(pair: TokenizedPair) -> int:
        return 2 * (len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)))

    longest, widest = (
        max(range(len(pairs)), key=lambda row: tokens(pairs[row])) for tokens in (lambda pair: pair.num_tokens, padded)
    )
    return LongestPairs(LongestPair(pairs[longest], "memory", longest), LongestPair(pairs[widest], "memory", widest))


def _try_out(learner: Learner, longest: LongestPair, *_: Any) -> None:
    try_out(learner, longest)


def memory_ends(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@contextmanager
def one_thread() -> Iterator[None]:
    """The model is too small for more, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Gang:
    """Processes that form one gloo group and run the same function side by side."""

    def __init__(self, world_size: int, store: Path):
        context = multiprocessing.get_context("spawn")
        self.executors = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(rank, world_size, str(store)))
            for rank in range(world_size)
        ]

    def run(self, *arguments: Any, **values: Any) -> None:
        """training.run on every rank; raises what every rank raised."""
        futures = [executor.submit(_run_as_rank, arguments, values) for executor in self.executors]
        errors = [future.exception(timeout=540) for future in futures]
        assert len({repr(error) for error in errors}) == 1, f"the ranks did not end alike: {errors}"
        if errors[0] is not None:
            raise errors[0]

    def end(self) -> None:
        for executor in self.executors:
            executor.shutdown(cancel_futures=True)


def _join(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def _run_as_rank(arguments: tuple[Any, ...], values: dict[str, Any]) -> None:
    run(*arguments, **values, me=Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
