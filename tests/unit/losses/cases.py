"""What the tests of the losses share: every loss, pairs whose values are worked out by hand, and random ones.

All in float64. Golden pair: log-probs under the policy (-10, -14) and the reference (-11, -13), 5 and 8 tokens; so the
log-ratios are 1 and -1, h = 2 and the mean token log-probs -2 and -1.75.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dpo_ray.config.losses import Loss
from dpo_ray.losses.pair_logps import PairLogps, pair_logps

LOSS: TypeAdapter[Any] = TypeAdapter(Loss)


def loss(type: str, **options: Any) -> Any:
    return LOSS.validate_python({"type": type, **options})


def weighted(*terms: tuple[float, dict[str, Any]], **options: Any) -> Any:
    return loss("weighted", terms=[{"weight": weight, "loss": term} for weight, term in terms], **options)


ALL_LOSSES: list[Any] = [
    loss("sigmoid"),
    loss("sigmoid", beta=0.5, label_smoothing=0.2),
    loss("sigmoid", nll_weight=0.2),
    loss("sigmoid", divergence={"type": "forward_kl"}),
    loss("sigmoid", divergence={"type": "js"}),
    loss("sigmoid", divergence={"type": "alpha", "alpha": 0.3}),
    loss("robust"),
    loss("hinge", beta=0.3),
    loss("ipo", beta=0.2),
    loss("ipo", beta=0.2, log_ratio="sum"),
    loss("sigmoid_norm"),
    loss("exo_pair"),
    loss("nca_pair"),
    loss("bco_pair", beta=0.1),
    loss("sppo_hard", beta=0.1),
    loss("aot", beta=0.1, label_smoothing=0.1),
    loss("aot_unpaired", beta=0.1, label_smoothing=0.1),
    loss("apo_zero"),
    loss("apo_down"),
    loss("discopop"),
    loss("simpo"),
    loss("orpo"),
    loss("cpo"),
    loss("kto", desirable_weight=1.5),
    loss("kto"),
    loss("r_dpo"),
    loss("dpop", penalty_weight=5),
    weighted((0.8, {"type": "sigmoid"}), (0.2, {"type": "bco_pair"}), nll_weight=1),
    weighted((2, {"type": "hinge"}), (0.5, {"type": "apo_zero"})),
]


def name(value: Any) -> str:
    return str(getattr(value, "type", ""))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logps(policy: tuple[float, float], reference: tuple[float, float], tokens: tuple[int, int] = (5, 8)) -> PairLogps:
    return PairLogps(
        f64(policy[0]),
        f64(policy[1]),
        f64(reference[0]),
        f64(reference[1]),
        f64(tokens[0]),
        f64(tokens[1]),
        f64(policy[0] / tokens[0] if tokens[0] else 0),
        f64(policy[1] / tokens[1] if tokens[1] else 0),
    )


GOLDEN = logps((-10, -14), (-11, -13))


# Four pairs: 3 and 5, 1 and 1, 4 and 2, 2 and 6 tokens.
LENGTHS = [3, 5, 1, 1, 4, 2, 2, 6]
SEQUENCES = torch.repeat_interleave(torch.arange(8), torch.tensor(LENGTHS))


def random_tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(len(SEQUENCES), generator=generator, dtype=torch.float64) - 0.1


def random_pairs(**options: Any) -> PairLogps:
    return pair_logps(random_tokens(0), SEQUENCES, 4, ref_token_logprobs=random_tokens(1), **options)


def select(pairs: PairLogps, index: list[int]) -> PairLogps:
    values = {field: value[index] for field, value in vars(pairs).items() if value is not None}
    return replace(pairs, **values)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))
