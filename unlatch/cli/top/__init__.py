"""`unlatch top`: the load of every process of a mesh, read from the /metrics of a unit, or of gateway and replicas."""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live

from unlatch.cli.options import Parser
from unlatch.cli.top.figures import Figures, figures
from unlatch.cli.top.screen import ASCII, UNICODE, screen
from unlatch.cli.top.sources import Source
from unlatch.cli.top.terminal import Terminal
from unlatch.common.errors import Unavailable
from unlatch.common.flags import bounded_number

_SHORTEST_INTERVAL_SECONDS = 0.1


def parser() -> Parser:
    """The parser of the command's flags."""
    made = Parser("top", "Show the load of every process, live. q or Ctrl-C ends it.")
    made.add_argument(
        "--metrics",
        type=_addresses,
        default="127.0.0.1:8002",
        help="addresses of /metrics of `unlatch serve`, or of the gateway and each replica: host:port,… "
        "(default: %(default)s)",
    )
    made.add_argument("--interval", type=_interval, default=1.0, help="seconds between two readings (default: 1)")
    made.add_argument("--once", action="store_true", help="read twice, print the figures, and exit")
    made.add_argument("--json", action="store_true", help="print a JSON object for each reading, or one with --once")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch top`; returns the exit code."""
    flags = parser()
    options = flags.parse(arguments)
    if options.once:
        return _once(options)
    if options.json:
        return _lines(options)
    if not sys.stdout.isatty():
        flags.error("stdout is not a terminal: use --once for one reading, or --json for a line each")
    return _live(options)


def _live(options: argparse.Namespace) -> int:
    console = Console(highlight=False)
    signs = ASCII if console.options.ascii_only else UNICODE
    with Terminal() as terminal:
        sources = _started(options, terminal.wake)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                width, height = console.size
                live.update(screen(_figures(sources), width, height, signs), refresh=True)
                if "q" in terminal.wait():
                    return 0


def _once(options: argparse.Namespace) -> int:
    looked = threading.Semaphore(0)
    sources = _started(options, looked.release)
    seen: set[Source] = set()
    while len(seen) < len(sources):
        looked.acquire()
        seen = {source for source in sources if source.seen.before is not None or source.seen.since is not None}
    shown = _figures(sources)
    if not any(source.now for source in shown.sources):
        raise Unavailable("; ".join(f"no /metrics at {source.address}: {source.why}" for source in shown.sources))
    if options.json:
        print(json.dumps(_told(shown)))
    else:
        console = Console(highlight=False)
        console.print(screen(shown, console.width, None, ASCII if console.options.ascii_only else UNICODE))
    return 0


def _lines(options: argparse.Namespace) -> int:
    looked = threading.Semaphore(0)
    sources = _started(options, looked.release)
    while True:
        for _ in sources:
            looked.acquire()
        print(json.dumps(_told(_figures(sources))), flush=True)


def _started(options: argparse.Namespace, told: Any) -> list[Source]:
    sources = [Source(address, options.interval, told) for address in options.metrics]
    for source in sources:
        source.start()
    return sources


def _figures(sources: Sequence[Source]) -> Figures:
    return figures([source.seen for source in sources], time.monotonic())


def _told(shown: Figures) -> dict[str, Any]:
    """The figures in the form of --json, which docs/cli.md describes."""
    told = asdict(shown)
    del told["at"]
    for process in told["processes"]:
        del process["history"]
    told["sources"] = [
        {
            "address": seen.address,
            "reachable": seen.now is not None,
            "unreachable_since": seen.since,
            "why": seen.why,
            "silent_units": seen.now.silent_units if seen.now else [],
        }
        for seen in shown.sources
    ]
    return {"time": time.time(), **told}


def _addresses(text: str) -> list[str]:
    addresses = [address for address in text.split(",") if address]
    for address in addresses:
        _, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal():
            raise argparse.ArgumentTypeError(f"wanted host:port,…, got {address!r}")
    if not addresses:
        raise argparse.ArgumentTypeError("wanted host:port,…")
    return addresses


def _interval(text: str) -> float:
    return bounded_number(text, float, _SHORTEST_INTERVAL_SECONDS, 3600.0, "a number of seconds")
