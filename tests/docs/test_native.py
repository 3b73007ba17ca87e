"""The example kernel in C++ (examples/native): it builds, serves, computes right, and releases the interpreter lock."""

import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.support.mesh import ROOT, running_mesh
from unlatch import BlockingClient, KernelError
from unlatch.common.errors import InvalidArgument

pytestmark = pytest.mark.timeout(240)  # a compiler's time


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed the example, with the tests' own build tools."""
    for tool in ("g++", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    target = tmp_path_factory.mktemp("native")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [*command, "--target", str(target), str(ROOT / "examples" / "native")],
        env={**os.environ, "PATH": tools},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return target


@pytest.fixture
def native(built: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's package, imported into this process."""
    monkeypatch.syspath_prepend(str(built))
    return importlib.import_module("native_kernels")


def reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the recurrence as it is defined, cell by cell."""
    cost = np.full((len(x) + 1, len(y) + 1), np.inf)
    cost[0, 0] = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            cost[i + 1, j + 1] = abs(x[i] - y[j]) + min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
    return float(cost[-1, -1])


def test_gives_what_the_recurrence_gives(native: ModuleType) -> None:
    """The result equals the recurrence's bit by bit: the same additions in the same order."""
    random = np.random.default_rng(1)
    for n, m in ((1, 1), (1, 7), (7, 1), (30, 40), (64, 64)):
        rows, reference = random.normal(size=(3, n)), random.normal(size=m)
        wanted = [reference_distance(row, reference) for row in rows]
        np.testing.assert_array_equal(native.warping_distance(rows, reference), wanted)


def test_stretched_series_are_not_far(native: ModuleType) -> None:
    """A series has no distance from itself played at half speed."""
    series = np.sin(np.linspace(0, 6, 50))
    assert native.warping_distance(np.repeat(series, 2)[None], series).tolist() == [0.0]


@pytest.mark.parametrize(
    ("rows", "reference", "says"),
    [
        (np.ones((2, 0)), np.ones(3), "not empty"),
        (np.ones((2, 3)), np.ones(0), "not empty"),
        (np.full((1, 2), np.nan), np.ones(3), "rows: wanted finite"),
        (np.ones((1, 2)), np.full(3, np.inf), "reference: wanted finite"),
        (np.ones((1, 40_000)), np.ones(40_000), "at most 1000000000 cells"),
    ],
)
def test_refuses_what_makes_no_sense(native: ModuleType, rows: np.ndarray, reference: np.ndarray, says: str) -> None:
    """Impossible arguments raise KernelError before any work."""
    with pytest.raises(KernelError, match=says):
        native.warping_distance(rows, reference)


def progresses_during(call: Callable[[], object]) -> bool:
    """Whether another thread gets the interpreter lock during a call, though Python itself never takes it away.

    With a switch interval longer than the test, a thread gives the lock up only where its code says so. So the other
    thread can run only if the called function lets it.
    """
    begun, progressed = threading.Event(), threading.Event()

    def other() -> None:
        begun.wait()
        progressed.set()

    thread = threading.Thread(target=other)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        begun.set()
        for _ in range(20):
            call()
            if progressed.is_set():
                return True
        return False
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_releases_the_interpreter_lock(native: ModuleType) -> None:
    """Another thread makes progress during the call, and makes none during a call that keeps the lock."""
    rows, reference, out = np.ones((1, 5000)), np.ones(5000), np.empty(1)
    numbers = list(range(200_000))
    assert not progresses_during(lambda: sorted(numbers))
    assert progresses_during(lambda: native._warping.distances(rows, reference, out))


def test_is_served(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel is served by its package's name, on read-only inputs, and its refusals reach the caller."""
    monkeypatch.setenv("PYTHONPATH", str(built))
    rows, reference = np.random.default_rng(2).normal(size=(5, 20)), np.linspace(-1, 1, 30)
    with (
        running_mesh(tmp_path, dispatcher=["--kernels", "native_kernels"]) as mesh,
        BlockingClient(mesh.gateway, timeout=20) as client,
    ):
        wanted = [reference_distance(row, reference) for row in rows]
        np.testing.assert_array_equal(client.warping_distance(rows, reference), wanted)
        with pytest.raises(InvalidArgument, match="not empty"):
            client.warping_distance(rows, reference[:0])


def test_passes_its_check(built: Path) -> None:
    """`unlatch check` finds no fault in the kernel."""
    command = [sys.executable, "-m", "unlatch", "check", "native_kernels", "--most-mib", "0.01"]
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(built)}, capture_output=True, text=True, timeout=50, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 kernel, 0 faults, 1 note\n" in ran.stdout  # The kernel refuses empty series.
