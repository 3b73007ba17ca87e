"""Rules of the code that import-linter cannot see: who opens channels, who reads the environment, who loads what."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from tests.support.mesh import ROOT

PACKAGES = ("gateway", "compute", "common", "unlatch")
# Where their security is chosen; the lane's calling end in the gateway, and the client. Acceptors call a server of
# their own, for a moment of the start.
OPEN_CHANNELS = {
    "common/security/tls.py",
    "common/service/acceptors.py",
    "gateway/fleet/replica.py",
    "unlatch/client.py",
    "unlatch/link.py",
}
# grpcio may change these with any version: one file has the checks and the way back.
PRIVATE_TO_GRPCIO = {"common/service/acceptors.py"}
READ_THE_ENVIRONMENT = {
    "gateway/__main__.py": "who supervises this process",
    "compute/__main__.py": "who supervises this process",
    "unlatch/__init__.py": "gRPC takes a setting from nowhere else",
    "unlatch/__main__.py": "the command line",
    "unlatch/check/command.py": "the default of a flag",
    "unlatch/cli/options.py": "the defaults of flags",
    "unlatch/supervisor/child.py": "it makes its children's environment",
    "unlatch/supervisor/supervisor.py": "who supervises this process",
    "unlatch/unit/__main__.py": "who supervises this process",
    "compute/pool/forkserver.py": "it makes the environment of the forkserver",
    "compute/worker/preload.py": "the other end of that",
}
CHANNELS = {"insecure_channel", "secure_channel", "open_channel"}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def names(tree: ast.Module) -> set[str]:
    """Every name and attribute that a module mentions."""
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return named | imported | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_only_the_ends_of_a_lane_open_channels() -> None:
    """A third place that opens one would need its own reconnecting, limits and credentials."""
    assert {path for path, tree in sources() if names(tree) & CHANNELS} <= OPEN_CHANNELS


def test_one_file_uses_private_parts_of_grpcio() -> None:
    """Other code stands on its public API alone."""
    found = {
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in (getattr(node, "module", None), *(alias.name for alias in node.names))
        if name and name.startswith(("grpc._", "grpc.aio._"))
    }
    assert found == PRIVATE_TO_GRPCIO


def test_only_entry_points_read_the_environment() -> None:
    """Settings are parsed once, at the door; what is inside is given what it needs."""
    assert {path for path, tree in sources() if names(tree) & ENVIRONMENT} <= READ_THE_ENVIRONMENT.keys()


def test_every_module_of_compute_is_the_dispatchers_or_a_workers() -> None:
    """Each folder and file of compute/ is under one of the three import contracts, or each of its modules is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    about = ("The dispatcher never", "What a worker loads", "What an async worker loads")
    placed = {
        module for contract in contracts if contract["name"].startswith(about) for module in contract["source_modules"]
    }
    for path in (ROOT / "compute").rglob("*.py"):
        names = ("unlatch", *path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":
            assert {".".join(names[:count]) for count in range(3, len(names) + 1)} & placed, path


@pytest.mark.parametrize(
    ("loaded", "absent"),
    [
        ("unlatch.gateway.server", {"numpy", "jaxtyping", "unlatch.compute", "unlatch.client"}),
        ("unlatch.compute.server", {"numpy", "jaxtyping", "unlatch.gateway"}),
        ("unlatch.gateway.tenants.shared_usage", {"numpy", "grpc", "google.protobuf"}),
        ("unlatch.unit.server", {"numpy", "jaxtyping", "unlatch.client", "unlatch.supervisor"}),
        (
            "unlatch.compute.worker.loop",
            {"grpc", "uvloop", "prometheus_client", "google.protobuf", "structlog", "opentelemetry"},
        ),
        ("unlatch.declaration", {"numpy", "grpc", "google.protobuf", "unlatch.compute", "unlatch.gateway"}),
    ],
)  # fmt: skip
def test_a_process_loads_only_what_is_its_own(loaded: str, absent: set[str]) -> None:
    """A process's imports, libraries' own imports included, contain nothing of the other processes."""
    program = f"import sys, {loaded}; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not absent & set(told.stdout.split())


def test_one_process_may_use_unlatch_and_tritonclient() -> None:
    """Both use the same protobuf runtime, and the client leaves the protocol's messages to tritonclient."""
    program = "import unlatch, tritonclient.grpc, unlatch.blocking, unlatch.protos.unlatch_pb2_grpc; unlatch.Client"
    for order in (program, program.replace("tritonclient.grpc, ", "") + "; import tritonclient.grpc"):
        subprocess.run([sys.executable, "-c", order], cwd=ROOT, check=True, timeout=50)
