"""Draws top.svg, what `unlatch top` shows of a mesh that has worked for a minute: `python docs/images/top.py`."""

import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from unlatch import BlockingClient
from unlatch.cli.top.figures import Figures, figures
from unlatch.cli.top.screen import screen
from unlatch.cli.top.sources import HISTORY_SECONDS, Source

DOORS = ("", "metrics-", "health-")
ANY_PORTS = [f"--{door}listen=127.0.0.1:0" for door in DOORS]
WIDTH = 112
BUSY = 0.6


def work(address: str, caller: int, ending: threading.Event) -> None:
    """Make the calls of one caller: pictures, prices and small calls, now more, now fewer."""
    dice = np.random.default_rng(caller)
    photo = dice.integers(0, 256, (960, 1280, 3), dtype=np.uint8)
    with BlockingClient(address, timeout=30) as mesh:
        while not ending.is_set():
            busy = 0.5 + 0.5 * np.sin(time.monotonic() / 7 + caller / 4)
            list(mesh.map("fft", (dice.normal(size=(8, 512)) for _ in range(8))))
            mesh.gaussian_blur(photo, sigma=float(4 + dice.integers(20)))
            mesh.monte_carlo_option(np.linspace(90, 110, 5), strike=100.0, paths=5_000_000, seed=caller)
            mesh.svd(dice.normal(size=(400, 300)))
            ending.wait(2.0 * (1 - busy))


def without_fonts(svg_format: str) -> str:
    """Remove the fonts that a reader would have to fetch: the reader's own monospace font is used instead."""
    return re.sub(r"@font-face \{\{.*?\}\}\n", "", svg_format, flags=re.DOTALL)


def log(server: Popen[str]) -> Iterator[dict[str, str]]:
    """Read the entries of a server's log."""
    assert server.stderr is not None
    return (json.loads(line) for line in server.stderr)


def look(source: Source) -> Figures:
    """Return the figures that are known now."""
    return figures([source.seen], time.monotonic())


def main(target: Path) -> None:
    """Run a server, make calls, and draw what `unlatch top` shows."""
    with Popen([sys.executable, "-m", "unlatch", "serve", *ANY_PORTS], stderr=PIPE, text=True) as server:
        unit = next(entry for entry in log(server) if entry["event"] == "serving")
        ending = threading.Event()
        callers = [threading.Thread(target=work, args=(unit["listen"], caller, ending)) for caller in range(6)]
        source = Source(unit["metrics_listen"], 1.0, lambda: None)
        for caller in callers:
            caller.start()
        source.start()
        time.sleep(HISTORY_SECONDS)
        shown = look(source)
        # Between two waves of calls there is little to see.
        while any(process.worker and process.utilization_ratio < BUSY for process in shown.processes):
            time.sleep(0.5)
            shown = look(source)
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
        console.print(screen(shown, WIDTH, None))
        ending.set()
        for caller in callers:
            caller.join()
        server.terminate()
        server.communicate()
    target.write_text(console.export_svg(title="unlatch top", code_format=without_fonts(CONSOLE_SVG_FORMAT)))


main(Path(__file__).with_suffix(".svg"))
