"""`python -m bench.soak --seconds 120`: a mesh at saturation, with a random worker killed every second.

Callers in processes of their own call kernels of every kind and check every reply (bench/soak/callers.py). A call must
end once, with the right content or with a failure that the table in docs/architecture.md predicts. Counters must only
grow. Every five seconds there is a lull, and at its end the services' memory is read; in a run of a minute or more it
must not grow, as far as such a run can tell. Exit codes: 1 a check failed, with a message; 2 the soak could not run.
"""

import argparse
import math
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean, linear_regression
from typing import Any, Never

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.processes import BenchError, Child, kill, rss_anon_bytes, workers, zombies
from bench.scrape import Scrape, fallen, scrape, total
from bench.soak import fleet as soak_fleet
from bench.soak.calls import KINDS, LEFT, LULL_EVERY_SECONDS, OK
from bench.subjects import oip, subjects
from bench.subjects.subjects import Subject

WORKERS = 2
KILL_SECONDS = 1.0
# The share of a run before which pools and allocators still grow to the load; the dispatcher takes most of a minute.
WARM_SHARE = 0.5
# In a shorter run the slope depends on the calls that happen to be running.
JUDGED_SECONDS = 60.0
MAX_MIB_A_MINUTE = 1.0
RESTORED_SECONDS = 10.0
SERVICES = ("gateway", "dispatcher")


@dataclass(slots=True, kw_only=True)
class Watched:
    """Observations of the mesh from outside."""

    kills: int = 0
    # (seconds, bytes) of each service.
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {name: [] for name in SERVICES})
    wrong: list[str] = field(default_factory=list)

    def growth(self, service: str) -> tuple[float, float]:
        """MiB a minute, by least squares over the readings after the warm-up, and twice its standard error.

        Memory that malloc keeps for the next large call varies by tens of MiB, so a slope alone has no meaning.
        """
        seen = self.memory[service][math.ceil(WARM_SHARE * len(self.memory[service])) :]
        if len(seen) < 3:
            return 0.0, math.inf
        at, bytes_ = zip(*seen, strict=True)
        line = linear_regression(at, bytes_)
        off = sum((y - line.intercept - line.slope * x) ** 2 for x, y in seen) / (len(seen) - 2)
        error = math.sqrt(off / sum((x - fmean(at)) ** 2 for x in at))
        return line.slope * 60 / 2**20, 2 * error * 60 / 2**20


def run(seconds: float, processes: int, seed: int, console: Console) -> list[str]:
    """Soak a mesh, and print what happened. Returns what was wrong."""
    with ExitStack() as stack, console.status("starting") as status:
        subject = subjects.start(stack, "unlatch", workers=WORKERS, log="soak")
        subjects.await_ready(subject, oip.works()["identity_1k"])
        targets = ("--gateway", f"127.0.0.1:{subject.port}", "--dispatcher", subject.dispatcher_target())
        callers = [
            stack.enter_context(Child(f"soak-callers-{number}", "bench.soak.callers", *targets))
            for number in range(processes)
        ]
        before = {name: scrape(subject.metrics[name]) for name in SERVICES}
        status.update(f"soaking for {seconds:.0f} s")
        began = time.monotonic()
        for number, child in enumerate(callers):
            child.tell(began=began, seconds=seconds, seed=seed + number)
        watched = watch(subject, began, seconds, random.Random(seed))
        status.update("the last calls end")
        doors = [(name, door) for child in callers for name, door in child.answer().items()]
        after = restored(subject, watched)
        wrong = [*(f"{name}: {what}" for name, door in doors for what in door["wrong"]), *watched.wrong]
        wrong += uncounted(doors, before, after, watched.kills)
        if seconds >= JUDGED_SECONDS:
            for name in SERVICES:
                slope, unsure = watched.growth(name)
                if slope - unsure >= MAX_MIB_A_MINUTE:
                    wrong.append(f"{name}: its memory grows by {slope:.1f} ± {unsure:.1f} MiB a minute")
    show(doors, watched, total(after["dispatcher"], "unlatch_worker_restarts_total"), seconds, console)
    return wrong


def watch(subject: Subject, began: float, seconds: float, dice: random.Random) -> Watched:
    """Kill a worker every second and check that counters grow; at the end of each lull read the memory."""
    watched = Watched()
    pids = {name: subject.pid(name) for name in SERVICES}
    last = {name: scrape(subject.metrics[name]) for name in SERVICES}
    for at, is_kill in _ticks(seconds):
        time.sleep(max(0.0, began + at - time.monotonic()))
        if not is_kill:
            for name in SERVICES:
                watched.memory[name].append((at, rss_anon_bytes(pids[name])))
            continue
        if alive := workers(subject.process.pid):
            kill(dice.choice(alive))
            watched.kills += 1
        now = {name: scrape(subject.metrics[name]) for name in SERVICES}
        watched.wrong += [f"{name}: {what}" for name in SERVICES for what in fallen(last[name], now[name])][:1]
        last = now
    return watched


