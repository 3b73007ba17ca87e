"""`unlatch top` on a real terminal (tmux), beside a real mesh that works, loses a worker, ends and comes back."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.mesh import ROOT, Mesh, Service, running_dispatcher, running_mesh
from tests.support.serve import free_address
from tests.support.watching import Gate, Scrape, children, wait_until
from tests.unlatch.cli.conftest import COMMAND, Unlatch
from unlatch import BlockingClient
from unlatch.common.errors import UnlatchError

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here: top is not seen on a terminal")
NAMES = ("gateway", "dispatcher", "forkserver", "worker-0", "worker-1")


class Pane:
    """A terminal in which a shell runs `unlatch top` and then prints its exit code."""

    def __init__(self, directory: Path, width: int, height: int) -> None:
        self._tmux = ["tmux", "-u", "-f", "/dev/null", "-S", str(directory / "tmux")]
        self._size = [f"-x{width}", f"-y{height}"]

    def run(self, arguments: str) -> None:
        top = f"PYTHONPATH={ROOT} {sys.executable} -m unlatch top {arguments}"
        script = f"echo before; {top}; echo ended with $?; stty -a; exec cat"
        self("new-session", "-d", *self._size, script)

    def __call__(self, *command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ("TMUX", "COLUMNS", "LINES")}
        ran = subprocess.run(
            [*self._tmux, *command], env=environment, capture_output=True, text=True, check=True, timeout=10
        )
        return ran.stdout

    @property
    def text(self) -> str:
        return self("capture-pane", "-p")

    def row(self, name: str) -> str:
        """Return the line of a process; empty while there is none."""
        return next((line for line in self.text.splitlines() if line.startswith(f"{name} ")), "")

    def wait_for(self, condition: Callable[[str], object], what: str) -> None:
        try:
            wait_until(lambda: condition(self.text), what, 15.0)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; the screen is\n{self.text}") from None


@pytest.fixture
def pane(tmp_path: Path) -> Iterator[Callable[..., Pane]]:
    """Open terminals for a test."""
    opened = []

    def open_(arguments: str, width: int = 100, height: int = 24) -> Pane:
        pane = Pane(tmp_path, width, height)
        pane.run(arguments)
        opened.append(pane)
        return pane

    yield open_
    for pane in opened:
        pane("kill-server")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh that these tests alone use, so that all its work is theirs."""
    with running_mesh(tmp_path_factory.mktemp("top")) as running:
        yield running


@contextmanager
def load(mesh: Mesh, seconds: float) -> Iterator[None]:
    """Four callers, which call `burns` again and again, whatever becomes of a call."""
    ending = threading.Event()

    def call() -> None:
        with BlockingClient(mesh.gateway, timeout=30.0) as client:
            while not ending.is_set():
                try:
                    client.burns(seconds=seconds)
                except UnlatchError:
                    ending.wait(0.01)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        ending.set()
        for caller in callers:
            caller.join()


def watching(mesh: Mesh) -> str:
    return f"--interval 0.3 --metrics {mesh.gateway_metrics},{mesh.dispatcher_metrics}"


def percent(row: str) -> float:
    found = re.search(r"(\d+)%", row)
    return float(found[1]) if found else -1.0


