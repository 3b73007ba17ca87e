"""Prices of options, by simulation."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from unlatch import KernelError, kernel
from unlatch.compute.kernels.refusals import require_at_least, require_between, require_choice, require_work

_MAX_PATHS = 100_000_000
# A payoff takes one to two nanoseconds: the limit is a few seconds on one core.
_MAX_PAYOFFS = 1_000_000_000

# Draws are made in blocks of this many, and priced for as many spots as keep payoffs in the cache: memory does not grow
# with the number of paths. Neither number changes the draws of a seed.
_BLOCK_PATHS = 16_384
_BLOCK_PAYOFFS = 65_536

# Beyond these the exponentials exceed float64, or no number of paths would find the few that pay.
_MAX_EXPONENT = 700.0
_MAX_DEVIATION = 100.0


class OptionPrice(NamedTuple):
    """The estimated price and its standard error, in the unit of the spot price."""

    price: Float64[np.ndarray, "n"]
    stderr: Float64[np.ndarray, "n"]


@kernel(pure=True)
def monte_carlo_option(
    spot: Float64[np.ndarray, "n"],
    *,
    strike: float,
    rate: float = 0.0,
    volatility: float = 0.2,
    maturity: float = 1.0,
    paths: int = 100_000,
    seed: int = 0,
    kind: str = "call",
) -> OptionPrice:
    """Price a European option for each of several spot prices, by simulating geometric Brownian motion.

    `spot` has shape (n,), `strike` is in its unit; `rate` (continuously compounded) and `volatility` are per year,
    `maturity` is in years; `kind` is "call" or "put". `price` and `stderr` have shape (n,). All spots share the same
    `paths` draws, so differences between them (a delta, say) are smoother than each price. The same arguments and
    `seed` give the same draws: `numpy.random.Generator(PCG64(seed))`.

    Raises `KernelError` for a spot, strike, volatility or maturity that is negative, for anything not finite, for paths
    outside 2 to 100 million or more than a billion payoffs (spots times paths), for a negative seed, an unknown kind,
    and for a rate or volatility that leaves float64 over the maturity. Source: P. Boyle, "Options: A Monte Carlo
    approach", Journal of Financial Economics 4 (1977).
    """
    _check_terms(strike, rate, volatility, maturity, kind)
    _check_simulation(spot, paths, seed)
    if len(spot) == 0:
        return OptionPrice(np.empty(0), np.empty(0))
    # Spots are present prices: discounting the strike cancels the rate's growth of the spot.
    discounted_strike = strike * math.exp(-rate * maturity)
    if math.isinf(discounted_strike):
        raise KernelError(f"strike: wanted one whose discounted value float64 can hold, got {strike}")
    deviation = volatility * math.sqrt(maturity)
    sign = 1.0 if kind == "call" else -1.0
    with np.errstate(over="ignore", invalid="ignore"):
        price, stderr = _simulate(sign * spot, sign * discounted_strike, deviation, paths, seed)
    if not (np.isfinite(price).all() and np.isfinite(stderr).all()):
        raise KernelError(f"spot: wanted prices whose payoffs float64 can hold, got some up to {spot.max()}")
    return OptionPrice(price, stderr)


def _simulate(
    spot: np.ndarray, strike: float, deviation: float, paths: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.Generator(np.random.PCG64(seed))
    # Payoffs are summed as differences from the middle path's, since squares of large, similar payoffs would cancel.
    middle = np.maximum(spot * math.exp(-0.5 * deviation**2) - strike, 0.0)
    total, total_squares = np.zeros_like(spot), np.zeros_like(spot)
    for first in range(0, paths, _BLOCK_PATHS):
        growth = draws.standard_normal(min(_BLOCK_PATHS, paths - first))
        growth *= deviation
        growth -= 0.5 * deviation**2
        np.exp(growth, out=growth)
        _add_payoffs(spot, strike, growth, middle, total, total_squares)
    variance = np.maximum(total_squares - total**2 / paths, 0.0) / (paths - 1)
    return middle + total / paths, np.sqrt(variance / paths)


def _add_payoffs(
    spot: np.ndarray, strike: float, growth: np.ndarray, middle: np.ndarray, total: np.ndarray, squares: np.ndarray
) -> None:
    block_spots = max(1, _BLOCK_PAYOFFS // len(growth))
    for first in range(0, len(spot), block_spots):
        block = slice(first, first + block_spots)
        payoffs = spot[block, np.newaxis] * growth
        payoffs -= strike
        np.maximum(payoffs, 0.0, out=payoffs)
        payoffs -= middle[block, np.newaxis]
        total[block] += payoffs.sum(axis=1)
        squares[block] += np.einsum("ij,ij->i", payoffs, payoffs)


def _check_terms(strike: float, rate: float, volatility: float, maturity: float, kind: str) -> None:
    for name, value in (("strike", strike), ("volatility", volatility), ("maturity", maturity)):
        require_at_least(name, value, 0)
    if not abs(rate * maturity) <= _MAX_EXPONENT:
        raise KernelError(
            f"rate: wanted a finite one with rate * maturity between -{_MAX_EXPONENT} and {_MAX_EXPONENT}, "
            f"got {rate} over a maturity of {maturity}"
        )
    if volatility * math.sqrt(maturity) > _MAX_DEVIATION:
        raise KernelError(
            f"volatility: wanted volatility * sqrt(maturity) of at most {_MAX_DEVIATION}, "
            f"got {volatility} over a maturity of {maturity}"
        )
    require_choice("kind", kind, ("call", "put"))


def _check_simulation(spot: np.ndarray, paths: int, seed: int) -> None:
    require_between("paths", paths, 2, _MAX_PATHS)
    require_work("paths", "spots times paths", len(spot) * paths, _MAX_PAYOFFS)
    require_at_least("seed", seed, 0)
    wrong = np.flatnonzero(~(np.isfinite(spot) & (spot >= 0)))
    if len(wrong):
        raise KernelError(f"spot: wanted finite prices of at least 0, got {spot[wrong[0]]} at [{wrong[0]}]")
