"""The images: built by `make image`, run by podman with every restriction that a cluster may put on them."""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.containers import (
    BUILD_SECONDS,
    SERVICES,
    VERSION,
    Container,
    built_or_skipped,
    configuration,
    image,
    podman,
)
from tests.support.mesh import ROOT
from tests.support.neighbours import FACTORS, write_packages, write_project
from tests.support.watching import Process, Scrape, children, tree, until, wait_until
from unlatch import BlockingClient, Client

MiB = 1024 * 1024
KERNELS = ROOT / "tests" / "deploy" / "container_kernels.py"
MOUNTED = (f"--volume={KERNELS.parent}:/kernels:ro", "--env=UNLATCH_KERNELS=/kernels/container_kernels.py")
X = np.arange(3.0)

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 300)  # the first of them builds


@pytest.fixture(scope="module", autouse=True)
def base() -> str:
    """The base of the images, which are built now."""
    return built_or_skipped()


@contextmanager
def running(
    *,
    replicas: int = 1,
    compute: str = "",
    cpus: float = 1,
    memory: str = "1g",
    options: Sequence[str] = MOUNTED,
) -> Iterator[list[Container]]:
    """Run a gateway and its replicas as containers that serve the tests' kernels. Stop them cleanly at the end."""
    with ExitStack() as stack:
        options = () if compute else options
        fleet = [
            stack.enter_context(Container(compute or image("compute"), cpus=cpus, memory=memory, options=options))
            for _ in range(replicas)
        ]
        addresses = [one.wait_for("serving", within=60)["listen"] for one in fleet]
        gateway = stack.enter_context(Container(image("gateway"), "--replicas", ",".join(addresses)))
        for address in addresses:
            gateway.wait_for("replica is ready", replica=address, within=60)
        yield [gateway, *fleet]


def address(gateway: Container) -> str:
    found: str = gateway.wait_for("serving")["listen"]
    return found


def test_both_serve_and_end() -> None:
    """Confined services answer a call larger than /dev/shm, and end with 0."""
    with running(memory="2g") as (gateway, compute):
        with BlockingClient(address(gateway), timeout=60.0) as client:
            large = np.arange(12.0 * MiB)
            np.testing.assert_array_equal(client.rests(large), 2 * large)
        for container in (gateway, compute):
            confined(container)
            container.stop()


def confined(container: Container) -> None:
    """Check each process in a container: no root, no capability, and no way to gain any."""
    for process in tree(container.init):
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65532"}, process
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}, process
        assert status["NoNewPrivs"] == "1", process


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (1.5, 2), (2, 2)])
def test_workers_follow_the_limits(cpus: float, workers: int) -> None:
    """A replica has a worker for each core of the CPU limit, also for a part of one.

    All memory together is below the limit.
    """
    with Container(image("compute"), cpus=cpus, memory="1g", options=MOUNTED) as compute:
        scrape = Scrape(compute.wait_for("serving", within=60)["metrics_listen"])
        assert scrape.sum("unlatch_worker_up") == workers
        limit = scrape.sum("unlatch_worker_memory_limit_bytes")
        # The input arena has a quarter, the replies of a moment as much, and the services 256 MiB.
        assert limit == 256 * MiB // workers


async def test_a_replica_drains_under_load() -> None:
    """No call fails while one of two replicas is stopped, and the replica ends with 0 within its grace period."""
    with running(replicas=2) as (gateway, ending, _):
        async with Client(address(gateway), timeout=60.0) as client:
            answered, stopped = 0, asyncio.Event()

            async def keep_calling() -> None:
                nonlocal answered
                while not stopped.is_set():
                    np.testing.assert_array_equal(await client.rests(X, seconds=0.02), 2 * X)
                    answered += 1

            callers = [asyncio.ensure_future(keep_calling()) for _ in range(8)]
            await until(lambda: answered > 20, "calls are answered", within=60)
            await asyncio.to_thread(ending.order_stop, 30)
            assert await asyncio.to_thread(ending.wait) == 0, ending
            before = answered
            await until(lambda: answered > before + 20, "the other one answers", within=60)
            stopped.set()
            await asyncio.gather(*callers)


async def test_a_gateway_drains() -> None:
    """Calls in flight are answered when a gateway is stopped, and the gateway ends with 0 within its grace period."""
    with running() as (gateway, _):
        async with Client(address(gateway), timeout=60.0) as client:
            calls = [asyncio.ensure_future(client.rests(X, seconds=0.3)) for _ in range(6)]
            metrics = gateway.wait_for("serving")["metrics_listen"]
            await until(lambda: Scrape(metrics).sum("unlatch_calls_in_flight") == 6, "all are there", within=60)
            await asyncio.to_thread(gateway.order_stop, 30)
            for answer in await asyncio.gather(*calls):
                np.testing.assert_array_equal(answer, 2 * X)
            assert await asyncio.to_thread(gateway.wait) == 0, gateway


