"""Confidence in an estimate, by resampling its sample."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Real

from unlatch import KernelError, kernel
from unlatch.compute.kernels.refusals import (
    require_at_least,
    require_between,
    require_choice,
    require_finite,
    require_work,
)

_MAX_RESAMPLES = 1_000_000
# A draw takes 5 to 30 nanoseconds: the limit is a minute at worst.
_MAX_DRAWS = 2_000_000_000

# Draws are made in blocks of this many, so memory does not grow with the resamples. A seed's draws do not depend on it.
_BLOCK_DRAWS = 65_536


class BootstrapEstimate(NamedTuple):
    """The sample's statistic, its standard error, and the ends of its interval."""

    estimate: Float64[np.ndarray, ""]
    stderr: Float64[np.ndarray, ""]
    low: Float64[np.ndarray, ""]
    high: Float64[np.ndarray, ""]


@kernel(pure=True)
def bootstrap(
    x: Real[np.ndarray, "n"],
    *,
    statistic: str = "mean",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> BootstrapEstimate:
    """Compute a confidence interval of a sample's mean or median, by bootstrap: resampling with replacement.

    `x` has shape (n,) and finite elements; integers are taken as float64. `statistic` is "mean" or "median". `low` and
    `high` are the percentiles that leave out the same share of all `resamples` at both ends, `stderr` is their standard
    deviation; all are single float64 numbers, in `x`'s unit. The same arguments and `seed` give the same result:
    `numpy.random.Generator(PCG64(seed))`.

    Raises `KernelError` for an empty `x`, for elements that are not finite, for a confidence that is not between 0 and
    1, for resamples outside 2 to a million, for n x resamples above 2 * 10**9, for a negative seed and for another
    statistic. Source: B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979)
    (`scipy.stats.bootstrap` with `method="percentile"`).
    """
    require_choice("statistic", statistic, ("mean", "median"))
    require_between("resamples", resamples, 2, _MAX_RESAMPLES)
    require_work("resamples", "samples times resamples", len(x) * resamples, _MAX_DRAWS)
    require_at_least("seed", seed, 0)
    if not 0 < confidence < 1:
        raise KernelError(f"confidence: wanted a number between 0 and 1, got {confidence}")
    if len(x) == 0:
        raise KernelError("x: wanted at least one element, got none")
    require_finite("x", x)
    sample = x.astype(np.float64, copy=False)
    summary = np.mean if statistic == "mean" else np.median
    with np.errstate(over="ignore", invalid="ignore"):
        drawn = _drawn(sample, statistic, resamples, np.random.Generator(np.random.PCG64(seed)))
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        return BootstrapEstimate(*(np.asarray(value) for value in (summary(sample), drawn.std(ddof=1), low, high)))


def _drawn(sample: np.ndarray, statistic: str, resamples: int, draws: np.random.Generator) -> np.ndarray:
    """The statistic of each resample."""
    found = np.empty(resamples)
    block_resamples = max(1, _BLOCK_DRAWS // len(sample))
    for first in range(0, resamples, block_resamples):
        out = found[first : first + block_resamples]
        resampled = np.take(sample, draws.integers(len(sample), size=(len(out), len(sample))))
        if statistic == "mean":
            resampled.mean(axis=1, out=out)
        else:
            out[...] = _medians(resampled)
    return found


def _medians(rows: np.ndarray) -> np.ndarray:
    upper = rows.shape[1] // 2
    if rows.shape[1] % 2:
        rows.partition(upper, axis=1)
        return rows[:, upper]
    rows.partition(upper, axis=1)
    below: np.ndarray = rows[:, :upper].max(axis=1)
    return below / 2 + rows[:, upper] / 2
