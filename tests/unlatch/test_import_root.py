"""An install brings the package `unlatch` and nothing else, and works beside packages of any other name.

Installs are real ones: by pip, of a wheel or of this checkout, into environments with the tests' third-party packages.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.mesh import ROOT, Service
from tests.support.neighbours import FACTORS, write_packages, write_project
from tests.support.serve import START_SECONDS

KERNELS = ("by_path.py", "theirs.by_name")
ANY_PORTS = [
    part
    for flag in (
        "--listen",
        "--metrics-listen",
        "--health-listen",
    )
    for part in (flag, "127.0.0.1:0")
]
# Root may write anywhere, unless it has given that up: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE.
UNPRIVILEGED = (
    sys.executable,
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])",
)


@dataclass(frozen=True, kw_only=True)
class Install:
    """An environment in which `command` is Unlatch's, and a user's project."""

    python: Path
    command: Sequence[str]
    project: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in the project. Fails if the command fails."""
        ran = subprocess.run(
            [str(part) for part in command],
            cwd=self.project,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran

    @contextmanager
    def serving(self, kernels: Sequence[str] = KERNELS) -> Iterator[str]:
        """Run `unlatch serve` with the project's kernels; yield the address that callers use."""
        flags = ("--kernels", ",".join(kernels), "--workers", "1", *ANY_PORTS)
        with Service(
            "serve", *flags, environment=self.environment, runner=self.command, directory=self.project
        ) as service:
            service.wait_for("replica is ready", process="unit", within=START_SECONDS)
            yield service.wait_for("serving", process="unit")["listen"]
            service.stop()


@dataclass(frozen=True, slots=True)
class Built:
    """Paths of a wheel and a source distribution of this checkout, and of a wheel made from the latter."""

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build both distributions once."""
    directory = tmp_path_factory.mktemp("built")
    wheel, sdist = build(ROOT, "wheel", directory), build(ROOT, "sdist", directory)
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    return Built(wheel, sdist, build(directory / sdist.name.removesuffix(".tar.gz"), "wheel", directory / "again"))


def build(source: Path, target: str, directory: Path) -> Path:
    """Build a distribution into a directory."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    ran = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=50, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(directory.glob("*.whl" if target == "wheel" else "*.tar.gz"))


def environment(directory: Path, *installed: str) -> Path:
    """Make a virtual environment with the tests' third-party packages and what pip installs; return its Python."""
    venv.create(directory, symlinks=True, with_pip=False)
    python = directory / "bin" / "python"
    # Of packages that lie there no .pth file is read: this checkout's own editable install is not found through it.
    (site_packages(directory) / "third_party.pth").write_text(sysconfig.get_path("purelib"))
    if installed:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
        ran = subprocess.run(
            [*pip, "--no-build-isolation", "--ignore-installed", *installed],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return python


def site_packages(directory: Path) -> Path:
    found: Path = next((directory / "lib").glob("python3*/site-packages"))
    return found


@pytest.fixture(
    scope="module",
    params=[
        ("checkout", "beside"),
        ("editable", "beside"),
        ("editable", "installed"),
        ("wheel", "beside"),
        ("wheel", "installed"),
    ],
    ids="-".join,
)
def install(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, built: Built) -> Install:
    """Install Unlatch in each way, with the user's packages beside the kernels or in the environment."""
    way, where = request.param
    directory = tmp_path_factory.mktemp("their work") / "an environment"
    what = {"checkout": (), "editable": ("--editable", str(ROOT)), "wheel": (str(built.wheel),)}[way]
    python, project = environment(directory, *what), directory.with_name("a project")
    write_project(project)
    write_packages(project if where == "beside" else site_packages(directory))
    if way == "checkout":
        command: Sequence[str] = (str(python), "-m", "unlatch")
        return Install(
            python=python, command=command, project=project, environment={"PYTHONPATH": str(ROOT / ".editable")}
        )
    return Install(python=python, command=(str(python.with_name("unlatch")),), project=project)


def test_kernels_and_clients_import_their_own_packages(install: Install) -> None:
    """Kernels by path and by dotted name, and a client, import their own packages that are named as ours."""
    with install.serving() as address:
        names = ["by_path", "by_name"]
        assert install.run(install.python, "client.py", address, *names).stdout.split() == names


def test_check_runs_kernels_that_import_their_own_packages(install: Install) -> None:
    """Check finds no fault in these kernels."""
    flags = ("--seconds", "2", "--most-mib", "0")
    assert install.run(*install.command, "check", *KERNELS, *flags).stdout == "2 kernels, 0 faults, 0 notes\n"


def test_a_checkout_serves_from_its_own_folder(tmp_path: Path) -> None:
    """In this repository's folder, as `make run` does, a kernel by path imports the packages that lie beside it.

    Where one has no __init__.py, Python prefers the current folder's package that has.
    """
    write_project(tmp_path)
    write_packages(tmp_path, namespaces=())
    checkout = Install(python=Path(sys.executable), command=(sys.executable, "-m", "unlatch"), project=ROOT)
    with checkout.serving([str(tmp_path / "by_path.py")]) as address:
        checkout.run(sys.executable, tmp_path / "client.py", address, "by_path")


def test_no_other_folder_of_ours_can_be_imported(install: Install) -> None:
    """Folders that lie beside `unlatch` in this repository are not found, or are the user's packages of those names."""
    ours = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier())
    program = "import sys; from importlib.util import find_spec; print(*map(find_spec, sys.argv[1:]), sep='\\n')"
    ours.remove("unlatch")
    found = install.run(install.python, "-c", program, *ours).stdout.splitlines()
    assert len(found) == len(ours)
    assert [spec for name, spec in zip(ours, found, strict=True) if (spec == "None") == (name in FACTORS)] == []
    assert [spec for spec in found if str(ROOT) in spec] == []


def test_a_wheel_has_one_top_level(built: Built) -> None:
    """Site-packages gets the package and its metadata from the wheel, and nothing else."""
    with zipfile.ZipFile(built.wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top.partition("-")[0] for top in tops} == {"unlatch"}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"unlatch"}