@pytest.mark.parametrize("service", SERVICES)
def test_a_stop_at_the_start_is_heard(service: str) -> None:
    """A SIGTERM before the service has a handler for it ends the container, without a kill."""
    with Container(image(service)) as container:
        wait_until(lambda: container.init and children(container.init), "PID 1 has started the service")
        container.order_stop(30)
        assert container.wait() in (0, 128 + signal.SIGTERM), container


def test_orphans_are_reaped() -> None:
    """A process that a kernel leaves behind becomes PID 1's child, and is not left as a zombie when it ends."""
    with running() as (gateway, compute), BlockingClient(address(gateway), timeout=60.0) as client:
        init = compute.init
        (service,) = children(init)
        assert client.leaves_an_orphan() == 0
        (orphan,) = (Process.of(pid) for pid in children(init) if pid != service)
        os.kill(orphan.pid, signal.SIGKILL)
        wait_until(lambda: not orphan.alive, "the orphan has ended")
        wait_until(lambda: not children(init, zombies=True), "it is reaped")
        assert children(init) == [service]
        np.testing.assert_array_equal(client.rests(X), 2 * X)


def test_kernels_import_their_own_packages(tmp_path: Path) -> None:
    """Packages mounted beside kernels may have our folders' names; one kernel comes by path, one by dotted name."""
    project = tmp_path / "project"
    write_project(project)
    write_packages(project)
    options = (
        *(f"--volume={project}:/project:ro", "--workdir=/project"),
        "--env=UNLATCH_KERNELS=/project/by_path.py,theirs.by_name",
    )
    with running(options=options) as (gateway, _), BlockingClient(address(gateway), timeout=60.0) as client:
        for call in (client.by_path, client.by_name):
            np.testing.assert_array_equal(call(X), prod(FACTORS.values()) * X)


def test_the_gateway_has_no_numpy() -> None:
    """The gateway's image has no file of NumPy, and compute's has some."""
    assert files("gateway", "numpy*") == []
    assert files("compute", "numpy*") != []


def files(service: str, pattern: str) -> list[str]:
    """Return the files of an image that match a pattern, in any directory."""
    with mounted(service) as root:
        return [str(path.relative_to(root)) for path in root.rglob(pattern)]


@contextmanager
def mounted(service: str) -> Iterator[Path]:
    """Mount an image, and yield its root."""
    try:
        yield Path(podman("image", "mount", image(service)))
    finally:
        podman("image", "unmount", image(service))


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_ready_to_be_read(service: str) -> None:
    """Every module has its bytecode, and no file of ours belongs to the user that runs it."""
    with mounted(service) as root:
        ours = root / "opt" / "unlatch"
        modules = [path for path in ours.rglob("*.py") if "bin" not in path.parts]
        assert len(modules) > 500
        bare = [path for path in modules if not list((path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc"))]
        assert bare == []
        assert {path.lstat().st_uid for path in ours.rglob("*")} == {0}


@pytest.mark.parametrize("service", SERVICES)
def test_images_say_what_they_are(service: str, base: str) -> None:
    """Images have a numeric user, no shell as entry point, the ports of the settings, and labels with OCI's names."""
    found = configuration(image(service))
    assert found["User"] == "65532:65532"
    assert found["Entrypoint"] == ["/usr/bin/tini", "-s", "--", "/opt/unlatch/bin/unlatch", service]
    listens = [value for value in found["Env"] if "LISTEN=" in value]
    ports = {f"{value.rpartition(':')[2]}/tcp" for value in listens}
    assert set(found["ExposedPorts"]) == ports
    assert len(ports) == 3
    label = {name.removeprefix("org.opencontainers.image."): value for name, value in found["Labels"].items()}
    assert (label["title"], label["version"], label["base.name"]) == (f"unlatch-{service}", VERSION, base)
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", label["revision"])


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_is_let_in_unasked(service: str) -> None:
    """An image listens where others can reach it: without certificates it does not start, and says why."""
    addresses = {f"UNLATCH_{port}LISTEN": "0.0.0.0:0" for port in ("", "METRICS_", "HEALTH_")}
    with Container(image(service), environment=addresses) as container:
        assert container.wait(60) == 2
        assert "--tls-cert and --tls-key" in container.lines[-1]


def test_three_lines_add_kernels(tmp_path: Path) -> None:
    """The README's Dockerfile, unchanged, makes an image that serves one's own kernels."""
    text = (ROOT / "deploy" / "docker" / "README.md").read_text()
    (recipe,) = re.findall(r"```dockerfile\n(.*?)```", text, re.DOTALL)
    assert len(recipe.splitlines()) == 3
    (tmp_path / "Dockerfile").write_text(recipe)
    shutil.copy(KERNELS, tmp_path / "my_kernels.py")
    name = f"localhost/unlatch-test-own-kernels:{VERSION}"
    podman("build", "--quiet", "--tag", name, str(tmp_path), within=BUILD_SECONDS)
    try:
        with running(compute=name) as (gateway, _), BlockingClient(address(gateway), timeout=60.0) as client:
            np.testing.assert_array_equal(client.rests(X), 2 * X)
    finally:
        podman("rmi", "--force", name)
