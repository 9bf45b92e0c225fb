"""A packed row whose tokens lie on several processes: what PyTorch offers for it, and whether it is exact.

    python -m benchmarks.long_context

Two processes with gloo. Ulysses (arXiv:2309.14509): each holds a part of the row's tokens with all heads; before
attention they exchange, so that each has all tokens of a part of the heads, and after it back. The exchange is torch's
own all_to_all_single with gradients; attention is the trainer's. It is held against one process that has all, in
float64. Then PyTorch's context_parallel is asked for the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from dpo_ray.model.attention import Segments, packed_attention, window_mask
from dpo_ray.model.segment import Segment

WORLD = 2
PAIRS = Segments((Segment(0, 5, 3, 2), Segment(10, 1, 1, 4)))
TOKENS, SIZE = 16, 8
HEADS = (4, 2, 2)  # of queries, keys and values


def tokens_to_heads(x: Tensor) -> Tensor:
    """[1, heads, T / W, D] with this process's tokens → [1, heads / W, T, D] with its heads."""
    heads, tokens, size = x.shape[1:]
    parts = all_to_all_single_autograd(x[0].contiguous(), None, None, dist.group.WORLD)
    by_source = parts.view(WORLD, heads // WORLD, tokens, size)
    return by_source.transpose(0, 1).reshape(1, heads // WORLD, WORLD * tokens, size)


def heads_to_tokens(x: Tensor) -> Tensor:
    """[1, T, heads / W, D] → [1, T / W, heads, D]."""
    tokens, heads, size = x.shape[1:]
    parts = all_to_all_single_autograd(x[0].contiguous(), None, None, dist.group.WORLD)
    by_source = parts.view(WORLD, tokens // WORLD, heads, size)
    return by_source.transpose(0, 1).reshape(1, tokens // WORLD, WORLD * heads, size)


def exchanged(rank: int, window: int | None) -> tuple[float, float]:
    """Largest |Δ| of values and of gradients by queries, keys and values, against one process."""
    torch.manual_seed(0)
    whole = [torch.randn(1, heads, TOKENS, SIZE, dtype=torch.float64, requires_grad=True) for heads in HEADS]
    upstream = torch.randn(1, TOKENS, HEADS[0], SIZE, dtype=torch.float64)
    mask = window_mask(local_size=window)
    expected, _ = packed_attention(torch.nn.Module(), *whole, mask, segments=PAIRS)
    right = torch.autograd.grad((expected * upstream).sum(), whole)
    mine = slice(rank * TOKENS // WORLD, (rank + 1) * TOKENS // WORLD)
    local = [x[:, :, mine].detach().clone().requires_grad_() for x in whole]
    out, _ = packed_attention(torch.nn.Module(), *map(tokens_to_heads, local), mask, segments=PAIRS)
    got = heads_to_tokens(out)
    found = torch.autograd.grad((got * upstream[:, mine]).sum(), local)
    apart = max(float((a - b[:, :, mine]).abs().max()) for a, b in zip(found, right, strict=True))
    return float((got - expected[:, mine]).detach().abs().max()), apart


def asked_of_torch(options: dict[str, object]) -> str:
    """What context_parallel says to attention over a row that lies on the processes."""
    x = torch.randn(3, 1, 4, TOKENS, SIZE)
    buffers = list(x.unbind())
    try:
        with context_parallel(init_device_mesh("cpu", (WORLD,)), buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            F.scaled_dot_product_attention(*buffers, **options)  # type: ignore[arg-type]
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return "computed"


def _work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for window in (None, 3):
        values, gradients = exchanged(rank, window)
        print(f"process {rank}, window {window}: values {values:.1e}, gradients {gradients:.1e}", flush=True)
    causal = asked_of_torch({"is_causal": True})
    masked = asked_of_torch({"attn_mask": torch.ones(1, 1, TOKENS, TOKENS).tril().bool()})
    if rank == 0:
        print(f"context_parallel, causal: {causal}\ncontext_parallel, with a mask: {masked}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(str(Path(folder) / "store"),), nprocs=WORLD)


if __name__ == "__main__":
    main()
