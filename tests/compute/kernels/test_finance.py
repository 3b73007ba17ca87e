"""`monte_carlo_option` against the Black-Scholes formula."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from unlatch import KernelError
from unlatch.compute.kernels.finance import monte_carlo_option

TERMS: dict[str, Any] = {"strike": 100.0, "rate": 0.03, "volatility": 0.25, "maturity": 1.5}


def black_scholes(
    spot: np.ndarray, kind: str, *, strike: float, rate: float, volatility: float, maturity: float
) -> np.ndarray[Any, Any]:
    """Compute a European option's price in closed form."""
    deviation = volatility * math.sqrt(maturity)
    d1 = (np.log(spot / strike) + rate * maturity) / deviation + deviation / 2
    sign = 1 if kind == "call" else -1
    discount = math.exp(-rate * maturity)
    return np.asarray(sign * (spot * norm.cdf(sign * d1) - strike * discount * norm.cdf(sign * (d1 - deviation))))


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["call", "put"]),
    rate=st.floats(-0.1, 0.2),
    volatility=st.floats(0.05, 0.8),
    maturity=st.floats(0.1, 3),
)
def test_price_is_black_scholes(kind: str, rate: float, volatility: float, maturity: float) -> None:
    """Prices lie within five standard errors of the closed form, at the money and on both sides of it."""
    spot = np.array([90.0, 100.0, 115.0])
    spot.setflags(write=False)
    terms = {"strike": 100.0, "rate": rate, "volatility": volatility, "maturity": maturity}
    price, stderr = monte_carlo_option(spot, paths=40_000, seed=11, kind=kind, **terms)
    # The second term is for payoffs so rare that the sample says little about its own error.
    assert (np.abs(price - black_scholes(spot, kind, **terms)) <= 5 * stderr + 0.02).all()


def test_errors_are_as_large_as_they_say() -> None:
    """Over 200 seeds the errors in units of the standard error have mean 0 and deviation 1."""
    spot = np.array([105.0])
    exact = black_scholes(spot, "call", **TERMS)
    estimates = [monte_carlo_option(spot, paths=4000, seed=seed, **TERMS) for seed in range(200)]
    scores = np.array([(price[0] - exact[0]) / stderr[0] for price, stderr in estimates])
    assert abs(scores.mean()) < 4 / math.sqrt(200)
    assert 0.8 < scores.std() < 1.2


@pytest.mark.parametrize("kind", ["call", "put"])
def test_price_is_the_mean_of_the_payoffs(kind: str) -> None:
    """Blocks of paths and spots give the price that one array of all payoffs gives, for the seed's documented draws."""
    spot = np.linspace(0, 200, 13)
    price, stderr = monte_carlo_option(spot, paths=50_001, seed=5, kind=kind, **TERMS)
    normal = np.random.Generator(np.random.PCG64(5)).standard_normal(50_001)
    rate, volatility, maturity = TERMS["rate"], TERMS["volatility"], TERMS["maturity"]
    drift = (rate - volatility**2 / 2) * maturity
    final = spot[:, np.newaxis] * np.exp(drift + volatility * math.sqrt(maturity) * normal)
    gain = final - TERMS["strike"] if kind == "call" else TERMS["strike"] - final
    payoffs = np.maximum(gain, 0) * math.exp(-rate * maturity)
    np.testing.assert_allclose(price, payoffs.mean(axis=1), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(stderr, payoffs.std(axis=1, ddof=1) / math.sqrt(50_001), rtol=1e-9, atol=1e-12)


def test_a_seed_is_a_price() -> None:
    """The same seed gives the same bits, and another seed gives others."""
    spot = np.array([100.0, 101.0])
    first, again, other = (monte_carlo_option(spot, paths=20_000, seed=seed, **TERMS) for seed in (3, 3, 4))
    assert first.price.tobytes() == again.price.tobytes()
    assert (first.price != other.price).all()


def test_memory_does_not_grow_with_paths() -> None:
    """Two million paths for ten spots, 160 MB of payoffs, take a few megabytes."""
    tracemalloc.start()
    try:
        monte_carlo_option(np.full(10, 100.0), paths=2_000_000, **TERMS)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4e6


@pytest.mark.parametrize("still", ["volatility", "maturity"])
def test_what_cannot_move_has_no_error(still: str) -> None:
    """Without volatility or time the price is the discounted payoff, exactly."""
    terms = TERMS | {still: 0.0}
    price, stderr = monte_carlo_option(np.array([0.0, 90.0, 120.0]), paths=1000, **terms)
    strike = terms["strike"] * math.exp(-terms["rate"] * terms["maturity"])
    np.testing.assert_array_equal(price, np.maximum(np.array([0.0, 90.0, 120.0]) - strike, 0))
    np.testing.assert_array_equal(stderr, 0)


def test_a_tiny_volatility_keeps_its_error() -> None:
    """Large and nearly equal payoffs do not cancel in the standard error."""
    _, stderr = monte_carlo_option(np.array([1e6]), strike=1.0, volatility=1e-9, paths=100_000)
    np.testing.assert_allclose(stderr, 1e6 * 1e-9 / math.sqrt(100_000), rtol=0.02)


def test_no_spots_have_no_prices() -> None:
    """An empty array of spots gives empty prices."""
    price, stderr = monte_carlo_option(np.array([]), paths=100_000_000, **TERMS)
    assert price.shape == stderr.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strike": -1.0}, "strike: wanted a finite number of at least 0, got -1.0"),
        ({"strike": math.nan}, "strike: wanted a finite number"),
        ({"volatility": math.inf}, "volatility: wanted a finite number"),
        ({"maturity": -0.5}, "maturity: wanted a finite number"),
        ({"rate": math.nan}, "rate: wanted a finite one"),
        ({"rate": -1000.0}, "rate: .* between -700.0 and 700.0, got -1000.0"),
        ({"strike": 1e300, "rate": -600.0, "maturity": 1.0}, "strike: .* discounted value float64 can hold"),
        ({"volatility": 101.0, "maturity": 1.0}, "volatility: wanted .* at most 100.0, got 101.0"),
        ({"paths": 1}, "paths: wanted 2 to 100000000, got 1"),
        ({"paths": 100_000_001}, "paths: wanted 2 to 100000000, got 100000001"),
        (
            {"spot": np.ones(1001), "paths": 1_000_000},
            "paths: wanted spots times paths of at most 1000000000, got 1001000000",
        ),
        ({"seed": -1}, "seed: wanted a finite number of at least 0, got -1"),
        ({"kind": "digital"}, 'kind: wanted "call" or "put", got "digital"'),
        ({"spot": np.array([1.0, np.nan])}, r"spot: wanted finite prices of at least 0, got nan at \[1\]"),
        ({"spot": np.array([-2.0])}, r"spot: .* got -2.0 at \[0\]"),
        ({"spot": np.array([1e308])}, r"spot: wanted prices whose payoffs float64 can hold"),
    ],
)
def test_what_cannot_be_priced_is_refused(arguments: dict[str, Any], message: str) -> None:
    """An impossible value, or work out of proportion, is refused by name."""
    with pytest.raises(KernelError, match=message):
        monte_carlo_option(**{"spot": np.array([100.0])} | TERMS | arguments)
