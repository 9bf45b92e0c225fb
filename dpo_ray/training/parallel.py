"""Data parallelism over the workers of one run: DDP, or FSDP2, behind the same few functions.

Both average gradients over the workers; one worker that holds a whole model on a CPU is not wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from dpo_ray.config import Sharding, backend
from dpo_ray.model.computing_copy import ComputingCopy
from dpo_ray.model.part import Part, set_everywhere
from dpo_ray.model.policy import CompletionScorer, decoder_layers


@dataclass(frozen=True)
class Rank:
    """Who this worker is."""

    rank: int
    world_size: int
    device: torch.device


def part_of(me: Rank, sharding: Sharding) -> Part:
    """Which part of each weight this worker holds under train.strategy=fsdp."""
    shards = sharding.workers or me.world_size
    return Part(me.rank % shards, shards)


def parallelize(
    scorer: CompletionScorer,
    strategy: Literal["ddp", "fsdp"],
    me: Rank,
    dtype: torch.dtype = torch.float32,
    *,
    sharding: Sharding = Sharding(),
    offload: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> nn.Module:
    """The module to call for a forward pass that gradients are to flow through.

    fsdp shards each decoder layer on its own, in place (torch's fully_shard, arXiv:2304.11277), and embedding and head
    where they are two, so that one of them at a time is whole. In bfloat16, layers compute in it while weights,
    gradients and the optimizer stay in float32. FSDP does that; for ddp on a GPU on a mesh in which every worker is a
    shard of one and only gradients travel. On a CPU, where its copying of all weights and gradients in each micro-batch
    would take a fifth of a step, ddp has a computing copy instead.

    Args:
        dtype: what the forward and backward pass compute in.
        offload: keep each worker's part of weights, gradients and moments in the host's memory, for fsdp.
        weights: of a model without any (dpo_ray.model.part), this worker's part of each by its name, for fsdp; taken
            out of it, so that none is held twice.

    Raises ConfigError where the model does not name its decoder layers.
    """
    # Weights that are trained in bfloat16 need no copy, and their gradients FSDP's sums in float32.
    in_bfloat16 = any(p.requires_grad and p.dtype == torch.bfloat16 for p in scorer.parameters())
    if strategy == "ddp" and (dtype == torch.float32 or (me.device.type == "cpu" and not in_bfloat16)):
        if dtype != torch.float32:
            scorer.copy = ComputingCopy(scorer, dtype)
        return DistributedDataParallel(scorer) if me.world_size > 1 else scorer
    layers = decoder_layers(scorer.model, wanted_by="train.strategy=fsdp or model.dtype=bfloat16")
    if not dist.is_initialized():
        _start_group_of_one(me, offload)
    part = part_of(me, sharding) if strategy == "fsdp" else Part(0, 1)
    if part.of == me.world_size:
        mesh = init_device_mesh(me.device.type, (me.world_size,))
    else:  # workers that come one after the other, as those of a node do, hold a model together
        shape = (me.world_size // part.of, part.of)
        mesh = init_device_mesh(me.device.type, shape, mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "shard_placement_fn": lambda weight: Shard(part.dimension(weight.shape)),
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=me.device.type == "cuda")
    # Where every worker holds all weights, giving the computing copy up between the passes saves nothing; but for
    # weights that are held in what they are computed in, of which it is a second one.
    give_up = strategy == "fsdp" and not sharding.keep_gathered
    if strategy == "ddp":
        options["ignored_params"] = {p for p in scorer.parameters() if not p.requires_grad and p.dtype != torch.float32}
        give_up = in_bfloat16
    ends = [scorer.model.get_input_embeddings(), scorer.model.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        ends = []  # gathered with the outermost weights, from the first use to the last
    for module in (*layers, *ends):
        fully_shard(module, reshard_after_forward=give_up, **options)
    fully_shard(scorer, **options)
    # Alone, with weights in bfloat16, gradients are kept in it too, and not for a while in float32.
    scorer.adds_gradients_up_at_once = part.of > 1 or (in_bfloat16 and me.world_size == 1)
    if weights is not None:
        _put_in(scorer, weights, torch.device("cpu") if offload else me.device)
    _prefetch(layers, sharding.prefetch_layers)
    return scorer


def _put_in(scorer: CompletionScorer, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give each parameter that has no values its own part."""
    filled: dict[int, nn.Parameter] = {}
    for name, empty in scorer.model.named_parameters():
        if empty.is_meta:
            assert isinstance(empty, DTensor)
            mine = weights.pop(name.replace(".base_layer.", ".")).to(device)
            if device.type == empty.device_mesh.device_type:
                whole = DTensor.from_local(
                    mine, empty.device_mesh, empty.placements, run_check=False, shape=empty.shape, stride=empty.stride()
                )
            else:  # from_local would bring what is to stay on the host to the device of the mesh
                on_host = torch.empty_like(empty, device=device)
                assert isinstance(on_host, DTensor)
                on_host.to_local().copy_(mine)
                whole = on_host
            filled[id(empty)] = nn.Parameter(whole, requires_grad=empty.requires_grad)
    weights.clear()  # other names of the same ones
    set_everywhere(scorer, filled)
    # FSDP looks at its parameters anew when a state is loaded, were it none.
    scorer.load_state_dict({}, strict=False, assign=True)


def _prefetch(layers: Sequence[nn.Module], ahead: int) -> None:
    """Have each layer ask for the next ones' weights while it computes."""
    for ordered, ask in ((layers, "forward"), (layers[::-1], "backward")):
        for number, layer in enumerate(ordered) if ahead else ():
            getattr(layer, f"set_modules_to_{ask}_prefetch")(list(ordered[number + 1 : number + 1 + ahead]))


def _start_group_of_one(me: Rank, offload: bool) -> None:
    exchange = backend(me.device.type == "cuda", offload)
    dist.init_process_group(exchange, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def accumulating(forward: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: gradients are added up over the workers in the last one only.

    Of a sharded model each worker keeps its part of them, though, so that those of a micro-batch travel to where they
    belong at once: kept until the last one they would be as large as the model in float32, on every worker.
    """
    with ExitStack() as around:
        scorer = forward
        if isinstance(forward, DistributedDataParallel):
            scorer = forward.module
            if not last:
                around.enter_context(forward.no_sync())
        assert isinstance(scorer, CompletionScorer)
        around.enter_context(scorer.computing())
        if isinstance(scorer, FSDPModule):
            if scorer.adds_gradients_up_at_once:
                scorer.set_requires_all_reduce(last)
            else:
                scorer.set_requires_gradient_sync(last)
        yield


def forget_gathered(forward: nn.Module) -> None:
    """After forward passes without a backward one, before weights are written to.

    FSDP2 keeps the outermost weights gathered then, and those of layers that are not given up between the passes; it
    would use them in the next forward pass as they were.
    """
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down to a global norm. Returns the norm before, over all shards."""
    trained = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    whole = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not whole <= max_norm:  # below it, a multiplication by 1 would pass over all gradients for nothing
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return whole


def summed(values: Tensor, me: Rank) -> Tensor:
    """The sum of a tensor over all workers, on each of them."""
    if me.world_size > 1:
        dist.all_reduce(values)
    return values


def gathered(values: Tensor, me: Rank) -> list[Tensor]:
    """Tensors [n_r, …] of every rank r, in the order of the ranks; the n_r may differ."""
    if me.world_size == 1:
        return [values]
    mine = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(mine) for _ in range(me.world_size)]
    dist.all_gather(counts, mine)
    longest = max(int(count) for count in counts)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.zeros_like(padded) for _ in range(me.world_size)]
    dist.all_gather(parts, padded)
    return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]


def gathered_objects(value: Any, me: Rank) -> list[Any]:
    """A small picklable value of every rank, in the order of the ranks."""
    if me.world_size == 1:
        return [value]
    values: list[Any] = [None] * me.world_size
    dist.all_gather_object(values, value)
    return values


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name, whole and on the CPU; empty on other ranks than 0. Every rank must call it.

    Unsharded parameters on the CPU are given themselves, not copied: use them before they change.
    """
    return trained_state(model, StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))


def trained_state(model: nn.Module, options: StateDictOptions) -> dict[str, Any]:
    """Trained parameters and buffers by name. Every rank must call it."""
    # torch leaves a frozen parameter out under its first name only; tied weights have two.
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: v for name, v in get_model_state_dict(model, options=options).items() if name not in frozen}
