"""Kernels run in the surroundings in which their module was loaded, except for the states of random numbers."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.mesh import Mesh, Service, running_mesh
from tests.support.watching import wait_until
from unlatch import BlockingClient

# A file beside another one, which a kernel imports only when it runs. At its import it changes what it can.
MINE = """
import decimal, json, locale, multiprocessing, os, random, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from unlatch import Bytes, cancelled, kernel, rng


def seen():
    mask = os.umask(0)
    os.umask(mask)
    return {
        "sys.path": sys.path, "sys.argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ), "umask": mask,
        "filters": repr(warnings.filters), "locale": locale.setlocale(locale.LC_ALL), "numpy": np.geterr(),
        "signals": {
            number.name: repr(signal.getsignal(number))
            for number in (signal.SIGUSR1, signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM)
        },
        "start method": multiprocessing.get_start_method(allow_none=True), "main": repr(sys.modules["__main__"]),
        "recursion": sys.getrecursionlimit(), "precision": decimal.getcontext().prec,
    }


def ignores(number, frame):
    pass


sys.path.append("/nowhere/of/mine")
sys.argv += ["--mine"]
os.chdir(Path(__file__).parent)
os.environ["MINE"] = "set"
os.umask(0o027)
warnings.simplefilter("error", BytesWarning)
locale.setlocale(locale.LC_ALL, "C.UTF-8")
np.seterr(divide="raise")
signal.signal(signal.SIGUSR1, ignores)
signal.signal(signal.SIGCHLD, ignores)
multiprocessing.set_start_method("fork", force=True)
sys.setrecursionlimit(1234)
decimal.getcontext().prec = 7
np.random.seed(1)
random.seed(1)
AT_IMPORT = json.dumps(seen())


@kernel
def surroundings() -> Bytes[np.ndarray, "2"]:
    return np.array([AT_IMPORT, json.dumps(seen())])


@kernel
def status_of_a_program() -> Bytes[np.ndarray, ""]:
    return np.array(subprocess.check_output(["cat", "/proc/self/status"], text=True))


