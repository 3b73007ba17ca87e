"""grpcurl, which knows of a server only what reflection says, at every door."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mesh import Mesh

GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
SERVICES = {
    "gateway": {"inference.GRPCInferenceService", "unlatch.v1.Lane", REFLECTION},
    "gateway_health": {"grpc.health.v1.Health", REFLECTION},
    "dispatcher": {"unlatch.v1.Lane", REFLECTION},
    "dispatcher_health": {"grpc.health.v1.Health", REFLECTION},
}

pytestmark = pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not on this machine")


def grpcurl(address: str, *arguments: str, flags: tuple[str, ...] = ()) -> str:
    """Run grpcurl; return its output. Fails if grpcurl fails."""
    assert GRPCURL is not None
    # For a Unix socket grpcurl wants the path, and a flag.
    where = ["-unix", address.removeprefix("unix:")] if address.startswith("unix:") else [address]
    command = [GRPCURL, "-plaintext", *flags, *where, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stderr}"
    return ran.stdout


@pytest.mark.parametrize("door", SERVICES)
def test_every_service_lists_and_describes(door: str, mesh: Mesh) -> None:
    """A door's services are listed. Each describes its methods, and each message and enum that they name."""
    address = getattr(mesh, door)
    assert set(grpcurl(address, "list").split()) == SERVICES[door]
    told = "".join(grpcurl(address, "describe", service) for service in SERVICES[door])
    for service in SERVICES[door]:
        methods = grpcurl(address, "list", service).split()
        assert methods
        assert all(f"rpc {method.rpartition('.')[2]} (" in told for method in methods)
    described: set[str] = set()
    while names := set(re.findall(r"(?<=[ (<])\.([a-z]\w*(?:\.\w+)+)", told)) - described:
        for name in names:
            told += grpcurl(address, "describe", f".{name}")
        described |= names
    assert len(described) >= 3


def test_metadata_of_a_kernel(mesh: Mesh) -> None:
    """ModelMetadata as JSON has names, datatypes and shapes, and the types of scalars and whether they are required."""
    asked = '{"name": "monte_carlo_option"}'
    told = json.loads(grpcurl(mesh.gateway, "inference.GRPCInferenceService/ModelMetadata", flags=("-d", asked)))
    tensors = [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in told["inputs"] + told["outputs"]]
    assert tensors == [("spot", "FP64", ["-1"]), ("price", "FP64", ["-1"]), ("stderr", "FP64", ["-1"])]
    assert "required" in told["parameters"]["scalar.strike"]["string_param"]
