"""`python -m bench`: run all benchmarks in some ten minutes; with `--quick` in one, with less exact figures.

`--only NAME` (repeatable) selects a part (throughput, client, responsive, beside, gil, pool, scan, fleet, tls,
waiting, starved, units), a subject (echo, recipe, unlatch, apart, bare, inline, threads), a work (identity_1k, spin10,
…) or a figure of the pool (short_call, goodput, …). client, responsive and beside measure a unit, with `--only apart`
the two services, and with UNLATCH_UNITS=2 in the environment two units. Exit codes: 1 calls failed, 2 the bench could
not measure.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Never

from rich.console import Console
from rich.text import Text

from bench import gil, responsive, throughput, tls, units
from bench.fleet import measure as fleet
from bench.load import clients
from bench.load.load import connections, require_h2load
from bench.pool import measure as pool
from bench.processes import BenchError, Child
from bench.report import Findings, failed_calls, ratios, show, write
from bench.starved import measure as starved
from bench.subjects import oip, subjects
from bench.waiting import measure as waiting

PARTS = frozenset(
    {
        "throughput",
        "client",
        "responsive",
        "beside",
        "gil",
        "pool",
        "scan",
        "fleet",
        "tls",
        "waiting",
        "starved",
        "units",
    }
)
SUBJECTS = frozenset({"echo", "recipe", "unlatch", "apart", "bare", "inline", "threads"})
WORKS = frozenset(work for work, _ in throughput.CASES)
# Rounds and seconds of each part; of the last line, rounds and calls, and calls.
FULL = {
    "throughput": (5, 2.0), "client": (5, 1.5), "gil": (2, 2.0), "responsive": (1, 18.0), "beside": (5, 1.0),
    "pool": (3, 2.5), "fleet": (3, 2.0), "tls": (5, 1.5), "starved": (1, 60.0), "units": (7, 1.5),
    "scan": (15, 1_000), "waiting": (10_000, 0.0),
}  # fmt: skip
QUICK = {
    "throughput": (1, 0.5), "client": (1, 0.5), "gil": (1, 0.5), "responsive": (1, 1.5), "beside": (1, 0.5),
    "pool": (1, 0.5), "fleet": (1, 0.5), "tls": (1, 0.5), "starved": (1, 2.0), "units": (1, 0.5),
    "scan": (3, 500), "waiting": (2_000, 0.0),
}  # fmt: skip


def run(only: frozenset[str], quick: bool, console: Console) -> Findings:
    """Measure the selected parts."""
    plan = QUICK if quick else FULL
    names, works_asked, of_pool = only & SUBJECTS or SUBJECTS, only & WORKS, only & pool.FIGURES
    parts = _parts(only)
    with console.status("calibrating") as status:
        works = oip.works()
        findings = Findings(settings=_settings(only, quick, works))
        with ExitStack() as stack:
            if parts & {"throughput", "client", "responsive", "beside"}:
                status.update("starting servers")
                running = {name: subjects.start(stack, name) for name in _servers(names, parts)}
                for subject in running.values():
                    subjects.await_ready(subject, works["identity_1k"])
            if "throughput" in parts:
                bare = subjects.Bare(stack) if "bare" in names else None
                rounds, seconds = plan["throughput"]
                findings.cells += throughput.measure(
                    works, running, bare,
                    rounds=rounds, seconds=seconds, on_step=status.update, only_works=works_asked,
                )  # fmt: skip
            if parts & {"client", "responsive", "beside"}:
                _measure_clients(findings, parts, plan, works, running, status.update)
        _measure_apart(findings, parts, plan, works, names, of_pool, status.update)
    return findings


def _parts(only: frozenset[str]) -> frozenset[str]:
    """The selected parts, or those of the selected works and figures, or all."""
    implied = {part for part, named in (("throughput", only & WORKS), ("pool", only & pool.FIGURES)) if named}
    return only & PARTS or frozenset(implied) or PARTS


def _servers(names: frozenset[str], parts: frozenset[str]) -> list[str]:
    """The subjects to start. Without throughput, one of our own is enough."""
    known = ("echo", "recipe", "apart", "unlatch")
    wanted = known if "throughput" in parts else ("unlatch",) if "unlatch" in names else ("apart",)
    return [name for name in wanted if name in names]


def _measure_clients(
    findings: Findings,
    parts: frozenset[str],
    plan: Mapping[str, tuple[int, float]],
    works: dict[str, oip.Work],
    running: Mapping[str, subjects.Subject],
    on_step: Callable[[str], None],
) -> None:
    """Measure the parts that use one server of Unlatch's own, if one is running."""
    subject = running.get("unlatch") or running.get("apart")
    if subject is None:
        return
    if "client" in parts:
        rounds, seconds = plan["client"]
        findings.cells += clients.measure(subject, rounds=rounds, seconds=seconds, on_step=on_step)
    if "responsive" in parts:
        rounds, seconds = plan["responsive"]
        findings.responsive = responsive.measure(
            subject, works["spin10"], rounds=rounds, seconds=seconds, on_step=on_step
        )
    if "beside" in parts:
        passes, seconds = plan["beside"]
        findings.beside = clients.beside_64mib(subject, passes=passes, seconds=seconds, on_step=on_step)


