"""Statistics over seeds, against figures worked out by hand."""

import itertools

import numpy as np
import pytest

from model_zoo.experiment.statistics import (
    bootstrap_interval,
    paired_difference,
    ranks,
    real_level,
    spread,
    trust,
    wilcoxon,
)


def test_mean_and_deviation() -> None:
    found = spread([1.0, 2.0, 4.0, 5.0])
    assert (found.count, found.mean) == (4, 3.0) and found.sd == pytest.approx((10 / 3) ** 0.5)
    assert spread([2.5]).sd is None
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            spread(values)


def test_differences_are_paired_by_seed() -> None:
    # sorted by value the seeds would pair otherwise; by seed the differences are 3, 1 and 2
    found = paired_difference({1: 10.0, 2: 2.0, 3: 6.0, 9: 99.0}, {3: 4.0, 2: 1.0, 1: 7.0, 5: 0.0})
    assert found is not None and (found.pairs, found.mean, found.low, found.high) == (3, 2.0, 1.0, 3.0)
    assert found.p_value is None and "75%" in found.note
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_one_pair_has_no_interval_and_two_are_unreliable() -> None:
    one = paired_difference({1: 2.0}, {1: 1.0})
    assert one is not None and (one.mean, one.low, one.high) == (1.0, None, None) and "no interval" in one.note
    two = paired_difference({1: 2.0, 2: 4.0}, {1: 1.0, 2: 1.0})
    assert two is not None and (two.low, two.high) == (1.0, 3.0) and "unreliable" in two.note
    assert trust(10) == ""


def test_the_interval_of_few_pairs_is_exact() -> None:
    # at 80 %, 0.1 * 27 = 2.7 of the 27 resample means are left out on either side: two, which leaves the third
    means = sorted(sum(draw) / 3 for draw in itertools.product([0.0, 3.0, 9.0], repeat=3))
    assert means[:5] == [0, 1, 1, 1, 2] and bootstrap_interval([0.0, 3.0, 9.0], 0.8) == (means[2], means[-3])
    assert bootstrap_interval([0.0, 3.0, 9.0], 0.8, seed=1) == bootstrap_interval([9.0, 0.0, 3.0], 0.8)
    # at 50 %, a quarter of the four means 0, 1, 1, 2 is left out on either side
    assert bootstrap_interval([0.0, 2.0], 0.5) == (1.0, 1.0)
    assert bootstrap_interval([4.0, 4.0, 4.0]) == (4.0, 4.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval([1.0, 2.0], 1.0)


def test_the_interval_of_many_pairs_is_seeded_and_normal() -> None:
    values = np.random.default_rng(5).normal(1.0, 2.0, 200).tolist()
    low, high = bootstrap_interval(values, seed=3) or (0.0, 0.0)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    reach = 1.96 * np.std(values) / 200**0.5  # its end is a quantile of 10,000 means: some 2 % of the reach off
    assert low == pytest.approx(np.mean(values) - reach, abs=0.1 * reach)
    assert high == pytest.approx(np.mean(values) + reach, abs=0.1 * reach)


@pytest.mark.parametrize("pairs", [2, 3, 4, 5])
def test_how_often_an_interval_holds_the_truth(pairs: int) -> None:
    draws = np.random.default_rng(0).normal(size=(400, pairs))
    held = [low <= 0 <= high for low, high in (bootstrap_interval(row.tolist()) or (0, 0) for row in draws)]
    assert np.mean(held) == pytest.approx(real_level(pairs), abs=0.07)  # three deviations of 400 draws


def test_signed_ranks() -> None:
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) is None and wilcoxon([0.0] + [1.0] * 5) is None
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 2 / 64
    # the rank sum 1 of the negative has the sets {} and {1} at or below it: 2 of 64, and as many above
    assert wilcoxon([-1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 4 / 64
    # six equal sizes share rank 3.5; one negative: 1 + 6 of the 64 sign patterns are as extreme
    assert wilcoxon([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]) == 14 / 64
    assert wilcoxon([1.0, -1.0, 2.0, -2.0, 3.0, -3.0]) == 1.0


def test_signed_ranks_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.3, 1, 12)
        assert wilcoxon(values.tolist()) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue, abs=1e-12)


def test_ranks() -> None:
    assert ranks([0.70, 0.72, 0.71]) == [3, 1, 2] and ranks([0.70, 0.72, 0.71], higher_is_better=False) == [1, 3, 2]
    assert ranks([0.7, 0.9, 0.7, 0.8]) == [3.5, 1, 3.5, 2] and ranks([1.0]) == [1]
    assert ranks([0.1 + 0.2, 0.3]) == [1.5, 1.5]  # rounding is no victory