def test_a_wheel_has_every_module(built: Built) -> None:
    """The wheel contains all modules of the four folders and of `unlatch` itself."""
    with zipfile.ZipFile(built.wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    here = {path.relative_to(ROOT) for path in (ROOT / "unlatch").rglob("*.py")}
    for room in ("common", "compute", "gateway", "protos"):
        here |= {"unlatch" / path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
    assert packed == {str(path) for path in here}


def test_a_wheel_of_the_source_distribution_is_the_same(built: Built) -> None:
    """The links of the checkout are folders in the source distribution, and lead to the same files."""
    with zipfile.ZipFile(built.wheel) as one, zipfile.ZipFile(built.wheel_of_sdist) as other:
        files, others = ({each.filename: each.CRC for each in archive.infolist()} for archive in (one, other))
    assert files == others


def test_a_source_distribution_has_each_file_once(built: Built) -> None:
    """The archive has no links, no bytecode and nothing twice. It has the tests too."""
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert all(member.isreg() for member in members)
    paths = Counter(member.name.partition("/")[2] for member in members)
    assert [path for path, count in paths.items() if count > 1] == []
    assert [path for path in paths if "__pycache__" in path or path.endswith(".pyc")] == []
    assert {"unlatch/__init__.py", "unlatch/common/errors.py", "tests/unlatch/test_import_root.py"} <= paths.keys()


def test_an_installed_wheel_needs_to_write_nowhere(built: Built, tmp_path: Path) -> None:
    """The wheel serves in a directory with a space in its path, with no write access to it or to the environment."""
    directory = tmp_path / "an environment"
    python, project = environment(directory, str(built.wheel)), tmp_path / "a project"
    write_project(project)
    write_packages(project)
    with read_only(directory, project):
        installed = Install(python=python, command=(*UNPRIVILEGED, str(python.with_name("unlatch"))), project=project)
        for path in (project, site_packages(directory)):
            command = [*UNPRIVILEGED, shutil.which("touch") or "/bin/touch", str(path / "written")]
            assert subprocess.run(command, capture_output=True, timeout=20, check=False).returncode != 0
        with installed.serving() as address:
            installed.run(*UNPRIVILEGED, python, "client.py", address, "by_path", "by_name")


@contextmanager
def read_only(*directories: Path) -> Iterator[None]:
    """Make these directories read-only inside the `with` block."""
    paths = [path for directory in directories for path in (directory, *directory.rglob("*"))]
    modes = {path: path.stat().st_mode for path in paths if not path.is_symlink()}
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
