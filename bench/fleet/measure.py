"""A gateway's throughput with three replicas of which one is four times slower, and its reaction to a frozen replica.

Besides the gateway of all three, one gateway has a fast replica and one has one of each kind. With them each replica's
own throughput is measured, and gRPC's `round_robin` is tried over all three.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.bounds import Bound, Figures
from bench.processes import BenchError, Child, Process, free_port, load_core
from bench.scrape import scrape
from bench.subjects.subjects import UNLATCH

WORKERS = 2
# Enough callers to keep all three busy, and a few that wait.
CALLERS = 48
CALLERS_OF_ONE = 16
FAST, SLOW = "bench/fleet/kernels.py", "bench/fleet/slow_kernels.py"
_START_SECONDS = 30.0

BOUNDS = (
    Bound(name="balance_ratio", at_least=0.9),
    Bound(name="balance_p95_ratio", at_most=1.5),
    Bound(name="balance_vs_round_robin", at_least=1.0),
    Bound(name="frozen_noticed_seconds", at_most=2.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replica:
    process: Process
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gateway:
    process: Process
    target: str
    metrics: int


def measure(*, rounds: int, seconds: float, on_step: Callable[[str], None]) -> Figures:
    """Measure every figure of the fleet. Raises BenchError if it does not start."""
    with ExitStack() as stack:
        on_step("fleet · starting three replicas and five gateways")
        slow_last = [_replica(stack, number, kernels) for number, kernels in enumerate((FAST, FAST, SLOW))]
        targets = [replica.target for replica in slow_last]
        everyone, fast, *each = (
            _gateway(stack, served) for served in (targets, targets[:2], *([one] for one in targets))
        )
        callers = stack.enter_context(Child("fleet-callers", "bench.fleet.callers", cpus=[load_core()]))
        for gateway in (everyone, fast, *each):
            _await_up(gateway)
            # The gateway learns from runs how long a kernel takes.
            _ask(callers, [gateway], CALLERS_OF_ONE, seconds / 2)
        found = [_round(callers, everyone, fast, each, seconds, on_step) for _ in range(rounds)]
        figures = {name: median(once[name] for once in found) for name in found[0]}
        on_step("fleet · a replica stands still")
        return {**figures, "frozen_noticed_seconds": median(_frozen(everyone, slow_last[0]) for _ in range(rounds))}


def _round(
    callers: Child,
    everyone: _Gateway,
    fast: _Gateway,
    each: list[_Gateway],
    seconds: float,
    on_step: Callable[[str], None],
) -> Figures:
    on_step("fleet · each replica alone")
    alone = [_ask(callers, [gateway], CALLERS_OF_ONE, seconds)["per_second"] for gateway in each]
    on_step("fleet · the fast ones alone")
    two = _ask(callers, [fast], CALLERS, seconds)
    on_step("fleet · all three")
    three = _ask(callers, [everyone], CALLERS, seconds)
    on_step("fleet · gRPC's round_robin over all three")
    robin = _ask(callers, each, CALLERS, seconds)
    return {
        "balance_ratio": three["per_second"] / sum(alone),
        "balance_p95_ratio": three["p95_ms"] / two["p95_ms"],
        "balance_vs_round_robin": three["per_second"] / robin["per_second"],
        "fleet_calls_per_second": three["per_second"],
        "fleet_p95_ms": three["p95_ms"],
        "fast_alone_p95_ms": two["p95_ms"],
        "round_robin_calls_per_second": robin["per_second"],
        "round_robin_p95_ms": robin["p95_ms"],
        "sum_calls_per_second": sum(alone),
    }


def _frozen(gateway: _Gateway, replica: _Replica) -> float:
    """Seconds from a replica's SIGSTOP until the gateway takes it for gone."""
    os.kill(replica.process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        while _is_up(gateway, replica.target):
            if time.monotonic() - stopped > _START_SECONDS:
                raise BenchError(f"{replica.target} stands still, and is not missed")
            time.sleep(0.01)
        return time.monotonic() - stopped
    finally:
        os.kill(replica.process.pid, signal.SIGCONT)
        _await_up(gateway)


def _ask(callers: Child, gateways: list[_Gateway], count: int, seconds: float) -> dict[str, Any]:
    return callers.ask(targets=[gateway.target for gateway in gateways], callers=count, seconds=seconds)


def _replica(stack: ExitStack, number: int, kernels: str) -> _Replica:
    target = f"127.0.0.1:{free_port()}"
    argv = [str(UNLATCH), "compute", "--listen", target, "--workers", str(WORKERS), "--kernels", kernels]
    argv += ["--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]
    return _Replica(process=stack.enter_context(Process(f"fleet-replica-{number}", argv)), target=target)


def _gateway(stack: ExitStack, replicas: list[str]) -> _Gateway:
    target, metrics = f"127.0.0.1:{free_port()}", free_port()
    argv = [str(UNLATCH), "gateway", "--listen", target, "--replicas", ",".join(replicas)]
    argv += ["--metrics-listen", f"127.0.0.1:{metrics}", "--health-listen", "127.0.0.1:0"]
    name = "-".join(replica.rpartition(":")[2] for replica in replicas)
    # All calls are identical, and each must be run.
    process = Process(f"fleet-gateway-{name}", argv, variables={"UNLATCH_COALESCING": "false"})
    return _Gateway(process=stack.enter_context(process), target=target, metrics=metrics)


def _is_up(gateway: _Gateway, target: str) -> bool:
    return bool(scrape(gateway.metrics).get(("unlatch_replica_up", frozenset({("replica", target)}))))


def _await_up(gateway: _Gateway) -> None:
    """Wait until every replica of a gateway takes calls."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            up = [value for (name, _), value in scrape(gateway.metrics).items() if name == "unlatch_replica_up"]
        except OSError:
            up = []
        if up and all(up):
            return
        if time.monotonic() > deadline:
            raise BenchError(f"the gateway has not all its replicas:\n{gateway.process.tail()}")
        time.sleep(0.05)
