"""`python -m bench.soak --seconds 120`: a mesh at saturation, with a random worker killed every second.

The mesh is a gateway and a dispatcher, or with `--units N` as many units. With `--kill-units` a unit is killed instead
of a worker, every two seconds if the others serve: any unit in the first half of the time, and then never the first
one, which must hold nothing of the others that died.

Callers in processes of their own call kernels of every kind and check every reply (bench/soak/callers.py). A call must
end once, with the right content or with a failure that the table in docs/architecture.md predicts. Counters must only
grow. Descriptors, segments of shared memory and threads are counted after a warm-up, and must be no more after the
last call. Every five seconds there is a lull, and at its end the services' memory is read; in a run of a minute or
more, or two for two units, it must not grow, as far as such a run can tell, nor may a service use more of it after the
last call than before the first. Exit codes: 1 a check failed, with a message; 2 the soak could not run.
"""

import argparse
import math
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, linear_regression
from typing import Any, Never

from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student_t

from bench.processes import BenchError, Child, kill, rss_anon_bytes
from bench.scrape import Scrape, fallen
from bench.soak import fleet as soak_fleet
from bench.soak.calls import KINDS, LEFT, LULL_EVERY_SECONDS, OK
from bench.soak.mesh import WORKERS, Mesh, everywhere
from bench.subjects import oip, subjects

KILL_SECONDS = 1.0
UNIT_KILL_SECONDS = 2.0
# Length of the round of calls before the soak, in which what is opened once is opened.
WARM_UP_SECONDS = 6.0
# The share of a run before which pools and allocators still grow to the load; the dispatcher takes most of a minute.
WARM_SHARE = 0.5
# In a shorter run the slope depends on the calls that happen to be running.
JUDGED_SECONDS = 60.0
MAX_MIB_A_MINUTE = 1.0
# Memory that a service may use more than after the warm-up: malloc's caches of threads fill, and tables of the past.
FILLS_MIB = 4.0
# The chance of a run to find a service that grows where none does.
CHANCE = 0.05
# A segment of shared memory that no call has used is freed within 20 s.
RESTORED_SECONDS = 40.0
# Connections of each interface of a process of callers to several units: so many that each unit has some.
CONNECTIONS = 4
# The dispatcher's thread for digests starts with the first death of a worker that ran a large call.
MAY_START = {"threads": 1}


@dataclass(frozen=True, slots=True)
class Asked:
    """The soak that is asked for: how long, with how many processes of callers, and of which mesh."""

    seconds: float
    processes: int
    seed: int
    units: int
    kill_units: bool

    @property
    def judged_seconds(self) -> float:
        """The least length of a run whose memory is judged: each of several units has a part of the calls."""
        return JUDGED_SECONDS * max(1, self.units)