@kernel
def scaled(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    from tables_of_mine import SCALE

    return x * SCALE


@kernel
def draws(*, seconds: float) -> Float64[np.ndarray, "4"]:
    time.sleep(seconds)
    return np.array([os.getpid(), np.random.random(), random.random(), rng().random()])


def double(x):
    return x * 2


def has_left(x):
    return cancelled()


@kernel
def many_processes(x: Float64[np.ndarray, "n"], *, way: str) -> Float64[np.ndarray, "n"]:
    if way == "executor":
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(2) as pool:
            return np.array(list(pool.map(double, x)))
    if way == "joblib":
        from joblib import Parallel, delayed

        return np.array(Parallel(n_jobs=2)(delayed(double)(value) for value in x))
    with multiprocessing.get_context(way or None).Pool(2) as pool:
        return np.array(pool.map(double, x))


@kernel
def asks_in_a_process(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    with multiprocessing.Pool(1) as pool:
        time.sleep(0.3)
        return np.array(pool.map(has_left, x), dtype=float)


@kernel
def streams_of_processes() -> Float64[np.ndarray, "4"]:
    with multiprocessing.Pool(2) as pool:
        return np.array(pool.map(from_rng, range(4), 1))


def from_rng(_):
    time.sleep(0.2)
    return rng().random()
"""

# A file of a package, with relative imports, and another file beside it that is served too.
ACME = """
import multiprocessing

import numpy as np
from jaxtyping import Float64

from unlatch import kernel

from . import sizes
from ..tables import SCALE


def resize(value):
    return value * sizes.SIZE


@kernel
def resized(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return np.array(pool.map(resize, x)) * SCALE
"""


@pytest.fixture(scope="module")
def surrounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh of two workers that serves a file beside another one, and a file of a package."""
    folder = tmp_path_factory.mktemp("surrounded")
    for path, text in {
        "mine/tables_of_mine.py": "SCALE = 3.0",
        "mine/mine.py": MINE,
        "acme/__init__.py": "",
        "acme/tables.py": "SCALE = 5.0",
        "acme/models/__init__.py": "",
        "acme/models/sizes.py": "SIZE = 2.0",
        "acme/models/resizing.py": ACME,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    kernels = f"{folder}/acme/models/resizing.py,{folder}/mine/mine.py"
    with running_mesh(folder, dispatcher=["--kernels", kernels]) as mesh:
        yield mesh


@pytest.fixture
def client(surrounded: Mesh) -> Iterator[BlockingClient]:
    """A client of that mesh, whose calls end within 40 s."""
    with BlockingClient(surrounded.gateway, timeout=40) as client:
        yield client


def test_kernel_sees_what_its_module_has_seen(client: BlockingClient) -> None:
    """Nothing that the module had or has set at its import is undone by the start of a worker."""
    at_import, in_worker = client.surroundings()
    assert in_worker == at_import


def test_kernel_imports_a_module_beside_its_file(client: BlockingClient) -> None:
    """The file's folder is on Python's path when the kernel runs, too."""
    assert client.scaled([1.0, 2.0]).tolist() == [3.0, 6.0]


def test_programs_of_kernels_ignore_no_signals(client: BlockingClient, surrounded: Mesh) -> None:
    """They are as if they had been started by hand, though a worker itself does not end by these signals."""
    workers, numbers = surrounded.workers, (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    for pid in workers:
        for number in numbers:
            os.kill(pid, number)
    status = client.status_of_a_program().item().decode()
    (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    assert not [number.name for number in numbers if int(ignored, 16) >> number - 1 & 1]
    assert surrounded.workers == workers


@pytest.mark.parametrize("way", ["", "fork", "spawn", "forkserver", "executor", "joblib"])
def test_kernel_of_a_file_uses_processes(client: BlockingClient, way: str) -> None:
    """The processes of a kernel find the functions of its file, however they are started."""
    assert client.many_processes([1.0, 2.0, 3.0], way=way).tolist() == [2.0, 4.0, 6.0]


def test_kernel_of_a_file_in_a_package_is_loaded_as_its_module(client: BlockingClient) -> None:
    """Relative imports work, and processes of the kernel find its functions."""
    assert client.resized([1.0]).tolist() == [10.0]


def test_process_of_a_kernel_takes_no_frames_of_its_worker(client: BlockingClient, surrounded: Mesh) -> None:
    """`cancelled()` is False in a forked process, and the call that is staged meanwhile is not lost."""
    workers = surrounded.workers
    with ThreadPoolExecutor(6) as callers:
        asked = [callers.submit(client.asks_in_a_process, [1.0, 2.0]) for _ in range(6)]
        assert [call.result().tolist() for call in asked] == [[0.0, 0.0]] * 6
    assert surrounded.workers == workers


def drawn(client: BlockingClient, pids: set[int]) -> dict[int, list[float]]:
    """Return the numbers that each of these workers draws, from three sources."""
    numbers: dict[int, list[float]] = {}
    with ThreadPoolExecutor(2) as callers:
        while numbers.keys() < pids:
            for pid, *values in callers.map(lambda _: client.draws(seconds=0.2), range(2)):
                numbers.setdefault(int(pid), values)
    return numbers


def test_workers_and_replacements_draw_different_numbers(client: BlockingClient, surrounded: Mesh) -> None:
    """NumPy's global state, Python's and `unlatch.rng()` differ, although the module has seeded them."""
    first = drawn(client, set(surrounded.workers))
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(set(surrounded.workers) - first.keys()) == 2, "both workers are replaced")
    second = drawn(client, set(surrounded.workers))
    values = np.array([*first.values(), *second.values()])
    assert values.shape == (4, 3)
    assert len(np.unique(values)) == values.size


def test_processes_of_a_kernel_draw_different_numbers(client: BlockingClient) -> None:
    """`unlatch.rng()` is another stream in each process that a kernel forks."""
    assert len(set(client.streams_of_processes().tolist())) == 4


# A model that OpenMP's threads fit at import. GNU's OpenMP hangs in a child of a process that has used several.
BOOSTED = """
import numpy as np
from jaxtyping import Float64, Int64
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_info

from unlatch import kernel

X = np.arange(1500.0).reshape(500, 3)
MODEL = HistGradientBoostingRegressor(max_iter=5).fit(X, X[:, 0])


@kernel
def boosted(x: Float64[np.ndarray, "rows 3"]) -> Float64[np.ndarray, "rows"]:
    return MODEL.predict(x)


@kernel
def openmp_threads() -> Int64[np.ndarray, ""]:
    return np.array(max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"))
"""


@pytest.mark.timeout(120)
def test_openmp_is_used_at_import_and_in_workers(tmp_path: Path) -> None:
    """OpenMP has one thread while modules are loaded, and a worker's share in the worker."""
    (tmp_path / "boosted_kernels.py").write_text(BOOSTED)
    flags = ["--kernels", str(tmp_path / "boosted_kernels.py"), "--workers", "1", "--blas-threads", "2"]
    address = f"unix:{tmp_path}/s"
    ports = ["--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]
    with Service("compute", "--listen", address, *ports, *flags) as replica:
        replica.wait_for("serving", within=60)
        with BlockingClient(address, timeout=40) as client:
            assert client.boosted(np.ones((1000, 3))).shape == (1000,)
            assert client.openmp_threads() == 2
        replica.stop()