def _ticks(seconds: float) -> list[tuple[float, bool]]:
    """Times at which a worker is killed (True), and at which memory is read, just before the end of a lull."""
    kills = [(at * KILL_SECONDS, True) for at in range(1, math.ceil(seconds / KILL_SECONDS))]
    lulls = range(1, math.floor(seconds / LULL_EVERY_SECONDS) + 1)
    return sorted([*kills, *((at * LULL_EVERY_SECONDS - 0.1, False) for at in lulls)])


def restored(subject: Subject, watched: Watched) -> dict[str, Scrape]:
    """The last readings, once every worker is up, no call is left, and no zombie is left."""
    deadline = time.monotonic() + RESTORED_SECONDS
    while True:
        after = {name: scrape(subject.metrics[name]) for name in SERVICES}
        left = _left(subject, after)
        if not left or time.monotonic() > deadline:
            watched.wrong += [f"{what}, {RESTORED_SECONDS:.0f} s after the last call" for what in left]
            return after
        time.sleep(0.05)


def _left(subject: Subject, after: dict[str, Scrape]) -> list[str]:
    left = []
    if (up := total(after["dispatcher"], "unlatch_worker_up")) != WORKERS:
        left.append(f"{up:.0f} of {WORKERS} workers are up")
    if calls := total(after["gateway"], "unlatch_calls_in_flight"):
        left.append(f"the gateway holds {calls:.0f} calls")
    if calls := total(after["dispatcher"], "unlatch_queue_depth"):
        left.append(f"{calls:.0f} calls wait in the dispatcher")
    if any(name == "unlatch_worker_running_seconds" for name, _ in after["dispatcher"]):
        left.append("a worker runs a call")
    if dead := zombies(subject.process.pid):
        left.append(f"{len(dead)} processes are zombies")
    return left


def uncounted(
    doors: list[tuple[str, dict[str, Any]]], before: Mapping[str, Scrape], after: Mapping[str, Scrape], kills: int
) -> list[str]:
    """Calls whose ends do not match their begins, by the callers' counts and by the services' own."""
    wrong = []
    for name, door in doors:
        begun, ended = sum(door["begun"].values()), sum(count for _, _, count in door["ended"])
        if begun != ended:
            wrong.append(f"{name}: {begun} calls began, and {ended} ended")
    through = [door for name, door in doors if name != "dispatcher"]
    begun = sum(sum(door["begun"].values()) for door in through)
    # A caller that leaves at once may have sent nothing.
    left = sum(count for door in through for _, code, count in door["ended"] if code == LEFT)
    counted = _grown(before["gateway"], after["gateway"], "unlatch_calls_total")
    if not begun - left <= counted <= begun:
        wrong.append(f"gateway: {counted:.0f} calls ended there, where {begun - left} to {begun} were sent")
    replaced = _grown(before["dispatcher"], after["dispatcher"], "unlatch_worker_replacement_seconds_count")
    if replaced < kills:
        wrong.append(f"dispatcher: {replaced:.0f} workers were replaced, where {kills} were killed")
    return wrong


def _grown(before: Scrape, after: Scrape, name: str) -> float:
    return total(after, name) - total(before, name)


def show(
    doors: list[tuple[str, dict[str, Any]]], watched: Watched, restarts: float, seconds: float, console: Console
) -> None:
    begun: Counter[str] = Counter()
    ended: Counter[tuple[str, str]] = Counter()
    for _, door in doors:
        begun.update(door["begun"])
        ended.update({(kind, code): count for kind, code, count in door["ended"]})
    codes = sorted({code for _, code in ended} - {OK, LEFT})
    table = Table(title=f"{sum(begun.values()):,} calls in {seconds:.0f} s, {watched.kills} kills")
    table.title_justify = table.caption_justify = "left"
    table.add_column("kind")
    for name in ("begun", OK, LEFT, *codes):
        table.add_column(name, justify="right")
    for kind in KINDS:
        counts = (begun[kind.name], *(ended[kind.name, code] for code in (OK, LEFT, *codes)))
        table.add_row(kind.name, *(f"{count:,}" if count else "" for count in counts))
    judged = "" if seconds >= JUDGED_SECONDS else f"; not judged in a run under {JUDGED_SECONDS:.0f} s"
    slopes = ", ".join("{} {:+.1f} ± {:.1f}".format(name, *watched.growth(name)) for name in SERVICES)
    table.caption = f"{restarts:.0f} workers ended and were replaced. RssAnon, MiB a minute: {slopes}{judged}."
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="how long callers begin calls")
    parser.add_argument("--fleet", action="store_true", help="three replicas, one killed every two seconds")
    parser.add_argument("--processes", type=int, default=2, help="processes of callers")
    parser.add_argument("--seed", type=int, default=0, help="of all dice: who is called, with what, who is killed")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if args.fleet:
            wrong = soak_fleet.run(args.seconds, args.seed, console)
        else:
            wrong = run(args.seconds, args.processes, args.seed, console)
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
