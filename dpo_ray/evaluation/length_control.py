"""The win rate that would be if both models answered at equal length.

Judges and reward models like long answers, and DPO makes answers longer. As in length-controlled AlpacaEval
(arXiv:2404.04475), a logistic model explains each comparison by the models and by the difference of lengths, and the
win rate is what it says for a difference of 0. Its terms for how hard a prompt is are left out: prompts are compared
once here, and not by many models.
"""

from __future__ import annotations

import numpy as np

from dpo_ray.estimates import Estimate, bootstrap

_STEPS = 50
_PENALTY = 0.001
"""Of the squared coefficients, for each comparison: so that comparisons that lengths part wholly have a finite fit."""


def length_controlled_win_rate(wins: np.ndarray, lengths: np.ndarray, base_lengths: np.ndarray) -> Estimate:
    """The win rate of n prompts at equal lengths, with an interval by the bootstrap over prompts.

    Args:
        wins: [n] how often the tuned model wins on a prompt, in [0, 1].
        lengths, base_lengths: [n] mean length of its answers to the prompt, and of the base model's, in any unit.
    """
    longer = lengths - base_lengths
    spread = float(np.std(longer))
    # Bounded, so that one answer that runs on and on does not make the slope.
    x = np.tanh(longer / spread) if spread > 0 else np.zeros(len(wins))
    return bootstrap(lambda of: _at_equal_length(wins[of], x[of]), len(wins))


def _at_equal_length(wins: np.ndarray, x: np.ndarray) -> float:
    """1/(1 + exp(−a)) of the fit of P(win) = 1/(1 + exp(−a − b·x)), by Newton's method."""
    features = np.stack([np.ones(len(x)), x], axis=1)
    weights = np.zeros(2)
    penalty = _PENALTY * len(x) * np.eye(2)
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (wins - p) - penalty @ weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features + penalty
        step = np.linalg.solve(hessian, gradient)
        weights = weights + step
        if float(np.max(np.abs(step))) < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
