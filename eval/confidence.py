"""Confidence interval of a share k/n (E20, docs/evaluation.md).

Wilson's score interval instead of p +- z * sqrt(p (1 - p) / n): the latter has zero width at k = 0 and k = n, where
evaluations of small sets often end, and reaches outside [0, 1].
"""
import math

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution: two-sided 95 %


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