@needs_tmux
def test_what_is_shown_is_what_is(own: Mesh, pane: Callable[..., Pane]) -> None:
    """Under load the picture has every process by name, its utilisation as in /metrics, its bar, memory and run."""
    with load(own, 0.01):
        top = pane(watching(own), 120)
        top.wait_for(lambda text: all(f"{name} " in text for name in NAMES), "every process is there")

        def agree() -> bool:
            scrape = Scrape(own.dispatcher_metrics)
            real = [100 * scrape.sum("unlatch_process_utilization_ratio", process=f"worker-{n}") for n in (0, 1)]
            return min(real) > 1 and all(abs(percent(top.row(f"worker-{n}")) - real[n]) <= 6 for n in (0, 1))

        wait_until(agree, "the workers' utilisation is that of /metrics")
        for name in ("worker-0", "worker-1"):
            row = top.row(name)
            assert abs(row.count("█") - percent(row) * 20 / 100) <= 1.0, row
            assert row.count("█") + row.count("░") >= 20, row
        wait_until(lambda: "burns " in top.row("worker-0"), "it says what the worker runs")
        resident = (
            Scrape(own.dispatcher_metrics).sum("unlatch_process_resident_memory_bytes", process="dispatcher") / 2**20
        )
        shown = re.search(r"(\d+) MiB", top.row("dispatcher"))
        assert shown is not None
        assert float(shown[1]) == pytest.approx(resident, rel=0.2)

        def rate_agrees() -> bool:
            before, began = Scrape(own.gateway_metrics), time.monotonic()
            calls: list[float] = []
            while time.monotonic() < began + 1.5:
                found = re.search(r"([\d.,]+) calls/s", top.text)
                calls += [float(found[1].replace(",", ""))] if found else []
            grown = Scrape(own.gateway_metrics).sum("unlatch_calls_total") - before.sum("unlatch_calls_total")
            return sum(calls) / len(calls) == pytest.approx(grown / (time.monotonic() - began), rel=0.3)

        wait_until(rate_agrees, "calls a second are those of /metrics")
        # Calls have ended since the last scrape.
        top.wait_for(lambda text: re.search(r"p50 [\d.]+ m?s  p99 [\d.]+ m?s", text), "latencies are there")
        top.wait_for(lambda text: re.search(r"^burns +[\d.]+ +0 ", text, re.MULTILINE), "the kernel has its row")


@needs_tmux
def test_a_long_run_and_an_idle_worker(own: Mesh, pane: Callable[..., Pane], tmp_path: Path) -> None:
    """A long run is shown with its growing time. The worker is shown as idle afterwards."""
    top, gate = pane(watching(own)), Gate(tmp_path / "gate")
    with BlockingClient(own.gateway) as client:
        runs = threading.Thread(target=client.waits_for, kwargs={"path": str(gate)})
        runs.start()
        wait_until(lambda: gate.reached, "it runs")
        top.wait_for(lambda text: re.search(r"worker-\d .* waits_for \d+\.\d s", text), "for some time")
        top.wait_for(lambda text: re.search(r"worker-\d .* waits_for [2-9]\.\d s", text), "and for more")
        gate.open()
        runs.join()
    top.wait_for(lambda text: text.count(" idle ") == 2, "both are idle")


@needs_tmux
def test_it_survives_being_resized(own: Mesh, pane: Callable[..., Pane]) -> None:
    """Narrower, lower and wider again, the picture fits each time and has the names."""
    top = pane(watching(own), 100, 24)
    top.wait_for(lambda text: "worker-1 " in text, "it draws")
    for width, height, cells in ((80, 20, 10), (40, 12, 6), (20, 6, 6), (140, 30, 20)):
        top("resize-window", f"-x{width}", f"-y{height}")
        empty = f" {'░' * cells} "
        if width >= 40:
            top.wait_for(partial(_has, empty), "it fits")
        assert "Traceback" not in top.text
    top.wait_for(lambda text: "last minute" in text and "restarts" in text, "every column is back")


def _has(bar: str, text: str) -> bool:
    return "worker-1 " in text and bar in text


@needs_tmux
def test_a_worker_that_is_killed_comes_back(own: Mesh, pane: Callable[..., Pane]) -> None:
    """The killed worker's restarts go up by one, and its bar is there again under the same name."""
    top = pane(watching(own))
    top.wait_for(lambda text: "worker-1 " in text, "it draws")

    def restarts() -> dict[str, int]:
        """Return the restarts of the workers whose rows are drawn whole."""
        rows = {name: top.row(name).split() for name in ("worker-0", "worker-1")}
        return {name: int(row[-1]) for name, row in rows.items() if row and row[-1].isdecimal()}

    while len(before := restarts()) < 2:
        pass
    os.kill(own.workers[0], signal.SIGKILL)
    wait_until(lambda: sum(restarts().values()) == sum(before.values()) + 1, "one restart more is shown")
    with load(own, 0.05):
        wait_until(lambda: all(percent(top.row(name)) > 1 for name in before), "both bars are there")


