"""An upgrade of the package under a gateway that runs."""

from pathlib import Path
from shutil import rmtree

import grpc

from tests.support.mesh import Service
from unlatch.protos import inference_pb2 as pb
from unlatch.protos.inference_pb2_grpc import GRPCInferenceServiceStub

METADATA = "Metadata-Version: 2.1\nName: unlatch\nVersion: 99.9\n"


def test_gateway_tells_its_own_version_after_an_upgrade(tmp_path: Path) -> None:
    """Installing a version removes the files that tell the one before. The gateway still runs that one."""
    installed = tmp_path / "unlatch-99.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(METADATA)
    ports = [part for port in ("", "metrics-", "health-") for part in (f"--{port}listen", "127.0.0.1:0")]
    flags = *ports, "--replicas", f"unix:{tmp_path / 'none'}"
    with Service("gateway", *flags, environment={"PYTHONPATH": str(tmp_path)}) as gateway:
        address = str(gateway.wait_for("serving")["listen"])
        with grpc.insecure_channel(address) as channel:
            ask = GRPCInferenceServiceStub(channel).ServerMetadata
            assert ask(pb.ServerMetadataRequest(), timeout=20.0).version == "99.9"
            rmtree(installed)
            assert ask(pb.ServerMetadataRequest(), timeout=20.0).version == "99.9"
        gateway.stop()
