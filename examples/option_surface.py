"""A European call's price over strike and volatility, simulated on all workers and compared with Black and Scholes.

A map has the same scalars for all its calls, and each call has its own arrays. So each volatility is a map, and strikes
become spots: a price scales with spot and strike, so the price for strike k at spot s is k times that for strike 1 at
spot s / k.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import ndtr
from served import arguments, served

from unlatch import BlockingClient

SPOT, MATURITY, PATHS = 100.0, 1.0, 100_000
STRIKES, VOLATILITIES = np.linspace(60.0, 140.0, 33), np.linspace(0.05, 0.6, 23)
CALLS = 4  # of one map


def simulated(mesh: BlockingClient, volatility: float) -> tuple[np.ndarray, np.ndarray]:
    """Price and standard error for every strike."""
    spots = np.array_split(SPOT / STRIKES, CALLS)
    terms: dict[str, Any] = {"strike": 1.0, "volatility": volatility, "maturity": MATURITY, "paths": PATHS}
    price, stderr = np.concatenate(list(mesh.map("monte_carlo_option", spots, **terms)), axis=1)
    return STRIKES * price, STRIKES * stderr


def black_scholes(strike: np.ndarray, volatility: np.ndarray) -> np.ndarray:
    """The exact price, without interest: F. Black, M. Scholes, Journal of Political Economy 81 (1973)."""
    deviation = volatility * np.sqrt(MATURITY)
    d1 = np.log(SPOT / strike) / deviation + deviation / 2
    return np.asarray(SPOT * ndtr(d1) - strike * ndtr(d1 - deviation))


def main(output: Path, server: str) -> None:
    """Compute the prices, save their picture, and print the largest error."""
    with served(server) as at:
        price, stderr = np.stack([simulated(at.mesh, float(volatility)) for volatility in VOLATILITIES], axis=1)
    strike, volatility = np.meshgrid(STRIKES, VOLATILITIES)
    error = np.abs(price - black_scholes(strike, volatility))
    worst = np.unravel_index(error.argmax(), error.shape)
    print(f"{price.size} prices, largest error {error[worst]:.4f} ({error[worst] / stderr[worst]:.1f} standard errors)")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d")
    axes.plot_surface(strike, volatility, price, cmap="viridis", rcount=50, ccount=50)
    axes.set(xlabel="strike", ylabel="volatility", zlabel="price of a call", title=f"spot {SPOT:g}")
    axes.view_init(elev=24, azim=-40)
    figure.savefig(output)
    print(f"saved {output}")


given = arguments(__doc__, "option_surface.png")
main(given.output, given.server)