@needs_tmux
def test_a_server_that_goes_and_comes_back(tmp_path: Path, pane: Callable[..., Pane]) -> None:
    """The picture says since when a server is away; later it has figures again, and no negative rate."""
    socket = tmp_path / "dispatcher.sock"
    ports = ("--health-listen", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--replicas", f"unix:{socket}")
    # Reserved, so that no other process gets the port before the second gateway.
    with running_dispatcher(socket) as dispatcher, free_address() as metrics:
        dispatcher_metrics = dispatcher.wait_for("serving")["metrics_listen"]
        with Service("gateway", *ports, "--metrics-listen", metrics) as first:
            serving = first.wait_for("serving")
            first.wait_for("replica is ready")
            top = pane(f"--interval 0.3 --metrics {metrics},{dispatcher_metrics}")
            with BlockingClient(serving["listen"]) as client:
                for _ in client.map("halve", (float(n) for n in range(500))):
                    pass
            top.wait_for(lambda text: re.search(r"^halve ", text, re.MULTILINE), "the kernel is listed")
            first.kill()
        top.wait_for(lambda text: f"{metrics} unreachable since " in text and "refused" in text, "it says so")
        assert top.row("gateway") == ""
        assert top.row("worker-1") != ""
        with Service("gateway", *ports, "--metrics-listen", metrics) as second:
            second.wait_for("replica is ready")
            screens = [top.text]
            while "unreachable" in screens[-1] or len(screens) < 100:
                screens.append(top.text)
            assert top.row("gateway") != ""
            assert not [text for text in screens if re.search(r" -\d", text)]


@needs_tmux
@pytest.mark.parametrize(("key", "code"), [("q", 0), ("C-c", 130), ("SIGTERM", 143)])
def test_the_terminal_is_as_it_was(own: Mesh, pane: Callable[..., Pane], key: str, code: int) -> None:
    """The key q ends with 0, Ctrl-C with 130, SIGTERM with 143.

    The old screen is back, and lines are edited and echoed.
    """
    top = pane(watching(own))
    top.wait_for(lambda text: "worker-1 " in text and "before" not in text, "it draws")
    if key == "SIGTERM":
        (process,) = children(int(top("display-message", "-p", "#{pane_pid}")))
        os.kill(process, signal.SIGTERM)
    else:
        top("send-keys", key)
    top.wait_for(lambda text: f"ended with {code}" in text, "it ends")
    top.wait_for(lambda text: re.search(r"(?<!-)icanon", text) and re.search(r"(?<!-)echo ", text), "stty says so")
    assert "before" in top.text
    assert "Traceback" not in top.text


@needs_tmux
def test_a_terminal_without_colour(own: Mesh, pane: Callable[..., Pane]) -> None:
    """Nothing is coloured, and nothing is missing."""
    top = pane(watching(own))
    top.wait_for(lambda text: "worker-1 " in text, "it draws")
    coloured = top("capture-pane", "-p", "-e")
    colour = re.compile("\x1b\\[[0-9;]*3[0-7]m")
    assert colour.search(coloured)
    top("send-keys", "q")
    top.wait_for(lambda text: "ended with 0" in text, "it ends")
    command = f"NO_COLOR=1 PYTHONPATH={ROOT} TERM=vt100 {sys.executable} -m unlatch top {watching(own)}"
    top("respawn-pane", "-k", command)
    top.wait_for(lambda text: "worker-1 " in text, "it draws")
    assert not colour.search(top("capture-pane", "-p", "-e"))


def test_once(own: Mesh, unlatch: Unlatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --once one picture is printed without a terminal, and with --json the same figures."""
    monkeypatch.setenv("COLUMNS", "120")
    flags = ["top", "--once", *watching(own).split()]
    text = unlatch(*flags)
    assert text.code == 0
    assert all(name in text.out for name in NAMES)
    told = unlatch(*flags, "--json").json
    assert [process["name"] for process in told["processes"]] == list(NAMES)
    assert told["processes"][3]["worker"].keys() == {
        *("up", "kernel", "running_seconds", "calls_per_second", "restarts", "calls", "blocks"),
    }
    assert told["processes"][0].keys() == {
        *("name", "unit", "replica", "utilization_ratio", "resident_bytes", "worker"),
    }
    assert told.keys() == {
        *("time", "sources", "processes", "calls", "kernels"),
        *("queue_depth", "gateway_queue_depth", "in_flight"),
    }
    assert told["calls"].keys() == {"calls_per_second", "errors_per_second", "p50_seconds", "p99_seconds"}
    assert [source["reachable"] for source in told["sources"]] == [True, True]


def test_a_terminal_of_few_letters(own: Mesh, mesh: Mesh) -> None:
    """Where stdout takes ASCII only, pictures and texts are printed in ASCII."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    once, text = f"top --once {watching(own)}", f"kernels default_scalars --server {mesh.gateway}"
    for command in (once.split(), text.split()):
        ran = subprocess.run([*COMMAND, *command], cwd=ROOT, env=environment, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.isascii()


def test_once_of_nobody(unlatch: Unlatch) -> None:
    """If no address can be read, the output says so. If one can, the others are said to be away."""
    ran = unlatch("top", "--once", "--json", "--metrics", "127.0.0.1:1,127.0.0.1:2")
    assert ran.code == 1
    assert ran.error["code"] == "UNAVAILABLE"
    assert "127.0.0.1:1: Connection refused" in ran.error["message"]


def test_once_of_another_port(own: Mesh, unlatch: Unlatch) -> None:
    """The answer of a gRPC port is not printed: it is bytes of HTTP/2."""
    ran = unlatch("top", "--once", "--metrics", own.gateway)
    assert (ran.code, ran.out) == (1, "")
    assert f"UNAVAILABLE: no /metrics at {own.gateway}: the answer is not HTTP/1" in ran.err


def test_json_lines(own: Mesh) -> None:
    """Without --once a line is printed for every scrape, until the command is ended."""
    command = [*COMMAND, "top", "--json", *watching(own).split()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as top:
        assert top.stdout is not None
        told = [json.loads(top.stdout.readline()) for _ in range(3)]
        top.send_signal(signal.SIGINT)
        assert top.wait(10) == 130
    assert told[0]["time"] < told[1]["time"] < told[2]["time"]
    assert told[2]["calls"]["calls_per_second"] >= 0


def test_several_replicas(own: Mesh, tmp_path: Path, unlatch: Unlatch) -> None:
    """Processes are told apart by their replica's address, and errors by their code."""
    with running_dispatcher(tmp_path / "second.sock") as second, BlockingClient(own.gateway) as client:
        address = second.wait_for("serving")["metrics_listen"]
        addresses = f"{own.gateway_metrics},{own.dispatcher_metrics},{address}"
        has_failed, ending = threading.Event(), threading.Event()

        def fail() -> None:
            while not ending.is_set():
                with pytest.raises(UnlatchError):
                    client.raises_kernel_error(message="no")
                has_failed.set()

        failing = threading.Thread(target=fail)
        failing.start()
        try:
            wait_until(has_failed.is_set, "calls fail")
            told = unlatch("top", "--once", "--json", "--metrics", addresses).json
        finally:
            ending.set()
            failing.join()
    replicas = {process["replica"] for process in told["processes"] if process["name"] == "worker-0"}
    assert replicas == {own.dispatcher_metrics, address}
    assert told["calls"]["errors_per_second"]["INVALID_ARGUMENT"] > 0
    assert told["kernels"]["raises_kernel_error"]["errors_per_second"].keys() == {"INVALID_ARGUMENT"}
