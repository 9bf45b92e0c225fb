"""How far apart two computations of the same may come on any machine.

A machine chooses the order of its sums, and how many products it rounds at once. So a bound is counted in units in the
last place (ulps) of the largest number that is rounded on the way, never read off what one machine gave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The unit roundoff of float32, 2⁻²⁴, goes with the square root of how often it is met: two runs, 32 products one after
# the other (two layers of seven, the output layer, forward and backward), each a sum of at most 512 numbers.
GRADIENT = math.sqrt(2 * 32 * 512) * 2**-24
"""How far, of its own norm, a parameter's gradient may be from itself in another order of summation, where a model of
two layers computes in float32: 1.1e-5."""
GRADIENT_BFLOAT16 = math.sqrt(2 * 32) * 2**-9
"""The same where it computes in bfloat16, which rounds the sums and not what is summed: 1.6e-2."""


def ulps(count: float, magnitude: float, dtype: torch.dtype = torch.float32) -> float:
    """So many units in the last place of a number of this magnitude."""
    return count * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))


def of_logprob(vocabulary: int) -> float:
    """Of a token's log-prob in float32, where logits are of order 1 and it is near log(1 / V).

    Either computation rounds five times at that size: the logit, less the largest, the log of the sum, less that, and
    what the logits' own roundings come to, of which the softmax takes a mean.
    """
    return ulps(10, math.log(vocabulary))


def of_sum(tokens: int, vocabulary: int) -> float:
    """Of a sum of so many tokens' log-probs, whose roundings go either way."""
    return math.sqrt(tokens) * of_logprob(vocabulary)


def distance(got: Tensor, expected: Tensor) -> float:
    """‖Δ‖ / ‖expected‖; infinite where something is not a number, or nothing is expected and something there."""
    apart = (got - expected).norm()
    return float((apart / expected.norm()).nan_to_num(nan=math.inf)) if apart != 0 else 0.0


def require_gradients(
    got: Sequence[Tensor | None], expected: Sequence[Tensor | None], bound: float = GRADIENT, *, of_all: bool = False
) -> None:
    """The same gradients but for rounding, parameter by parameter.

    Args:
        bound: of ‖Δg‖ / ‖g‖.
        of_all: ‖g‖ is that of all parameters together, where some have gradients that cancel out to nothing.
    """
    whole = math.sqrt(sum(float(g.norm()) ** 2 for g in expected if g is not None))
    for number, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert (mine is None) == (other is None), f"parameter {number}"
        if mine is not None and other is not None:
            apart = float((mine - other).norm()) / whole if of_all else distance(mine, other)
            assert apart <= bound, f"parameter {number}: ‖Δg‖ / ‖g‖ is {apart:.2g}, over {bound:.2g}"