@dataclass(slots=True, kw_only=True)
class Watched:
    """Observations of the mesh from outside."""

    kills: int = 0
    # (seconds, bytes) of each service.
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    # Counts of each service's descriptors and threads after the warm-up, and of what all have together.
    at_start: dict[str, dict[str, int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def growth(self, service: str) -> tuple[float, float]:
        """MiB a minute, by least squares over the readings after the warm-up, and how far it may be off by chance.

        Memory that malloc keeps for the next large call varies by tens of MiB, so a slope alone has no meaning. In all
        but 1 of 20 runs no service is further off.
        """
        seen = self.memory[service][math.ceil(WARM_SHARE * len(self.memory[service])) :]
        if len(seen) < 3:
            return 0.0, math.inf
        at, bytes_ = zip(*seen, strict=True)
        line = linear_regression(at, bytes_)
        off = [y - line.intercept - line.slope * x for x, y in seen]
        free = _independent(off) - 2
        if free <= 0:
            return line.slope * 60 / 2**20, math.inf
        error = math.sqrt(sum(one * one for one in off) / free / sum((x - fmean(at)) ** 2 for x in at))
        errors = float(student_t.isf(CHANCE / 2 / len(self.memory), free))
        return line.slope * 60 / 2**20, errors * error * 60 / 2**20


def _independent(off: Sequence[float]) -> float:
    """The number of independent readings that say as much as these, by their distances from a line.

    A heap grows and is given back in steps that last for several readings. With r, the autocorrelation from one reading
    to the next, n readings say as much as n (1 - r) / (1 + r) (Santer et al. 2000, doi:10.1029/1999JD901105).
    """
    if not (squares := sum(one * one for one in off)):
        return len(off)
    alike = sum(one * after for one, after in pairwise(off)) / squares
    # Of few readings, the line has taken some of it away (Kendall 1954).
    alike = min(1.0, max(0.0, alike + (1 + 4 * alike) / len(off)))
    return len(off) * (1 - alike) / (1 + alike)


def run(asked: Asked, console: Console) -> list[str]:
    """Soak a mesh, and print what happened. Returns what was wrong."""
    with ExitStack() as stack, console.status("starting") as status:
        mesh = Mesh.start(stack, asked.units)
        subjects.await_ready(mesh.subject, oip.works()["identity_1k"])
        status.update("warming up")
        warm = Watched()
        # With other calls than the soak: a call that dies in both would be refused as poison.
        warm_up = replace(asked, seconds=WARM_UP_SECONDS, kill_units=False, seed=asked.seed + asked.processes)
        soak(mesh, warm, warm_up)
        before = restored(mesh, warm)
        used_before = mesh.used()
        watched = Watched(at_start=mesh.held(), wrong=warm.wrong)
        status.update(f"soaking for {asked.seconds:.0f} s")
        doors = soak(mesh, watched, asked)
        after = restored(mesh, watched)
        wrong = [*(f"{name}: {what}" for name, door in doors for what in door["wrong"]), *watched.wrong]
        # The counts of a unit end with it.
        wrong += unended(doors) if asked.kill_units else uncounted(doors, before, after, watched.kills)
        if asked.seconds >= asked.judged_seconds:
            wrong += [*grown(watched), *still_used(used_before, mesh.used(), asked.seconds)]
        if not watched.kills:
            wrong.append("no process was killed")
        wrong += mesh.end()
    show(doors, watched, everywhere(after, "unlatch_worker_restarts_total"), asked, console)
    return wrong


def soak(mesh: Mesh, watched: Watched, asked: Asked) -> list[tuple[str, dict[str, Any]]]:
    """Let processes of callers call while the mesh is watched. Returns what each interface counted, with its name."""
    flags = ["--gateway", f"127.0.0.1:{mesh.subject.port}"]
    flags += ["--dispatcher", mesh.subject.dispatcher_target()] if not mesh.units else []
    flags += ["--connections", str(CONNECTIONS)] if mesh.units > 1 else []
    flags += ["--units-die"] if asked.kill_units else []
    with ExitStack() as stack:
        callers = [
            stack.enter_context(Child(f"soak-callers-{number}", "bench.soak.callers", *flags))
            for number in range(asked.processes)
        ]
        began = time.monotonic()
        for number, child in enumerate(callers):
            child.tell(began=began, seconds=asked.seconds, seed=asked.seed + number)
        watch(mesh, watched, began, asked)
        return [(name, door) for child in callers for name, door in child.answer().items()]


def watch(mesh: Mesh, watched: Watched, began: float, asked: Asked) -> None:
    """Kill a worker every second, or a unit every two, and check counters; at the end of each lull read the memory."""
    dice = random.Random(asked.seed)
    pids, last = mesh.pids(), mesh.scrapes()
    for at, is_kill in _ticks(asked.seconds, UNIT_KILL_SECONDS if asked.kill_units else KILL_SECONDS):
        time.sleep(max(0.0, began + at - time.monotonic()))
        if not is_kill:
            for name, pid in mesh.pids().items():
                watched.memory[name].append((at, rss_anon_bytes(pid)))
            continue
        now, before, pids = mesh.scrapes(), pids, mesh.pids()
        # A part that is another process has begun to count anew.
        same = [name for name in last if before.get(name) == pids.get(name) and name in pids]
        if missing := [name for name in same if name not in now]:
            watched.wrong.append(f"{', '.join(missing)}: no metrics")
        watched.wrong += [f"{name}: {what}" for name in same if name in now for what in fallen(last[name], now[name])][
            :1
        ]
        last = now
        if asked.kill_units:
            spared = ("unit 0",) if at > asked.seconds / 2 else ()
            victims = [pids[name] for name in mesh.services if name not in spared] if mesh.serves(now) else []
        else:
            victims = mesh.workers()
        if victims:
            kill(victim := dice.choice(victims))
            watched.kills += 1
            # What it had before it died counts for nothing.
            for name in [name for name, pid in pids.items() if pid == victim]:
                watched.memory[name].clear()


def _ticks(seconds: float, kill_seconds: float) -> list[tuple[float, bool]]:
    """Times at which a process is killed (True), and at which memory is read, just before the end of a lull."""
    kills = [(at * kill_seconds, True) for at in range(1, math.ceil(seconds / kill_seconds))]
    lulls = range(1, math.floor(seconds / LULL_EVERY_SECONDS) + 1)
    return sorted([*kills, *((at * LULL_EVERY_SECONDS - 0.1, False) for at in lulls)])


def restored(mesh: Mesh, watched: Watched) -> dict[str, Scrape]:
    """The last readings, once every worker is up, no call is left, and nothing else is left."""
    deadline = time.monotonic() + RESTORED_SECONDS
    while True:
        after = mesh.scrapes()
        left = [*mesh.left(after), *more(watched.at_start, mesh.held())]
        if not left or time.monotonic() > deadline:
            watched.wrong += [f"{what}, {RESTORED_SECONDS:.0f} s after the last call" for what in left]
            return after
        time.sleep(0.05)


def more(at_start: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """List the counts that are higher now than at the start."""
    return [
        f"{name}: {now[name][what]} {what}, {now[name][what] - count} more than at the start"
        for name, counts in at_start.items()
        # A unit that is being started again is found by its metrics.
        if name in now
        for what, count in counts.items()
        if now[name][what] > count + MAY_START.get(what, 0)
    ]


def grown(watched: Watched) -> list[str]:
    """List the services whose memory grows."""
    wrong = []
    for name in watched.memory:
        slope, unsure = watched.growth(name)
        if slope - unsure >= MAX_MIB_A_MINUTE:
            wrong.append(f"{name}: its memory grows by {slope:.1f} ± {unsure:.1f} MiB a minute")
    return wrong


def still_used(
    before: Mapping[tuple[str, int], int], after: Mapping[tuple[str, int], int], seconds: float
) -> list[str]:
    """List the parts that use more memory after the last call than before the first, by name and process."""
    most = round((MAX_MIB_A_MINUTE * seconds / 60 + FILLS_MIB) * 2**20)
    return [
        f"{name}: after the last call it uses {after[name, pid] / 2**20:.1f} MiB, before the first {used / 2**20:.1f}"
        for (name, pid), used in before.items()
        if after.get((name, pid), 0) - used > most
    ]


def unended(doors: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Calls whose ends do not match their begins, by the callers' counts."""
    wrong = []
    for name, door in doors:
        begun, ended = sum(door["begun"].values()), sum(count for _, _, count in door["ended"])
        if begun != ended:
            wrong.append(f"{name}: {begun} calls began, and {ended} ended")
    return wrong


def uncounted(
    doors: list[tuple[str, dict[str, Any]]], before: Mapping[str, Scrape], after: Mapping[str, Scrape], kills: int
) -> list[str]:
    """Calls whose ends do not match their begins, by the callers' counts and by the services' own."""
    wrong = unended(doors)
    through = [door for name, door in doors if name != "dispatcher"]
    begun = sum(sum(door["begun"].values()) for door in through)
    # A caller that leaves at once may have sent nothing.
    left = sum(count for door in through for _, code, count in door["ended"] if code == LEFT)
    counted = _more(before, after, "unlatch_calls_total", "gateway")
    if not begun - left <= counted <= begun:
        wrong.append(f"gateway: {counted:.0f} calls ended there, where {begun - left} to {begun} were sent")
    replaced = _more(before, after, "unlatch_worker_replacement_seconds_count")
    if replaced < kills:
        wrong.append(f"dispatcher: {replaced:.0f} workers were replaced, where {kills} were killed")
    return wrong


def _more(before: Mapping[str, Scrape], after: Mapping[str, Scrape], name: str, component: str = "") -> float:
    return everywhere(after, name, component) - everywhere(before, name, component)


def show(
    doors: list[tuple[str, dict[str, Any]]], watched: Watched, restarts: float, asked: Asked, console: Console
) -> None:
    begun: Counter[str] = Counter()
    ended: Counter[tuple[str, str]] = Counter()
    for _, door in doors:
        begun.update(door["begun"])
        ended.update({(kind, code): count for kind, code, count in door["ended"]})
    codes = sorted({code for _, code in ended} - {OK, LEFT})
    killed = "units" if asked.kill_units else "workers"
    table = Table(title=f"{sum(begun.values()):,} calls in {asked.seconds:.0f} s, {watched.kills} {killed} killed")
    table.title_justify = table.caption_justify = "left"
    table.add_column("kind")
    for name in ("begun", OK, LEFT, *codes):
        table.add_column(name, justify="right")
    for kind in KINDS:
        counts = (begun[kind.name], *(ended[kind.name, code] for code in (OK, LEFT, *codes)))
        table.add_row(kind.name, *(f"{count:,}" if count else "" for count in counts))
    least = asked.judged_seconds
    judged = "" if asked.seconds >= least else f"; not judged in a run under {least:.0f} s"
    slopes = ", ".join("{} {:+.1f} ± {:.1f}".format(name, *watched.growth(name)) for name in watched.memory)
    table.caption = f"{restarts:.0f} workers ended and were replaced. RssAnon, MiB a minute: {slopes}{judged}."
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="how long callers begin calls")
    parser.add_argument("--units", type=int, default=0, help="as many units; 0: gateway and dispatcher apart")
    parser.add_argument("--kill-units", action="store_true", help="kill units instead of workers")
    parser.add_argument("--fleet", action="store_true", help="three replicas, one killed every two seconds")
    parser.add_argument("--processes", type=int, default=2, help="processes of callers")
    parser.add_argument("--seed", type=int, default=0, help="of all dice: who is called, with what, who is killed")
    args = parser.parse_args()
    if not 0 <= args.units <= WORKERS or (args.kill_units and args.units < 2):
        parser.error(f"--units must be 0 to {WORKERS}, and 2 with --kill-units")
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if args.fleet:
            wrong = soak_fleet.run(args.seconds, args.seed, console)
        else:
            wrong = run(Asked(args.seconds, args.processes, args.seed, args.units, args.kill_units), console)
    except BenchError as error:
        console.print("[bold red]soak:[/]", Text(str(error)), highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("soak: interrupted; every process it started has ended")
        return 130
    for what in wrong:
        console.print("[bold red]wrong:[/]", Text(what), highlight=False)
    if not wrong:
        console.print("[green]every call ended once, as it should[/]")
    return 1 if wrong else 0


def _interrupt(*_: object) -> Never:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
