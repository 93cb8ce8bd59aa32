"""Statistics over seeds: mean and standard deviation, paired differences with a bootstrap interval, ranks.

Plain numbers in, plain numbers out; nothing here knows what a run is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

#: resamples drawn where there are too many to take each one
RESAMPLES = 10_000
#: pairs up to which every resample is taken once, so that the interval is exact: 6^6 = 46,656
EXACT_PAIRS = 6
#: pairs below which a signed-rank test could not reach p < 0.05: with 5 its least p is 2 / 32
WILCOXON_PAIRS = 6
#: the most significant digits that a metric of a run is taken to have, to tell a tie from a difference
DIGITS = 12


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        count: how many.
        mean: their mean.
        sd: standard deviation with n - 1 in the denominator; None for a single value.
    """

    count: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class PairedDifference:
    """Differences of two models' values, seed by seed.

    Attributes:
        pairs: seeds that both have.
        mean: mean difference.
        low: lower end of the bootstrap interval; None with fewer than two pairs.
        high: its upper end.
        level: the interval's nominal level.
        p_value: of the two-sided Wilcoxon signed-rank test; None with fewer than six differences that are not 0.
        note: what to say beside it about how far it can be trusted; empty if nothing.
    """

    pairs: int
    mean: float
    low: float | None
    high: float | None
    level: float
    p_value: float | None
    note: str


def spread(values: ListOf[float]) -> Spread:
    """Mean and standard deviation.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    numbers = _finite(values)
    sd = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
    return Spread(len(numbers), float(numbers.mean()), sd)


def paired_difference(
    values: Mapping[int, float], base: Mapping[int, float], level: float = 0.95, seed: int = 0
) -> PairedDifference | None:
    """How much ``values`` exceed ``base``, over the seeds that both have; None if they share none.

    Args:
        values: seed to value.
        base: the same of what is compared with.
        level: of the interval.
        seed: of the resamples, where they are drawn.

    Raises:
        ValueError: a value is not finite, or ``level`` not between 0 and 1.
    """
    common = sorted(values.keys() & base.keys())
    if not common:
        return None
    differences = _finite([values[s] for s in common]) - _finite([base[s] for s in common])
    interval = bootstrap_interval(differences.tolist(), level, seed)
    low, high = interval if interval else (None, None)
    return PairedDifference(
        len(common), float(differences.mean()), low, high, level, wilcoxon(differences.tolist()), trust(len(common), level)
    )


def bootstrap_interval(values: ListOf[float], level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean; None for a single value.

    Up to `EXACT_PAIRS` values, all n^n resamples are taken, and the interval is exact; beyond, `RESAMPLES` are drawn.
    BCa is not used: its acceleration is estimated from n leave-one-out means, which says nothing with a few seeds.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Raises:
        ValueError: no values, one that is not finite, or ``level`` not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level}: must be between 0 and 1")
    numbers = _finite(values)
    n = len(numbers)
    if n == 1:
        return None
    if n <= EXACT_PAIRS:
        rows = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        rows = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    means = np.sort(numbers[rows].mean(axis=1))
    tail = (1 - level) / 2
    outside = math.floor(tail * len(means) * (1 + 1e-12))  # resamples beyond each end, as many above as below
    return float(means[outside]), float(means[-1 - outside])


def trust(pairs: int, level: float = 0.95) -> str:
    """What to say about a bootstrap interval of so few pairs; empty from ten on."""
    if pairs == 1:
        return "1 seed: no interval can be drawn"
    if pairs == 2:
        return "2 seeds: unreliable, such an interval holds the true difference in about half of all cases"
    if pairs < 10:
        real = real_level(pairs, level)
        return f"{pairs} seeds: such an interval holds the true difference in about {real:.0%} of cases, not {level:.0%}"
    return ""


def real_level(pairs: int, level: float = 0.95) -> float:
    """How often a percentile bootstrap interval of that nominal level holds the mean of normal differences.

    It is about ``z sd sqrt((n - 1) / n) / sqrt(n)`` on either side, where Student's interval has ``t sd / sqrt(n)``;
    with fewer than four pairs at 95 % it cannot reach beyond the least and the greatest of them, which leaves out the mean
    of a symmetric distribution in ``2^(1 - n)`` of all cases.
    """
    from scipy.stats import norm, t

    if pairs ** -float(pairs) > (1 - level) / 2:
        return 1 - 2.0 ** (1 - pairs)
    reach = norm.ppf((1 + level) / 2) * math.sqrt((pairs - 1) / pairs)
    return float(2 * t.cdf(reach, pairs - 1) - 1)


def wilcoxon(differences: ListOf[float]) -> float | None:
    """Exact two-sided p-value of Wilcoxon's signed-rank test; None with fewer than `WILCOXON_PAIRS` differences but 0.

    Differences of 0 are left out; equal sizes share the mean of their ranks, and the distribution of the rank sum is taken
    over all signs of these very ranks.

    Source: Wilcoxon, Individual Comparisons by Ranking Methods (1945).
    """
    numbers = np.array([d for d in _finite(differences) if d != 0])
    if len(numbers) < WILCOXON_PAIRS:
        return None
    doubled = [round(2 * rank) for rank in ranks(np.abs(numbers).tolist(), higher_is_better=False)]
    ways = [1] + [0] * sum(doubled)  # ways[s]: how many choices of signs give the positive ranks the sum s / 2
    for rank in doubled:
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    positive = sum(rank for rank, number in zip(doubled, numbers, strict=True) if number > 0)
    smaller = min(positive, sum(doubled) - positive)
    return min(1.0, 2 * sum(ways[: smaller + 1]) / 2 ** len(numbers))


def ranks(values: ListOf[float], higher_is_better: bool = True) -> list[float]:
    """Rank of each value, 1 the best; equal ones, to `DIGITS` digits, share the mean of their ranks."""
    keys = [float(f"{-value if higher_is_better else value:.{DIGITS}g}") for value in _finite(values)]
    ordered = sorted(keys)
    return [ordered.index(key) + (ordered.count(key) + 1) / 2 for key in keys]


def _finite(values: ListOf[float]) -> Numbers:
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("statistics need at least one value, and finite ones")
    return numbers
