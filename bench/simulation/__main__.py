"""`python -m bench.simulation`: a hundred replicas of sixteen workers under bursts, with three ways to balance calls.

The gateways' way is the gateway's own code (world.py lists it), on a simulated clock. Round robin and least connections
send at once, to the same replicas. A call takes the time that docs/kernels.md gives for its built-in kernel, times the
size of its input, whose distribution is heavy-tailed. The same seed gives the same figures.

Without `--quick`, docs/images/balancing.png and the table in docs/operations/capacity.md are written. With it, the
table of a small simulation is printed.
"""

import argparse
import asyncio
import heapq
import logging
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import structlog

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.plots import GRID, INK, LIGHT, OTHER, STYLE, UNLATCH
from bench.simulation.world import (
    HOP_SECONDS,
    Arrival,
    Clock,
    Gateway,
    LeastCalls,
    RoundRobin,
    SimulatedCompute,
    Unlatch,
    addresses_of,
)
from unlatch.common.machine.cgroups import granted_cores
from unlatch.gateway.fleet.subset import subset

ROOT = Path(__file__).resolve().parents[2]
CAPACITY = ROOT / "docs" / "operations" / "capacity.md"
PICTURE = ROOT / "docs" / "images" / "balancing.png"
_KERNEL = re.compile(r"^\| `(\w+)\(.*?\)` \| [^|]* \| [^|]* \| ([\d.]+) \|", re.MULTILINE)
_TABLE = re.compile(r"(<!-- bench/simulation/__main__.py writes this -->\n).*?(<!-- to here -->)", re.DOTALL)
# Shorter kernels are better called in the caller's own process (docs/limits.md).
_SHORTEST_SECONDS = 0.0005
# Size of inputs relative to those of docs/kernels.md: a truncated Pareto distribution.
_MIN_TIMES, _MAX_TIMES, _TAIL = 4.0, 2000.0, 1.2
# Variation of the time for inputs of one size.
_NOISE = 0.25
_LOOK_SECONDS = 0.01
# Share of a gateway's time in bursts, their mean duration, and their rate relative to other times. Durations are
# exponentially distributed.
_BURST_SHARE, _BURST_SECONDS, _BURST_TIMES = 0.2, 0.2, 4.0

