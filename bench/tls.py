"""The cost of TLS: the same calls through a gateway to a replica, alternately with TLS on both hops and without."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trustme

from bench.processes import Process, free_port, labelled_cpu
from bench.subjects.oip import Work
from bench.subjects.subjects import UNLATCH, Subject
from bench.throughput import Cell
from bench.throughput import measure as measure_cells

HERE = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh(Subject):
    """A gateway, and a replica that it reaches over TCP."""

    replica: Process

    def cpu(self) -> dict[str, float]:
        gateway, replica = (labelled_cpu(process.pid) for process in (self.process, self.replica))
        return {"gateway": gateway["server"], "dispatcher": replica.pop("server"), **replica}


def measure(works: dict[str, Work], *, rounds: int, seconds: float, on_step: Callable[[str], None]) -> list[Cell]:
    """Measure the cells of both meshes, in the same way as throughput."""
    with ExitStack() as stack:
        on_step("tls · starting two meshes")
        ca, files = _certificates(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-tls-"))))
        meshes: dict[str, Subject] = {
            "plaintext": _start(stack, "plaintext", (), (), b""),
            # h2load shows no certificate; the replica requires the gateway's.
            "tls": _start(stack, "tls", files("tls"), (*files("tls"), "--tls-client-ca", str(ca)), ca.read_bytes(),
                          to_replica=("--replica-ca", str(ca), *files("replica"))),
        }  # fmt: skip
        return measure_cells(
            works, meshes, None, rounds=rounds, seconds=seconds, on_step=on_step, only_works=frozenset()
        )


def _certificates(directory: Path) -> tuple[Path, Callable[[str], tuple[str, ...]]]:
    """The path of an authority's file, and the flags for a certificate from it, by the flags' prefix."""
    authority = trustme.CA()
    issued = authority.issue_cert(HERE)
    ca, cert, key = (directory / name for name in ("ca.crt", "tls.crt", "tls.key"))
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    return ca, lambda kind: (f"--{kind}-cert", str(cert), f"--{kind}-key", str(key))


def _start(
    stack: ExitStack,
    name: str,
    gateway: tuple[str, ...],
    replica: tuple[str, ...],
    ca: bytes,
    to_replica: tuple[str, ...] = (),
) -> Mesh:
    ports = [free_port() for _ in range(6)]
    listen, metrics, health, *others = (f"{HERE}:{port}" for port in ports)
    addresses = zip(("--listen", "--metrics-listen", "--health-listen"), others, strict=True)
    argv = [str(UNLATCH), "compute", *(part for pair in addresses for part in pair), *replica]
    argv += ["--workers", "2", "--kernels", "bench/subjects/kernels.py"]
    behind = stack.enter_context(Process(f"{name}-compute", argv))
    argv = [str(UNLATCH), "gateway", "--listen", listen, "--metrics-listen", metrics, "--health-listen", health]
    argv += ["--replicas", others[0], *gateway, *to_replica]
    process = stack.enter_context(Process(f"{name}-gateway", argv))
    served = {"gateway": ports[1], "dispatcher": ports[4]}
    return Mesh(name=name, process=process, port=ports[0], health_port=ports[2], metrics=served, ca=ca, replica=behind)