def _measure_apart(
    findings: Findings,
    parts: frozenset[str],
    plan: Mapping[str, tuple[int, float]],
    works: dict[str, oip.Work],
    names: frozenset[str],
    of_pool: frozenset[str],
    on_step: Callable[[str], None],
) -> None:
    """Measure the parts that start servers of their own, after the others' servers have ended."""
    if "gil" in parts:
        rounds, seconds = plan["gil"]
        findings.gil, findings.gil_idle = gil.measure(
            works, rounds=rounds, seconds=seconds, on_step=on_step, names=names
        )
    if "tls" in parts and "unlatch" in names:
        rounds, seconds = plan["tls"]
        findings.cells += tls.measure(works, rounds=rounds, seconds=seconds, on_step=on_step)
    if "units" in parts and "unlatch" in names:
        rounds, seconds = plan["units"]
        findings.cells += units.measure(works, rounds=rounds, seconds=seconds, on_step=on_step)
    if "pool" in parts and "unlatch" in names:
        rounds, seconds = plan["pool"]
        findings.pool = pool.measure(
            works["identity_1k"], rounds=rounds, seconds=seconds, on_step=on_step, only=of_pool
        )
    if "scan" in parts and "unlatch" in names:
        on_step("scan · the dispatcher with stub workers")
        rounds, calls = plan["scan"]
        with Child("pool-scan", "bench.pool.scan") as child:
            findings.scan = child.ask(rounds=rounds, calls=int(calls))
    if "fleet" in parts and "unlatch" in names:
        rounds, seconds = plan["fleet"]
        findings.fleet = fleet.measure(rounds=rounds, seconds=seconds, on_step=on_step)
    if "waiting" in parts and "unlatch" in names:
        findings.waiting = waiting.measure(works["identity_1k"], calls=plan["waiting"][0], on_step=on_step)
    if "starved" in parts and "unlatch" in names:
        findings.starved = starved.measure(seconds=plan["starved"][1], on_step=on_step)


def _settings(only: frozenset[str], quick: bool, works: dict[str, oip.Work]) -> dict[str, object]:
    return {
        "quick": quick,
        "only": sorted(only),
        "plan": {part: {"rounds": plan[0], "seconds": plan[1]} for part, plan in (QUICK if quick else FULL).items()},
        "connections_x_streams": {
            str(count): "{}x{}".format(*connections(count)) for count in (1, 32, 64, gil.WAITING)
        },
        "spin10_rounds": int(works["spin10"].array[0]),
        "python_loop_rounds": int(works["python_loop"].array[0]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round of everything; under a minute")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        choices=sorted(PARTS | SUBJECTS | WORKS | pool.FIGURES),
        help="narrow the run",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        require_h2load()
        findings = run(frozenset(args.only), args.quick, console)
    except BenchError as error:
        console.print("[bold red]bench:[/]", Text(str(error)), highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("bench: interrupted; every process it started has ended")
        return 130
    show(findings, console)
    written = [write(findings)]
    from bench import plots  # matplotlib takes a second to import, and the runs above should not wait for it

    if findings.gil:
        written.append(plots.plot_gil(findings.gil))
    if any(ratio["value"] is not None and ratio["floor"] is not None for ratio in ratios(findings.cells).values()):
        written.append(plots.plot_ratios(ratios(findings.cells)))
    console.print("written: " + ", ".join(str(path) for path in written))
    return 1 if failed_calls(findings) else 0


def _interrupt(*_: object) -> Never:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
