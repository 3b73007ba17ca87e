"""`bootstrap` against SciPy's with the same draws, and against the confidence that an interval claims."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.stats

from unlatch import KernelError
from unlatch.compute.kernels.resampling import bootstrap


@pytest.mark.parametrize("n", [1, 2, 5, 50, 301])
@pytest.mark.parametrize(("statistic", "function"), [("mean", np.mean), ("median", np.median)])
def test_bootstrap_is_scipys_with_the_same_draws(n: int, statistic: str, function: Any) -> None:
    """The documented generator of the seed gives SciPy's results, resample by resample."""
    x = np.random.default_rng(n).exponential(size=n)
    x.setflags(write=False)
    found = bootstrap(x, statistic=statistic, confidence=0.9, resamples=1500, seed=7)
    draws = np.random.Generator(np.random.PCG64(7))
    resampled = [function(x[draws.integers(n, size=n)]) for _ in range(1500)]
    assert found.estimate == pytest.approx(float(function(x)))
    assert found.stderr == pytest.approx(float(np.std(resampled, ddof=1)), abs=1e-15)
    assert [found.low, found.high] == pytest.approx(np.quantile(resampled, [0.05, 0.95]).tolist())
    if n > 1:
        reference = scipy.stats.bootstrap(
            (x,), function, confidence_level=0.9, n_resamples=1500, method="percentile", rng=np.random.default_rng(7)
        )
        assert [found.low, found.high] == pytest.approx(list(reference.confidence_interval))
        assert found.stderr == pytest.approx(float(reference.standard_error))


def test_intervals_hold_as_often_as_they_say() -> None:
    """Of 300 samples' 80 % intervals about four fifths contain the true mean."""
    random = np.random.default_rng(4)
    held = 0
    for seed in range(300):
        _, _, low, high = bootstrap(random.standard_normal(60), confidence=0.8, resamples=400, seed=seed)
        held += bool(low <= 0 <= high)
    assert 0.72 < held / 300 < 0.86


def test_bootstrap_takes_integers() -> None:
    """Integers are taken as float64, and each output is a single number."""
    found = bootstrap(np.array([250, 251, 255], np.uint8), resamples=50)
    assert found.estimate == 252
    assert {(part.dtype, part.shape) for part in found} == {(np.dtype(np.float64), ())}


def test_memory_does_not_grow_with_resamples() -> None:
    """Four million draws, 32 MB of them, take a few megabytes."""
    tracemalloc.start()
    try:
        bootstrap(np.arange(100.0), resamples=40_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.zeros(0)}, "x: wanted at least one element, got none"),
        ({"x": np.array([1, np.nan])}, r"x: wanted finite elements, got nan at \[1\]"),
        ({"statistic": "mode"}, 'statistic: wanted "mean" or "median", got "mode"'),
        ({"confidence": 1.0}, "confidence: wanted a number between 0 and 1, got 1.0"),
        ({"confidence": np.nan}, "confidence: wanted a number between 0 and 1, got nan"),
        ({"resamples": 1}, "resamples: wanted 2 to 1000000, got 1"),
        ({"resamples": 1_000_001}, "resamples: wanted 2 to 1000000, got 1000001"),
        (
            {"x": np.zeros(2001), "resamples": 1_000_000},
            "resamples: wanted samples times resamples of at most 2000000000",
        ),
        ({"seed": -1}, "seed: wanted a finite number of at least 0, got -1"),
    ],
)
def test_bootstrap_refuses_what_tells_nothing(arguments: dict[str, Any], message: str) -> None:
    """Empty samples, impossible confidences and work out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        bootstrap(**{"x": np.ones(3)} | arguments)
