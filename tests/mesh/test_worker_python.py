"""Workers of another interpreter (`--worker-python`): another SciPy, another Python, and what is said of unfit ones."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import scipy

from tests.support.doors import Oip, request
from tests.support.interpreters import PACKAGES, another_python, environment, install, share_packages, version
from tests.support.mesh import ROOT, Service, running_unit
from tests.support.watching import wait_until
from unlatch import BlockingClient
from unlatch.common.errors import Aborted
from unlatch.protos.inference_pb2 import RepositoryIndexResponse

pytestmark = pytest.mark.timeout(240)

ANY_PORTS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")

OF_SCIPY = """
import numpy as np
import scipy
from jaxtyping import Float64
from scipy.special import expit

from unlatch import kernel


@kernel(version=scipy.__version__)
def logistic(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return expit(x)
"""

OF_PYTHON = """
import os
import signal
import sys

import numpy as np
from jaxtyping import Float64, Int64

from unlatch import cancelled, kernel

if sys.version_info[:2] == {refused}:
    raise SystemExit("loaded by the service's own Python")


@kernel
def about() -> Int64[np.ndarray, "3"]:
    return np.array([*sys.version_info[:2], os.getpid()])


@kernel
def scaled(x: Float64[np.ndarray, "n"], *, factor: float = {factor}) -> Float64[np.ndarray, "n"]:
    return x * factor


@kernel
def dies(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    os.kill(os.getpid(), signal.SIGKILL)
    return x
"""


def unlatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Unlatch to its end."""
    command = [sys.executable, "-m", "unlatch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def older_scipy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that differs from this one in SciPy alone: it has an older one."""
    directory = tmp_path_factory.mktemp("older") / "environment"
    python = environment(directory, unlatch=version())
    share_packages(directory)
    older = "scipy<" + ".".join(scipy.__version__.split(".")[:2])
    install(python, older, flags=("--no-deps", "--ignore-installed"))
    return python


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment of another version of Python, with a NumPy of its own."""
    if not (found := another_python()):
        pytest.skip("no other Python from 3.11 on is on this machine")
    python = environment(tmp_path_factory.mktemp("other") / "environment", found, unlatch=version())
    install(python, *PACKAGES)
    return python


@pytest.fixture
def of_python(tmp_path: Path) -> Path:
    """A file of kernels that another version of Python can load, and this one cannot."""
    module = tmp_path / "of_python.py"
    module.write_text(OF_PYTHON.format(refused=sys.version_info[:2], factor=2.0))
    return module


def test_two_versions_of_scipy_behind_one_gateway(tmp_path: Path, older_scipy: Path) -> None:
    """Two replicas, each with a SciPy of its own, serve one kernel in two versions. Callers ask for either, or any."""
    module = tmp_path / "of_scipy.py"
    module.write_text(OF_SCIPY)
    sockets = [f"unix:{tmp_path}/{name}.sock" for name in ("own", "older")]
    kernels = ("--workers", "1", "--kernels", str(module), *ANY_PORTS)
    with (
        Service("compute", "--listen", sockets[0], *kernels) as own,
        Service("compute", "--listen", sockets[1], *kernels, "--worker-python", str(older_scipy)) as older,
    ):
        for replica in (own, older):
            replica.wait_for("serving", within=60)
        flags = ("--listen", "127.0.0.1:0", "--replicas", ",".join(sockets), *ANY_PORTS)
        with Service("gateway", *flags) as gateway:
            for socket in sockets:
                gateway.wait_for("replica is ready", replica=socket)
            address = gateway.wait_for("serving")["listen"]
            with grpc.insecure_channel(address) as channel:
                listed = RepositoryIndexResponse.FromString(Oip(channel).send(b"", "RepositoryIndex"))
                served = {model.version for model in listed.models if model.name == "logistic"}
                assert scipy.__version__ in served
                assert len(served) == 2
                for wanted in served:
                    message = request("logistic", {"x": np.zeros(3)})
                    message.model_version = wanted
                    answer = Oip(channel).infer(message)
                    assert answer.model_version == wanted
                    assert np.frombuffer(answer.raw_output_contents[0], "f8").tolist() == [0.5] * 3
            with BlockingClient(address, timeout=20) as client:
                assert client.logistic(np.zeros(1)).tolist() == [0.5]
            gateway.stop()
        for replica in (own, older):
            replica.stop()


def test_other_python_serves_and_dies_as_the_own_does(tmp_path: Path, other_python: Path, of_python: Path) -> None:
    """The kernels run in that Python. A worker that dies is replaced by another one of it, and so is the forkserver."""
    flags = ("--kernels", str(of_python), "--worker-python", str(other_python))
    with running_unit(tmp_path, dispatcher=flags) as mesh, BlockingClient(mesh.gateway, timeout=30) as client:
        told = mesh.dispatcher_service.wait_for("workers run another interpreter")
        assert told["interpreter"] == str(other_python)
        assert client.about()[:2].tolist() == [*map(int, told["versions"]["python"].split(".")[:2])]
        assert client.about()[1] != sys.version_info[1]
        assert client.scaled([1.0, 2.0]).tolist() == [2.0, 4.0]
        with pytest.raises(Aborted, match="killed by SIGKILL"):
            client.dies([1.0])
        forkserver, before = mesh.pids["forkserver"], mesh.workers
        os.kill(forkserver, signal.SIGKILL)
        for pid in before:
            os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            pids, workers = mesh.pids, mesh.workers
            return pids.get("forkserver", forkserver) != forkserver and len(workers) == 2 and not {*workers} & {*before}

        wait_until(replaced, "forkserver and workers are replaced", 30.0)
        assert client.about()[1] != sys.version_info[1]


def test_check_runs_the_other_python(other_python: Path, of_python: Path) -> None:
    """`unlatch check` tries and runs the kernels in the interpreter that will serve them."""
    arguments = ("check", str(of_python), "--most-mib", "0", "--seconds", "5")
    own = unlatch(*arguments)
    assert "loaded by the service's own Python" in own.stdout
    ran = unlatch(*arguments, "--worker-python", str(other_python))
    assert "SIGKILL" in ran.stdout, ran
    assert "does-not-load" not in ran.stdout


def test_reload_runs_the_other_python(tmp_path: Path, other_python: Path, of_python: Path) -> None:
    """`unlatch serve --reload` tries a changed file, and serves it, in that interpreter."""
    flags = ("--kernels", str(of_python), "--workers", "1", "--reload", "--worker-python", str(other_python))
    with Service("unlatch", "serve", "--listen", "127.0.0.1:0", *ANY_PORTS, *flags, "--units", "1") as serve:
        address = serve.wait_for("serving", process="unit", within=60)["listen"]
        serve.wait_for("watching kernels")
        with BlockingClient(address, timeout=30) as client:
            assert client.scaled([1.0]).tolist() == [2.0]
            of_python.write_text(OF_PYTHON.format(refused=sys.version_info[:2], factor=3.0))
            serve.wait_for("kernels reloaded", within=60)
            wait_until(lambda: client.scaled([1.0]).tolist() == [3.0], "the new file is served")
        serve.stop()


@pytest.fixture
def unfit(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """An interpreter that cannot run workers, in the way that the test names."""
    if request.param == "no file":
        yield str(tmp_path / "nothing")
    elif request.param == "no Python":
        yield "/bin/true"
    elif request.param == "no Unlatch":
        yield str(environment(tmp_path / "bare"))
    elif request.param == "no msgspec":
        yield str(environment(tmp_path / "bare", unlatch=version()))
    else:
        python = environment(tmp_path / "older", unlatch="0.0.9")
        share_packages(tmp_path / "older")
        yield str(python)


@pytest.mark.parametrize(
    ("unfit", "says"),
    [
        ("no file", "cannot be run: No such file or directory"),
        ("no Python", "it does not run Python programs; wanted an interpreter of Python 3"),
        (
            "no Unlatch",
            f"it lacks unlatch=={version()}, numpy, msgspec, jaxtyping, threadpoolctl; install them there: ",
        ),
        ("no msgspec", "it lacks numpy, msgspec, jaxtyping, threadpoolctl; install them there: "),
        ("another Unlatch", f"it has Unlatch 0.0.9, and this service is Unlatch {version()}; install them there: "),
    ],
    indirect=["unfit"],
)
def test_unfit_interpreter_is_refused_by_name(tmp_path: Path, unfit: str, says: str) -> None:
    """The service and `check` end with code 2, and a line that names the interpreter, what it lacks and what to do."""
    service = unlatch("compute", "--listen", f"unix:{tmp_path}/s", *ANY_PORTS, "--worker-python", unfit)
    assert service.returncode == 2
    assert service.stderr.splitlines()[-1].startswith("unlatch compute: ")
    assert f"--worker-python {unfit}" in service.stderr
    assert says in service.stderr
    checked = unlatch("check", str(ROOT / "examples" / "own_kernels.py"), "--worker-python", unfit)
    assert checked.returncode == 2
    assert checked.stderr.startswith(f"unlatch check: --worker-python {unfit}")
    assert says in checked.stderr
