"""Interpreters for workers beside the one that runs the tests: other environments, and other versions of Python."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tests.support.mesh import ROOT

# What the worker's side of Unlatch imports, beside Unlatch.
PACKAGES = ("numpy", "msgspec", "jaxtyping", "threadpoolctl")


def environment(directory: Path, python: str = sys.executable, *, unlatch: str = "") -> Path:
    """Make an environment without packages, and return its interpreter. With `unlatch` it has Unlatch, as that version.

    Unlatch is this checkout, as an editable install would bring it.
    """
    subprocess.run([python, "-m", "venv", "--without-pip", str(directory)], check=True)
    if unlatch:
        (packages_of(directory) / "unlatch.pth").write_text(f"{ROOT / '.editable'}\n")
        metadata = packages_of(directory) / f"unlatch-{unlatch}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: unlatch\nVersion: {unlatch}\n")
    return directory / "bin" / "python"


def packages_of(directory: Path) -> Path:
    """The folder in which an environment has its packages."""
    (found,) = directory.glob("lib/python3.*/site-packages")
    return found


def share_packages(directory: Path) -> None:
    """Give an environment of this Python the packages of this one, except those that it has itself."""
    (packages_of(directory) / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")


def install(python: Path, *packages: str, flags: Sequence[str] = ()) -> None:
    """Install packages from the index, by this environment's pip."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *flags, *packages]
    subprocess.run(command, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, check=True)


def version() -> str:
    """The version of Unlatch that runs the tests."""
    return importlib.metadata.version("unlatch")


def another_python() -> str:
    """A Python of another version that workers can run, if there is one on this machine; else ""."""
    # pyenv keeps its Pythons where PATH does not find them.
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [f"python3.{minor}" for minor in range(11, 15)]
    found = [*filter(None, map(shutil.which, names)), *(str(path) for path in pyenv.glob("3.1[1-4].*/bin/python"))]
    return next((python for python in found if _minor(python) not in (None, sys.version_info[1])), "")


def _minor(python: str) -> int | None:
    program = "import sys, venv; print(sys.version_info[1])"
    ran = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return int(ran.stdout) if ran.returncode == 0 else None
