"""Wilson interval against worked numbers, the equation it solves, and exact coverage; McNemar, t, sign flips;
attainable shares."""

import itertools
import math

import pytest

from eval.confidence import (
    T_95,
    Z_95,
    are_disjoint,
    attainable_count,
    mcnemar_p_value,
    sign_flip_p_value,
    t_interval,
    wilson_interval,
)


def test_worked_numbers():
    # z = 2, n = 12, k = 3: p = 1/4, center = 1/4 + 4/24 = 5/12, scale = 1 + 4/12 = 4/3,
    # half = 2 * sqrt(3/16/12 + 4/576) = 2 * sqrt(9/576 + 4/576) = sqrt(13)/12.
    low, high = wilson_interval(3, 12, 2.0)
    assert low == pytest.approx((5 - math.sqrt(13)) / 16, abs=1e-15)
    assert high == pytest.approx((5 + math.sqrt(13)) / 16, abs=1e-15)


def test_published_example():
    # Newcombe 1998, table I, method 3 (score without continuity correction).
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, n, Z_95) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (1, 7), (34, 105), (150, 300), (299, 300), (300, 300)])
def test_bounds_solve_the_score_equation(successes, n):
    """The bounds are the p0 with |p - p0| = z * sqrt(p0 (1 - p0) / n): another form than the one implemented."""
    p = successes / n
    low, high = wilson_interval(successes, n, Z_95)
    for bound in (low, high):
        if bound not in (0.0, 1.0):
            assert abs(p - bound) == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert 0.0 <= low <= p <= high <= 1.0
    assert (low == 0.0) == (successes == 0) and (high == 1.0) == (successes == n)


def test_mirror_image_and_narrower_with_more_data():
    low, high = wilson_interval(17, 60, Z_95)
    assert wilson_interval(43, 60, Z_95) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    widths = [high - low for low, high in (wilson_interval(n // 3, n, Z_95) for n in (30, 300, 3000))]
    assert widths[0] > widths[1] > widths[2]


def test_ends_are_exact_for_every_n():
    for n in range(1, 500):
        assert wilson_interval(0, n, Z_95)[0] == 0.0 and wilson_interval(n, n, Z_95)[1] == 1.0


def test_coverage_is_near_95_percent():
    n = 60
    intervals = [wilson_interval(k, n, Z_95) for k in range(n + 1)]
    coverage = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if intervals[k][0] <= p <= intervals[k][1]
        )
        for p in (i / 100 for i in range(5, 96))
    ]
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.006)
    assert min(coverage) > 0.90


def test_z_95_is_the_97_5_percent_quantile():
    assert 0.5 * (1 + math.erf(Z_95 / math.sqrt(2))) == pytest.approx(0.975, abs=1e-14)


@pytest.mark.parametrize("successes, n, z", [(0, 0, 2.0), (-1, 5, 2.0), (6, 5, 2.0), (1, 5, 0.0), (1, 5, float("nan"))])
def test_impossible_counts_are_refused(successes, n, z):
    with pytest.raises(ValueError, match="found"):
        wilson_interval(successes, n, z)


def test_disjoint():
    assert are_disjoint((0.1, 0.2), (0.3, 0.4)) and are_disjoint((0.3, 0.4), (0.1, 0.2))
    assert not are_disjoint((0.1, 0.3), (0.3, 0.4)) and not are_disjoint((0.1, 0.9), (0.3, 0.4))
    assert not are_disjoint((0.3, 0.4), (0.1, 0.9))


# ---------------------------------------------------------------------------------------------------------------------
# McNemar


def test_mcnemar_worked_numbers():
    # 1 against 5: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64. 0 against 6: 2/64. Equal counts, or none at all: 1.
    assert mcnemar_p_value(1, 5) == mcnemar_p_value(5, 1) == 14 / 64
    assert mcnemar_p_value(0, 6) == 2 / 64
    assert mcnemar_p_value(0, 0) == mcnemar_p_value(3, 3) == mcnemar_p_value(1, 2) == 1.0


@pytest.mark.parametrize("first, second", [(0, 4), (1, 7), (2, 3), (5, 6), (0, 11)])
def test_mcnemar_counts_coin_throws(first, second):
    """Of all 2^d ways to split the differing records: the share that is at least as uneven as the one seen."""
    throws = [sum(throw) for throw in itertools.product((0, 1), repeat=first + second)]
    uneven = [heads for heads in throws if abs(2 * heads - first - second) >= abs(first - second)]
    assert mcnemar_p_value(first, second) == pytest.approx(len(uneven) / len(throws), abs=1e-15)


