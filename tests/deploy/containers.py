"""Both images, built from this checkout by `make image`, and containers of them, run by podman as a cluster would.

`python -m tests.deploy.containers` builds them before the tests, which then find every layer made.
"""

import ast
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.mesh import ROOT, Service

VERSION = next(
    line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
)
SERVICES = ("gateway", "compute")
# The Dockerfile's own base where a registry can be reached; elsewhere one made of the machine's own packages.
DEBIAN_BASE = "localhost/unlatch-debian-base:latest"
BUILD_SECONDS = 500.0
# A registry that does not exist may also never answer.
_PULL_SECONDS = 90.0
_HERE = Path(__file__).resolve().parent
_ENVIRONMENT = {"CONTAINERS_CONF": str(_HERE / "containers.conf"), **os.environ}
_numbers = count()


class CannotRun(Exception):
    """Containers cannot be run here. The message says why."""


def podman(*arguments: str, given: str = "", within: float = 60.0) -> str:
    """Run podman with these arguments and this input; return its output. Fails with its error where it fails."""
    ran = subprocess.run(
        ["podman", *arguments],
        env=_ENVIRONMENT,
        input=given,
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
    assert ran.returncode == 0, f"podman {' '.join(arguments)}: {ran.stderr}"
    return ran.stdout.strip()


def image(service: str) -> str:
    """Return the name that `make image` gives to a service's image."""
    return f"localhost/unlatch-{service}:{VERSION}"


@cache
def build() -> str:
    """Build both images, and return their base. Raises CannotRun."""
    if shutil.which("podman") is None:
        raise CannotRun("podman is missing")
    with _alone(), tempfile.TemporaryDirectory() as directory:
        base = _base()
        try:
            podman("run", "--rm", *CONFINED, base, "true")
        except AssertionError as error:
            raise CannotRun(f"podman runs no container here: {error}") from None
        _run("make", "image", "CONTAINER=podman", f"BASE_IMAGE={base}", f"ARGS={_pip_of_this_machine(Path(directory))}")
    return base


def built_or_skipped() -> str:
    """Build them for a fixture: where containers cannot be run, tests are skipped with the reason."""
    try:
        return build()
    except CannotRun as why:
        pytest.skip(str(why))


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other test processes from building inside the `with` block."""
    with (_HERE / "containers.conf").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _base() -> str:
    shipped = next(
        line.partition("=")[2]
        for line in (ROOT / "deploy" / "docker" / "Dockerfile").read_text().splitlines()
        if line.startswith("ARG BASE_IMAGE=")
    )
    there = podman("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
    for name in (shipped, DEBIAN_BASE):
        if name in there:
            return name
    try:
        podman("pull", "--quiet", shipped, within=_PULL_SECONDS)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        if shutil.which("mmdebstrap") is None or os.geteuid() != 0:
            raise CannotRun(f"no base image: {error}; and mmdebstrap, or root, is missing to make one") from None
    else:
        return shipped
    try:
        _run(str(ROOT / "deploy" / "docker" / "debian-base"), DEBIAN_BASE)
    except AssertionError as error:
        raise CannotRun(f"no base image: {error}") from None
    return DEBIAN_BASE


def _run(*command: str) -> None:
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"


def _pip_of_this_machine(directory: Path) -> str:
    """Return options by which a build finds packages as this machine's pip does.

    They are its settings and the files named there.
    """
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    settings = {
        name.rpartition(".")[2]: ast.literal_eval(value)
        for name, _, value in (line.partition("=") for line in told.splitlines() if line)
    }
    config = directory / "pip.conf"
    config.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items())]) + "\n")
    words = {word for value in settings.values() for word in value.split()}
    # An index that is a directory may have other files beside it.
    named = {str(Path(word.removeprefix("file://")).parent) if word.startswith("file://") else word for word in words}
    mounted = [f"--volume {path}:{path}:ro" for path in sorted(named) if path.startswith("/") and os.path.exists(path)]
    return " ".join(["--network host", f"--secret id=pip.conf,src={config}", *mounted])


# The strictest rules of a cluster: Pod Security "restricted", and a root that cannot be written.
CONFINED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--shm-size=64m", "--tmpfs=/tmp:size=16m,mode=1777", "--network=host"),
)


class Container(Service):
    """A container of one of our images, and its log. The container ends with the test at the latest."""

    def __init__(
        self,
        image: str,
        *flags: str,
        cpus: float = 1,
        memory: str = "1g",
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.container = f"unlatch-test-{os.getpid()}-{next(_numbers)}"
        ports = {f"UNLATCH_{port}LISTEN": "127.0.0.1:0" for port in ("", "METRICS_", "HEALTH_")}
        variables = (f"--env={name}={value}" for name, value in {**ports, **(environment or {})}.items())
        limits = (f"--cpus={cpus}", f"--memory={memory}")
        run = ("podman", "run", "--rm", f"--name={self.container}", *CONFINED, *limits, *variables, *options)
        super().__init__(image, *flags, environment=_ENVIRONMENT, runner=run)

    @property
    def init(self) -> int:
        """The container's PID 1 in this machine's numbers; 0 while there is none."""
        return int(podman("ps", "--filter", f"name=^{self.container}$", "--format", "{{.Pid}}") or 0)

    def order_stop(self, grace_seconds: int) -> None:
        """Send SIGTERM, and SIGKILL after the grace period, as a cluster does. Returns when the container has ended."""
        podman("stop", f"--time={grace_seconds}", self.container, within=grace_seconds + 30)

    def stop(self) -> None:
        """Stop the container in that way. Fails when its exit code is not 0."""
        self.order_stop(20)
        code = self.wait()
        assert code == 0, f"it ended with {code}; {self}"

    def kill(self) -> None:
        """Kill the container if it has not ended."""
        subprocess.run(
            ["podman", "rm", "--force", "--ignore", "--time=0", self.container],
            env=_ENVIRONMENT,
            capture_output=True,
            timeout=60,
            check=False,
        )
        super().kill()


def configuration(name: str) -> dict[str, Any]:
    """Return an image's user, labels and entry point."""
    found: dict[str, Any] = json.loads(podman("image", "inspect", name))[0]["Config"]
    return found


if __name__ == "__main__":
    try:
        print(f"both images are built on {build()}")
    except CannotRun as why:
        print(f"no images: {why}")
