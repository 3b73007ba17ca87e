"""Tenants with replicas of their own: their calls go nowhere else, and no other call goes there."""

from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.mesh.gateway.test_fleet import gateway, replica
from tests.support.doors import Oip, request
from tests.support.issuer import Issuer, bearer
from unlatch import Client
from unlatch.gateway.fleet.discovery import by_tenant
from unlatch.gateway.settings import GatewaySettings
from unlatch.protos import inference_pb2 as pb

MODULE = """
import numpy as np
from jaxtyping import Int64
from unlatch import kernel


@kernel
def which() -> Int64[np.ndarray, ""]:
    return np.array({number})


@kernel
def only_here_{number}() -> Int64[np.ndarray, ""]:
    return np.array({number})
"""


def test_targets_by_tenant() -> None:
    """A sign of equality in a path is none; a tenant may have several targets."""
    targets = ("one:1", "a=two:2", "unix:/x=y", "b=unix:/x=y", "a=dns:///three:3")
    assert by_tenant(targets) == {
        "": ("one:1", "unix:/x=y"),
        "a": ("two:2", "dns:///three:3"),
        "b": ("unix:/x=y",),
    }


@pytest.mark.parametrize("target", ["a=", "a=dns://", "a=dns:///b"])
def test_tenant_without_a_right_target_is_refused(target: str) -> None:
    """As a setting, before the gateway starts."""
    with pytest.raises(ValueError, match=r"wanted tenant=host:port|a name of replicas is"):
        GatewaySettings.model_validate({"replicas": target})


def test_tenant_that_no_caller_can_be_is_refused() -> None:
    """Without authentication no caller has a name, so that nothing would ever go to the replica."""
    with pytest.raises(ValueError, match=r"--replicas a=… needs --token-keys or --tls-client-ca"):
        GatewaySettings.model_validate({"replicas": "one:1,a=two:2"})


async def test_tenants_own_replicas_are_theirs_alone(tmp_path: Path) -> None:
    """By both doors, for calls and for what is told of kernels; also while the tenant's own replica is away."""
    issuer = Issuer(tmp_path)
    with ExitStack() as stack:
        targets = [f"unix:{tmp_path}/{number}.sock" for number in range(2)]
        modules = [tmp_path / f"module_{number}.py" for number in range(2)]
        for number, module in enumerate(modules):
            module.write_text(MODULE.format(number=number))
        replica(stack, targets[0], kernels=str(modules[0]))
        own = replica(stack, targets[1], kernels=str(modules[1]))
        door = stack.enter_context(
            gateway(targets[0], f"apart={targets[1]}", ready=0, flags=("--hold-seconds", "0", *issuer.flags))
        )
        for target in targets:
            door.wait_for("replica is ready", replica=target)
        address = door.wait_for("serving")["listen"]
        with grpc.insecure_channel(address) as channel:
            for tenant, number in (("apart", 1), ("research", 0)):
                here, elsewhere = f"only_here_{number}", f"only_here_{1 - number}"
                oip = Oip(channel, bearer(issuer.token(tenant)))
                for _ in range(10):
                    answer = oip.infer(request("which"))
                    assert answer.raw_output_contents[0] == number.to_bytes(8, "little")
                index = pb.RepositoryIndexResponse.FromString(oip.send(b"", "RepositoryIndex"))
                assert here in {model.name for model in index.models}
                assert elsewhere not in {model.name for model in index.models}
                assert oip.refusal(request(elsewhere)).code == "NOT_FOUND"
                async with Client(address, token=issuer.token(tenant), timeout=20.0) as client:
                    assert int(await client.which()) == number
                    served = {spec.name for spec in await client.kernels()}
                    assert (here in served, elsewhere in served) == (True, False)
            own.kill()
            door.wait_for("lane to replica broke", replica=targets[1])
            refusal = Oip(channel, bearer(issuer.token("apart"))).refusal(request("which"))
            assert (refusal.code, refusal.message) == ("UNAVAILABLE", "no replica takes calls now")
            assert Oip(channel, bearer(issuer.token("research"))).refusal(request("which")).code == "OK"
