"""How often the 95% intervals of dpo_ray.estimates hold the rate that they are about, by simulation.

    python -m benchmarks.intervals [--draws 20000] [--write]

Scores of prompts are drawn with a known mean: wins and losses; wins, ties and losses; and means over all pairings of
four samples of each of two models, whose chances differ from prompt to prompt. Beside ours stand Wilson's interval of
the mean and the percentile bootstrap by prompt (of the first 2,000 draws). --write writes benchmarks/intervals.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

import numpy as np

from benchmarks.record import ROOT, environment, table
from dpo_ray.estimates import proportion, rate

RATES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
SIZES = (30, 100, 300, 1000)
_BOOTSTRAPPED = 2000
_RESAMPLES = 1000
_SEED = 0

Draw = Callable[[np.random.Generator, float, int], np.ndarray]


def wins(rng: np.random.Generator, mean: float, n: int) -> np.ndarray:
    return (rng.random(n) < mean).astype(float)


def with_ties(rng: np.random.Generator, mean: float, n: int) -> np.ndarray:
    """A third of what is not sure to fall to one side are ties."""
    ties = 2 / 3 * min(mean, 1 - mean)
    place = rng.random(n)
    return np.where(place < mean - ties / 2, 1.0, np.where(place < mean + ties / 2, 0.5, 0.0))


def of_samples(rng: np.random.Generator, mean: float, n: int) -> np.ndarray:
    """Means over 4 × 4 pairings; a prompt's own chance of a win is drawn from a beta distribution of this mean."""
    chance = rng.beta(2 * mean, 2 * (1 - mean), (n, 1, 1))
    # Scores of the samples of one model are shared by its pairings, so these are not independent.
    mine, theirs = rng.random((n, 4, 1)), rng.random((n, 1, 4))
    # The chance that the mean of two uniform numbers is below x, inverted, is where the bar has to be.
    bar = np.where(chance <= 0.5, np.sqrt(chance / 2), 1 - np.sqrt(np.maximum((1 - chance) / 2, 0)))
    return np.mean((mine + theirs) / 2 < bar, axis=(1, 2))


KINDS: dict[str, Draw] = {
    "wins and losses": wins,
    "wins, ties, losses": with_ties,
    "means over 4 × 4 pairings": of_samples,
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.intervals", description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    parts = [_head(arguments.draws)]
    for kind, draw in KINDS.items():
        rows = [
            [str(n), f"{mean:g}", *(f"{100 * share:.1f}" for share in coverage(draw, mean, n, arguments.draws))]
            for n in SIZES
            for mean in RATES
        ]
        head = ["prompts", "rate", "ours %", "ours, mean width", "Wilson %", "percentile bootstrap %"]
        parts += [f"## {kind}", table(head, [[*row[:3], f"{float(row[3]) / 100:.3f}", *row[4:]] for row in rows])]
        print(parts[-2], parts[-1], sep="\n", flush=True)
    if arguments.write:
        (ROOT / "benchmarks" / "intervals.md").write_text("\n\n".join(parts) + "\n")


def coverage(draw: Draw, mean: float, n: int, draws: int) -> tuple[float, float, float, float]:
    """Shares of draws whose interval holds the mean: ours, (then the mean width of ours), Wilson's, the bootstrap's."""
    rng = np.random.default_rng([_SEED, n, round(1000 * mean)])
    ours = wilson = bootstrap = 0
    width = 0.0
    for number in range(draws):
        scores = draw(rng, mean, n)
        found = _counted(round(float(scores.sum())), n) if draw is wins else rate(scores)
        ours += found.low <= mean <= found.high
        width += found.high - found.low
        value = float(np.mean(scores))
        # Wilson's interval holds the rates whose own deviation explains the distance.
        wilson += (value - mean) ** 2 <= 1.959963984540054**2 * mean * (1 - mean) / n
        if number < _BOOTSTRAPPED:
            # Only values and how often each is drawn matter.
            values, counts = np.unique(scores, return_counts=True)
            means = rng.multinomial(n, counts / n, _RESAMPLES) @ values / n
            low, high = np.quantile(means, [0.025, 0.975])
            bootstrap += low - 1e-12 <= mean <= high + 1e-12
    return ours / draws, width / draws, wilson / draws, bootstrap / min(draws, _BOOTSTRAPPED)


_counted = cache(proportion)  # of ones and zeros only their number matters


def _head(draws: int) -> str:
    found = environment(())
    return (
        "# How often the intervals hold\n\n"
        f"`python -m benchmarks.intervals`, {datetime.now(UTC):%Y-%m-%d}, commit {found['commit']}, numpy "
        f"{np.__version__}. Nominal 95%, {draws} draws a line (the bootstrap's {_BOOTSTRAPPED}); a "
        "share of 95% over 20,000 draws is itself known to ± 0.3."
    )


if __name__ == "__main__":
    main()