WAYS = {"unlatch": "Unlatch", "least": "least connections", "robin": "round robin", "one": "one queue for all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Parameters of one run."""

    way: str = "unlatch"
    load: float = 0.7
    replicas: int = 100
    workers: int = 16
    gateways: int = 8
    slow: float = 0.0  # the share of replicas that take twice as long
    subset: int = 0
    seconds: float = 3.0
    warm_seconds: float = 0.5
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Results of one run, for calls that came after the warm-up."""

    world: World
    calls: int
    answered: int
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    wait_p95_seconds: float  # beyond a run at full speed, and the hops
    rate: float
    offered_rate: float
    imbalance: float  # the share of all workers that are idle while calls wait somewhere
    # Pairs that must agree: work done by workers and work of calls; calls in the system and durations of calls.
    busy_seconds: float
    work_seconds: float
    in_system_seconds: float
    latency_seconds: float


def kernels() -> dict[str, float]:
    """Measured times of built-in kernels, in seconds, from docs/kernels.md."""
    written = {name: float(ms) / 1e3 for name, ms in _KERNEL.findall((ROOT / "docs" / "kernels.md").read_text())}
    return {name: seconds for name, seconds in written.items() if seconds >= _SHORTEST_SECONDS}


def slowness(world: World) -> list[float]:
    """The time that each replica's workers take, relative to a worker of full speed."""
    slow = round(world.slow * world.replicas)
    return [2.0] * slow + [1.0] * (world.replicas - slow)


def arrivals(world: World) -> list[Arrival]:
    """All calls of a run in order of arrival; the same for every way to balance."""
    dice = random.Random(world.seed)
    names = kernels()
    capacity = world.workers * sum(1 / each for each in slowness(world)) / _mean_seconds(names)
    each = world.load * capacity / world.gateways
    found = [
        _arrival(at, gateway, dice, names)
        for gateway in range(world.gateways)
        for at in _bursts(each, world.seconds, dice)
    ]
    return sorted(found, key=lambda arrival: arrival.at)


def run(world: World) -> Figures:
    """Simulate one world, from its first call to its last answer."""
    coming = arrivals(world)
    if world.way == "one":
        return _figures(world, coming, 0.0, _one_queue(world, coming), math.nan)
    return asyncio.run(_run(world, coming))


async def _run(world: World, coming: Sequence[Arrival]) -> Figures:
    # The fleet uses the random module's own generator.
    random.seed(world.seed)
    dice, clock = random.Random(world.seed + 1), Clock()
    computes = [SimulatedCompute(clock, world.workers, each, dice.random()) for each in slowness(world)]
    ways = [_way(world, number, computes, dice) for number in range(world.gateways)]
    fleets = [way for way in ways if isinstance(way, Unlatch)]
    for fleet in fleets:
        await fleet.open()
    seen = _Seen(world, clock, computes, ways)
    for arrival in coming:
        clock.after(arrival.at, partial(seen.came, arrival))
    clock.run(lambda: seen.ended == len(coming))
    for fleet in fleets:
        await fleet.close()
    busy = sum(compute.busy_seconds for compute in computes)
    return _figures(world, coming, seen.imbalance, busy, seen.in_system_seconds)


class _Seen:
    """Counts while a world runs."""

    def __init__(
        self, world: World, clock: Clock, computes: Sequence[SimulatedCompute], ways: Sequence[Gateway]
    ) -> None:
        self.ended = 0
        self.in_system_seconds = 0.0
        self._here, self._since = 0, 0.0
        self._idle_while_waiting: list[float] = []
        self._world, self._clock, self._computes, self._ways = world, clock, computes, ways
        clock.after(world.warm_seconds, self._look)

    @property
    def imbalance(self) -> float:
        return sum(self._idle_while_waiting) / len(self._idle_while_waiting)

    def came(self, arrival: Arrival) -> None:
        self._count(1)
        self._ways[arrival.gateway].route(arrival, self._has_ended)

    def _has_ended(self, arrival: Arrival) -> None:
        assert math.isnan(arrival.ended), "a call is answered once"
        arrival.ended = self._clock.now
        self.ended += 1
        self._count(-1)

    def _count(self, change: int) -> None:
        self.in_system_seconds += self._here * (self._clock.now - self._since)
        self._here, self._since = self._here + change, self._clock.now

    def _look(self) -> None:
        idle = sum(compute.idle for compute in self._computes)
        waiting = sum(compute.waiting for compute in self._computes) + sum(way.held for way in self._ways)
        workers = self._world.replicas * self._world.workers
        self._idle_while_waiting.append(min(idle, waiting) / workers)
        if self._clock.now + _LOOK_SECONDS < self._world.seconds:
            self._clock.after(_LOOK_SECONDS, self._look)


def _way(world: World, number: int, computes: Sequence[SimulatedCompute], dice: random.Random) -> Gateway:
    if world.way == "unlatch":
        return Unlatch(f"gateway-{number}", computes, list(kernels()), world.subset or world.replicas)
    return RoundRobin(computes, dice) if world.way == "robin" else LeastCalls(computes, dice)


def _one_queue(world: World, coming: Sequence[Arrival]) -> float:
    """All workers behind one queue with perfect knowledge; the work that they have done, in seconds."""
    free = [(0.0, worker, each) for worker, each in enumerate(slowness(world) * world.workers)]
    heapq.heapify(free)
    busy = 0.0
    for arrival in coming:
        at, worker, slow = heapq.heappop(free)
        began, seconds = max(at, arrival.at + HOP_SECONDS), arrival.seconds * slow
        arrival.ended = began + seconds + HOP_SECONDS
        busy += seconds
        heapq.heappush(free, (began + seconds, worker, slow))
    return busy


def _figures(
    world: World, coming: Sequence[Arrival], imbalance: float, busy_seconds: float, in_system_seconds: float
) -> Figures:
    counted = [arrival for arrival in coming if arrival.at >= world.warm_seconds]
    p50, p95, p99 = np.quantile([arrival.ended - arrival.at for arrival in counted], [0.5, 0.95, 0.99])
    waited = [arrival.ended - arrival.at - arrival.seconds - 2 * HOP_SECONDS for arrival in counted]
    window = world.seconds - world.warm_seconds
    return Figures(
        world=world,
        calls=len(coming),
        answered=sum(not math.isnan(arrival.ended) for arrival in coming),
        p50_seconds=float(p50),
        p95_seconds=float(p95),
        p99_seconds=float(p99),
        wait_p95_seconds=float(np.quantile(waited, 0.95)),
        rate=sum(world.warm_seconds <= arrival.ended < world.seconds for arrival in coming) / window,
        offered_rate=len(counted) / window,
        imbalance=imbalance,
        busy_seconds=busy_seconds,
        work_seconds=sum(arrival.seconds for arrival in coming),
        in_system_seconds=in_system_seconds,
        latency_seconds=sum(arrival.ended - arrival.at for arrival in coming),
    )


def _arrival(at: float, gateway: int, dice: random.Random, names: Mapping[str, float]) -> Arrival:
    kernel = dice.choice(list(names))
    times = _times(dice.random())
    seconds = names[kernel] * times * dice.lognormvariate(-(_NOISE**2) / 2, _NOISE)
    return Arrival(at, gateway, kernel, round(1e4 * times), seconds)


def _times(chance: float) -> float:
    """Invert the distribution function of Pareto's distribution between its bounds."""
    most = 1 - (_MIN_TIMES / _MAX_TIMES) ** _TAIL
    times: float = _MIN_TIMES * (1 - chance * most) ** (-1 / _TAIL)
    return times


def _mean_seconds(names: Mapping[str, float]) -> float:
    ratio = _MIN_TIMES / _MAX_TIMES
    times: float = _MIN_TIMES * _TAIL / (_TAIL - 1) * (1 - ratio ** (_TAIL - 1)) / (1 - ratio**_TAIL)
    return times * sum(names.values()) / len(names)


def _bursts(rate: float, seconds: float, dice: random.Random) -> Iterator[float]:
    """Arrival times at one gateway: a Poisson process that alternates between two rates."""
    calm = rate / (1 - _BURST_SHARE + _BURST_SHARE * _BURST_TIMES)
    at, bursting, until = 0.0, False, 0.0
    while at < seconds:
        if at >= until:
            bursting = dice.random() < _BURST_SHARE if not until else not bursting
            share = _BURST_SHARE if bursting else 1 - _BURST_SHARE
            until = at + dice.expovariate(1 / (_BURST_SECONDS * share / _BURST_SHARE))
        step = dice.expovariate(calm * (_BURST_TIMES if bursting else 1.0))
        if at + step < until:
            at += step
            if at < seconds:
                yield at
        else:
            at = until


def worlds(*, quick: bool) -> tuple[list[World], list[World]]:
    """Worlds for the ways, by load; and worlds for subsets, by size and gateways, with the first way."""
    base = World(replicas=10, workers=4, gateways=4, seconds=2.0) if quick else World()
    ways = [
        replace(base, way=way, load=load, slow=0.1)
        for load in ((0.7,) if quick else (0.5, 0.7, 0.85, 0.95))
        for way in WAYS
    ]
    sizes = (5,) if quick else (50, 25, 12)
    subsets = [
        replace(base, load=0.85, gateways=gateways, subset=size)
        for gateways in ((4,) if quick else (8, 32))
        for size in (0, *sizes)
    ]
    return ways, subsets


def table(ways: Sequence[Figures], subsets: Sequence[Figures]) -> str:
    """Both tables, in markdown."""
    columns = "p50 | p95 | p99 | p95 of waiting | calls/s | idle while calls wait"
    rows = [f"| load | shared out by | {columns} |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    rows += [f"| {found.world.load:.0%} | {WAYS[found.world.way]} | {_cells(found)}" for found in ways]
    rows += ["", f"| gateways | replicas of each | of none | {columns} |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for found in subsets:
        world = found.world
        rows.append(f"| {world.gateways} | {world.subset or 'all'} | {_left_out(world)} | {_cells(found)}")
    return "\n".join(rows)


def _cells(found: Figures) -> str:
    times = found.p50_seconds, found.p95_seconds, found.p99_seconds, found.wait_p95_seconds
    said = " | ".join(f"{1e3 * seconds:,.0f} ms" for seconds in times)
    idle = "0" if found.world.way == "one" else f"{found.imbalance:.1%}"
    return f"{said} | {found.rate:,.0f} | {idle} |"


def _left_out(world: World) -> int:
    """The number of replicas that are in no gateway's subset."""
    addresses = addresses_of(world.replicas)
    own = [subset(f"gateway-{number}", addresses, world.subset or world.replicas) for number in range(world.gateways)]
    return world.replicas - len(set().union(*own))


def plot(ways: Sequence[Figures], subsets: Sequence[Figures], path: Path) -> None:
    """Plot the waits of calls, by load for each way (left), and by size of subset (right)."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
        for way, colour in zip(WAYS, (UNLATCH, INK, "#c0563b", OTHER), strict=True):
            found = [one for one in ways if one.world.way == way]
            _line(left, [one.world.load for one in found], found, WAYS[way], colour)
        for gateways, colour in ((8, UNLATCH), (32, LIGHT)):
            found = [one for one in subsets if one.world.gateways == gateways]
            sizes: list[float] = [one.world.subset or one.world.replicas for one in found]
            _line(right, sizes, found, f"{gateways} gateways", colour)
        world = ways[0].world
        left.set_title(f"{world.replicas} replicas x {world.workers} workers, a tenth half as fast", loc="left")
        left.set_xlabel("load: work that comes over what workers can do")
        left.set_ylabel("waiting, p95 in ms")
        right.set_title(f"A subset of {world.replicas} replicas for each gateway, load 85 %", loc="left")
        right.set_xlabel("replicas of each gateway")
        for axis in (left, right):
            # The scale includes zero.
            axis.set_yscale("symlog", linthresh=10)
            axis.set_ylim(bottom=-1)
            axis.set_yticks([0, 5, 10, 20, 50, 100, 200, 500], ["0", "5", "10", "20", "50", "100", "200", "500"])
            axis.grid(axis="y", color=GRID)
            axis.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _line(axis: Any, across: Sequence[float], found: Sequence[Figures], label: str, colour: str) -> None:
    axis.plot(across, [1e3 * one.wait_p95_seconds for one in found], marker="o", color=colour, label=label)


def _warnings_only() -> None:
    """Silence the log entries of replicas that come and go."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small world, of which the table is printed")
    quick = parser.parse_args().quick
    ways, subsets = worlds(quick=quick)
    with ProcessPoolExecutor(granted_cores(), initializer=_warnings_only) as pool:
        found = list(pool.map(run, ways + subsets))
    said = table(found[: len(ways)], found[len(ways) :])
    print(said)
    if not quick:
        plot(found[: len(ways)], found[len(ways) :], PICTURE)
        CAPACITY.write_text(_TABLE.sub(lambda part: f"{part[1]}\n{said}\n\n{part[2]}", CAPACITY.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
