"""Confidence interval of a share k/n (E20, docs/evaluation.md), tests of paired runs, which percentages k/n can be.

Wilson's score interval instead of p +- z * sqrt(p (1 - p) / n): the latter has zero width at k = 0 and k = n, where
evaluations of small sets often end, and reaches outside [0, 1].
"""

import math
from collections import Counter
from collections.abc import Sequence

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution: two-sided 95 %
# 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930),
)


def wilson_interval(successes: int, n: int, z: float) -> tuple[float, float]:
    """Bounds (low, high), as shares in [0, 1], of Wilson's score interval for `successes` out of `n` trials.

        (p + z^2 / 2n +- z * sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  p = successes / n        (E20)

    `z` is the normal quantile, e.g. Z_95. Source: Wilson 1927. Raises ValueError unless 0 <= successes <= n, n >= 1
    and z > 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"found {successes} successes of {n}, expected 0 <= successes <= n and n >= 1")
    if not z > 0:
        raise ValueError(f"found z {z}, expected a positive normal quantile")
    p = successes / n
    center = p + z * z / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # E20; the two ends are exact in mathematics, rounding would leave 1e-17 or 1.0000000000000002.
    low = 0.0 if successes == 0 else (center - half_width) / scale
    high = 1.0 if successes == n else (center + half_width) / scale
    return low, high


def are_disjoint(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """True if the closed intervals (low, high) share no point."""
    return first[1] < second[0] or second[1] < first[0]


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: `only_first` records that only the first run has right, and the reverse.

        p = min(1, 2 * sum_{i=0}^{min} C(d, i) / 2^d),   d = only_first + only_second

    Two equally good runs would split the d records on which they differ as d throws of a coin; records that both have
    right, or both wrong, say nothing. So this finds differences that two intervals, which ignore the pairing, do not. 1
    where d = 0. Source: McNemar 1947, exact binomial form. Raises ValueError for negative counts.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"found counts {only_first} and {only_second}, expected at least 0")
    differing, term, tail = only_first + only_second, 1, 0
    for i in range(min(only_first, only_second) + 1):  # integers: 2^-d is 0 in floating point from d = 1075 on
        tail += term
        term = term * (differing - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << differing))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two-sided 95 % interval (low, high) of the mean of a few independent values, such as one per training seed.

        mean +- t * s / sqrt(n),   s with n - 1 in its denominator, t of T_95 with n - 1 degrees of freedom

    Assumes normal values. Source: Student 1908. Raises ValueError unless there are 2 to 20 values.
    """
    n = len(values)
    if not 2 <= n <= len(T_95) + 1:
        raise ValueError(f"found {n} values, expected 2 to {len(T_95) + 1}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half_width = T_95[n - 2] * deviation / math.sqrt(n)
    return mean - half_width, mean + half_width


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Two-sided p of the exact sign-flip test (Fisher's randomization test) of paired differences, one per seed.

        p = share of the 2^n choices of signs with |sum of +- d_i| >= |sum of d_i|

    Were both methods equal, each difference would be as likely with the other sign. No p is below 2 / 2^n. The
    differences are integers, here counts of records, so that equal sums are equal. Source: Fisher 1935. 1 for none.
    """
    n_choices = Counter({0: 1})  # sum -> choices of signs that give it
    for difference in differences:
        longer = Counter()
        for total, count in n_choices.items():
            longer[total + difference] += count
            longer[total - difference] += count
        n_choices = longer
    extreme = sum(count for total, count in n_choices.items() if abs(total) >= abs(sum(differences)))
    return extreme / 2 ** len(differences)


def attainable_count(percent: float, n: int, decimals: int) -> int | None:
    """The k whose share of `n` reads `percent` with `decimals` digits, None if there is none.

    A printed percentage that no k/n gives has another denominator than stated, or a slip: 75.56 is not k/114. Rounding
    at exactly half may go either way. Raises ValueError unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"found n {n}, expected at least 1")
    count = round(percent * n / 100)
    tolerance = 0.5 * 10**-decimals * (1 + 1e-9) + 1e-9
    return count if 0 <= count <= n and abs(100 * count / n - percent) <= tolerance else None