def test_mcnemar_of_thousands_of_records():
    # For large d the normal approximation with continuity correction: z = (|b - c| - 1) / sqrt(b + c).
    p = mcnemar_p_value(1000, 1100)
    assert p == pytest.approx(math.erfc(99 / math.sqrt(2100) / math.sqrt(2)), rel=2e-3)
    assert 0.0 <= mcnemar_p_value(0, 5000) < 1e-300
    with pytest.raises(ValueError, match="found counts -1 and 2"):
        mcnemar_p_value(-1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Attainable shares


def test_attainable_worked_numbers():
    assert attainable_count(87.72, 114, 2) == 100  # 100/114 = 87.719
    assert attainable_count(75.56, 114, 2) is None  # 86/114 = 75.439, 87/114 = 76.316
    assert attainable_count(0.0, 114, 2) == 0 and attainable_count(100.0, 114, 2) == 114
    assert attainable_count(43.45, 382, 2) is None and attainable_count(43.46, 382, 2) == 166  # 166/382 = 43.4555
    assert attainable_count(12.5, 8, 1) == 1 and attainable_count(12.5, 8, 2) == 1
    assert attainable_count(-0.01, 105, 2) is None and attainable_count(100.01, 105, 2) is None
    assert attainable_count(101.0, 100, 0) is None


@pytest.mark.parametrize("n, decimals", [(7, 1), (105, 2), (240, 2), (382, 2)])
def test_attainable_are_exactly_the_printed_shares(n, decimals):
    printed = {f"{100 * k / n:.{decimals}f}": k for k in range(n + 1)}
    units = 100 * 10**decimals
    halves = {units * k // n + up for k in range(n + 1) if 2 * units * k % n == 0 and units * k % n for up in (0, 1)}
    for step in range(units + 1):
        text = f"{step / 10**decimals:.{decimals}f}"
        assert step in halves or attainable_count(float(text), n, decimals) == printed.get(text)


def test_attainable_needs_records():
    with pytest.raises(ValueError, match="found n 0"):
        attainable_count(50.0, 0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# A few values, one per seed


def test_t_interval_by_hand():
    # 1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, t of 2 degrees of freedom = 4.3027
    assert t_interval([1, 2, 6]) == pytest.approx((3 - 4.3027 * math.sqrt(7 / 3), 3 + 4.3027 * math.sqrt(7 / 3)))
    assert t_interval([5, 5]) == (5, 5)
    assert t_interval([0, 2]) == pytest.approx((1 - 12.7062, 1 + 12.7062))  # s / sqrt(2) = 1
    for values in ([], [1.0], [1.0] * 21):
        with pytest.raises(ValueError, match="expected 2 to 20"):
            t_interval(values)


@pytest.mark.parametrize("freedom", range(1, 20))
def test_quantiles_of_t_leave_two_and_a_half_percent(freedom):
    """The density integrated by the midpoint rule, with x = sqrt(freedom) tan(angle), which makes the range finite."""
    n_slices, end = 2000, math.atan(T_95[freedom - 1] / math.sqrt(freedom))
    middles = [(i + 0.5) * end / n_slices for i in range(n_slices)]
    area = math.fsum(math.cos(angle) ** (freedom - 1) for angle in middles) * end / n_slices
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    assert 0.5 + scale * area == pytest.approx(0.975, abs=3e-6)  # of a quantile rounded to 4 digits


def test_sign_flips_by_hand():
    assert sign_flip_p_value([1, 1, 1]) == 2 / 8
    assert sign_flip_p_value([3, 1, -1]) == 6 / 8  # sums of the 8: 5 3 3 1 and their negatives; |sum| >= 3
    assert sign_flip_p_value([2, -2]) == 1 and sign_flip_p_value([0, 0, 4]) == 1 and sign_flip_p_value([]) == 1
    assert sign_flip_p_value([7] * 10) == 2 / 1024


def test_sign_flips_against_all_choices():
    for differences in ([5, -3, 8, 0, 2], [-9, -4, -4, 1], [12, 7, -1, -1, 3, 30]):
        sums = [
            sum(sign * each for sign, each in zip(signs, differences))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        extreme = [each for each in sums if abs(each) >= abs(sum(differences))]
        assert sign_flip_p_value(differences) == len(extreme) / len(sums)
