"""A real Prometheus that scrapes a running mesh: the queries of rules and dashboards are asked of it.

    load ── TLS, tokens ──> gateway ── lanes, TLS ──> two replicas of two workers    two units, which rest
                               └────── /metrics ────────┴────────────────────────────────┴──> Prometheus, with our rules

The load goes on until every outcome has happened to some call, a worker and a replica have been killed, and each target
has been scraped often. Then it ends, and queries are asked as of its last `moment`, so that tests that run beside
others are not in each other's way. A test that needs the load again uses `with watched.load():`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.deploy.monitoring.load import KERNELS, TENANTS, Door, Load
from tests.support.authority import Authority, Renamed
from tests.support.issuer import Issuer
from tests.support.mesh import ROOT, Service
from tests.support.serve import free_address
from tests.support.watching import children, wait_until
from unlatch import TLS

RULES = ROOT / "deploy" / "k8s" / "components" / "plain-prometheus" / "rules.yml"
NAMESPACE = "unlatch"
INTERVAL_SECONDS = 0.5
_FEWEST_SCRAPES = 20
# The usual time is a third of this: it is what a slow and busy machine may take.
_WITHIN_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A series in a query's answer. Times are seconds since the epoch; an instant query has one."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last value."""
        return self.points[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A /metrics address, with the labels that Kubernetes would give it."""

    job: str
    pod: str
    address: str


def promtool(*arguments: str, fed: str | None = None) -> str:
    """Run promtool and return its output. Fails where promtool does; skips the test where it is missing."""
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool here: apt-get install --no-install-recommends prometheus")
    ran = subprocess.run(["promtool", *arguments], input=fed, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


class Prometheus:
    """A running server. Queries that it refuses raise AssertionError with its message."""

    def __init__(self, address: str) -> None:
        self.address = address

    def query(self, query: str, *, at: float | None = None) -> list[Series]:
        """Ask a query as of now, or as of a given time."""
        return self._ask("query", query=query, **({} if at is None else {"time": at}))

    def query_range(self, query: str, *, start: float, end: float, step_seconds: float) -> list[Series]:
        """Ask a query over a range of time."""
        return self._ask("query_range", query=query, start=start, end=end, step=step_seconds)

    def get(self, path: str, **arguments: object) -> Any:
        """Return the data of an answer of its HTTP API, under /api/v1/."""
        try:
            with urlopen(f"http://{self.address}/api/v1/{path}?{urlencode(arguments)}", timeout=30) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error

    def _ask(self, path: str, **arguments: object) -> list[Series]:
        data = self.get(path, **arguments)
        if data["resultType"] == "scalar":
            return [Series(labels={}, points=[(float(data["result"][0]), float(data["result"][1]))])]
        return [
            Series(
                labels=found["metric"],
                points=[(float(at), float(value)) for at, value in found.get("values") or [found["value"]]],
            )
            for found in data["result"]
        ]


@contextmanager
def running_prometheus(directory: Path, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Run a Prometheus with this configuration. Skips the test where there is no Prometheus."""
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus here: apt-get install --no-install-recommends prometheus")
    file = directory / "prometheus.yml"
    file.write_text(json.dumps(config))
    with subprocess.Popen(
        [
            *("prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"),
            *("--web.listen-address=127.0.0.1:0", "--log.level=info"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Prometheus(_address(server))
        finally:
            server.kill()


def scraping(targets: Sequence[Target]) -> dict[str, Any]:
    """Return a configuration that scrapes these targets, and evaluates the rules twice a second.

    A target that is several processes takes longer to answer on a busy machine, so it is scraped once a second.
    """
    interval = f"{INTERVAL_SECONDS * 1000:.0f}ms"
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": job,
                **({"scrape_interval": "1s", "scrape_timeout": "1s"} if job == "unlatch" else {}),
                "static_configs": [
                    {"targets": [one.address], "labels": {"namespace": NAMESPACE, "pod": one.pod}}
                    for one in targets
                    if one.job == job
                ],
            }
            for job in sorted({one.job for one in targets})
        ],
    }


def _address(server: subprocess.Popen[str]) -> str:
    """Return the server's address once it is ready. Its later output is read and dropped."""
    assert server.stderr is not None
    said, address = [], ""
    for line in server.stderr:
        said.append(line)
        if found := re.search(r'msg="Listening on" address=(\S+)', line):
            address = found[1]
        if address and "Server is ready to receive web requests" in line:
            threading.Thread(target=server.stderr.read, name="prometheus's log", daemon=True).start()
            return address
    raise AssertionError(f"Prometheus did not start: {''.join(said[-20:])}")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A mesh that has been under load, and what Prometheus knows of it. Gateway and replicas still run."""

    prometheus: Prometheus
    gateway: Service
    dispatchers: Sequence[Service]
    units: Service
    targets: Sequence[Target]
    door: Door
    began: float
    moment: float

    def ask(self, query: str) -> list[Series]:
        """Ask a query as of the load's last moment."""
        return self.prometheus.query(query, at=self.moment)

    def load(self) -> Load:
        """Run the load again inside a `with` block."""
        return Load(self.door)


@pytest.fixture(scope="package")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A mesh that has been under load, for all tests that only read. The first test needs up to 180 s for it."""
    directory: Path = tmp_path_factory.mktemp("watched")
    with ExitStack() as stack:
        mesh = _Mesh(stack, directory)
        prometheus = stack.enter_context(running_prometheus(directory, scraping(mesh.targets)))
        began = time.time()
        with Load(mesh.door) as load:
            wait_until(lambda: load.fewest_rounds > 1, "every kind of call is made", _WITHIN_SECONDS)
            mesh.hurt()
            rounds = load.fewest_rounds
            wait_until(lambda: load.fewest_rounds > rounds + 1, "every kind of call is made again", _WITHIN_SECONDS)
            _wait_for(prometheus, f"min(count_over_time(up[10m])) >= {_FEWEST_SCRAPES}")
            moment = time.time()
            # Rules come after the series that they are made of, and some are made of others.
            _wait_for(prometheus, f"min(timestamp(up)) > {moment + 4 * INTERVAL_SECONDS}")
        yield Watched(
            prometheus=prometheus,
            gateway=mesh.gateway,
            dispatchers=mesh.dispatchers,
            units=mesh.units,
            targets=mesh.targets,
            door=mesh.door,
            began=began,
            moment=moment,
        )
        mesh.stop()


def _wait_for(prometheus: Prometheus, query: str) -> None:
    wait_until(lambda: prometheus.query(query), f"Prometheus says {query}", _WITHIN_SECONDS)


class _Mesh:
    """A gateway that authenticates callers, and two replicas, all with certificates, on free ports."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        authority = Authority()
        files = Renamed(
            directory / "certificates", {**authority.issue("127.0.0.1", seconds=86400.0), "ca.crt": authority.pem}
        )
        self._shows = ("--tls-cert", files["tls.crt"], "--tls-key", files["tls.key"])
        self._trusts = files["ca.crt"]
        ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
        self.units = stack.enter_context(
            Service("unlatch", "serve", "--units", "2", "--workers", "2", "--kernels", KERNELS, *ports)
        )
        # Reserved addresses: one of the replicas is killed, and started again at the same ones.
        reserved = [[stack.enter_context(free_address()) for _ in range(2)] for _ in range(2)]
        self.dispatchers = [self._dispatcher(*addresses) for addresses in reserved]
        issuer, tenants = Issuer(directory), directory / "tenants.toml"
        tenants.write_text(TENANTS)
        shows = ("--replica-cert", files["tls.crt"], "--replica-key", files["tls.key"], "--replica-ca", files["ca.crt"])
        replicas = [_served(dispatcher)["listen"] for dispatcher in self.dispatchers]
        self.gateway = stack.enter_context(
            Service(
                "gateway",
                *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"),
                *("--replicas", ",".join(replicas), "--tenants", str(tenants), "--drain-seconds", "5"),
                *(*self._shows, *shows, *issuer.flags),
            )
        )
        for replica in replicas:
            self.gateway.wait_for("replica is ready", replica=replica)
        serving = _served(self.gateway)
        self.door = Door(target=serving["listen"], authority=authority.pem, tls=TLS(ca=files["ca.crt"]), issuer=issuer)
        self.targets = [
            Target(job="unlatch-gateway", pod="unlatch-gateway-0", address=serving["metrics_listen"]),
            *(
                Target(
                    job="unlatch-compute",
                    pod=f"unlatch-compute-{number}",
                    address=_served(dispatcher)["metrics_listen"],
                )
                for number, dispatcher in enumerate(self.dispatchers)
            ),
            Target(job="unlatch", pod="unlatch-0", address=_served_by_units(self.units)),
        ]

    def hurt(self) -> None:
        """Kill a worker of one replica, and the other replica, which is then started again at the same address."""
        # The load has workers killed, too, which are then replaced.
        wait_until(lambda: _workers(self.dispatchers[0]), "the replica has a worker", _WITHIN_SECONDS)
        os.kill(_workers(self.dispatchers[0])[0], signal.SIGKILL)
        serving = _served(self.dispatchers[1])
        line = len(self.gateway.lines)
        self.dispatchers[1].kill()
        self.dispatchers[1] = self._dispatcher(serving["listen"], serving["metrics_listen"])
        self.gateway.wait_for("replica is ready", after=line, within=_WITHIN_SECONDS, replica=serving["listen"])

    def stop(self) -> None:
        """End all services cleanly."""
        for service in (self.gateway, *self.dispatchers, self.units):
            service.stop()

    def _dispatcher(self, listen: str, metrics_listen: str) -> Service:
        dispatcher = self._stack.enter_context(
            Service(
                "compute",
                *("--listen", listen, "--metrics-listen", metrics_listen, "--health-listen", "127.0.0.1:0"),
                *("--workers", "2", "--kernels", KERNELS, "--drain-seconds", "5"),
                *("--worker-memory-bytes", str(512 * 1024 * 1024)),
                *(*self._shows, "--tls-client-ca", self._trusts),
            )
        )
        _served(dispatcher)
        return dispatcher


def _workers(dispatcher: Service) -> list[int]:
    return [worker for child in children(dispatcher.pid) for worker in children(child)]


def _served(service: Service) -> dict[str, Any]:
    return service.wait_for("serving")


def _served_by_units(serve: Service) -> str:
    """Return the address of the metrics of all units, when all are there."""
    for number in range(2):
        serve.wait_for("serving", process=f"unit-{number}", within=_WITHIN_SECONDS)
    return str(serve.wait_for("units share addresses")["metrics_listen"])
