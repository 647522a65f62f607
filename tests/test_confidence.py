"""Wilson interval against worked numbers, the equation it solves, and exact binomial coverage."""
import math

import pytest

from eval.confidence import Z_95, are_disjoint, wilson_interval


def test_worked_numbers():
    # z = 2, n = 12, k = 3: p = 1/4, center = 1/4 + 4/24 = 5/12, scale = 1 + 4/12 = 4/3,
    # half = 2 * sqrt(3/16/12 + 4/576) = 2 * sqrt(9/576 + 4/576) = sqrt(13)/12.
    low, high = wilson_interval(3, 12, 2.0)
    assert low == pytest.approx((5 - math.sqrt(13)) / 16, abs=1e-15)
    assert high == pytest.approx((5 + math.sqrt(13)) / 16, abs=1e-15)


def test_published_example():
    # Newcombe 1998, table I, method 3 (score without continuity correction).
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)):
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
    coverage = [sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)
                    if intervals[k][0] <= p <= intervals[k][1]) for p in (i / 100 for i in range(5, 96))]
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
