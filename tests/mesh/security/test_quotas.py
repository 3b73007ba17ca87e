"""Quotas of tenants: each limit, at both doors, with a time to retry; and the charge for a call."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.mesh.security.conftest import Guarded
from tests.support.doors import Oip, Refusal, refusal_of, request, vector
from tests.support.mesh import Mesh
from tests.support.watching import Gate, Scrape, wait_until
from unlatch import BlockingClient
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.rates import TokenBucket
from unlatch.common.telemetry.recorder import OTHER
from unlatch.gateway.tenants.quotas import QuotaLimits, Tenant
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.protos.inference_pb2 import ModelInferRequest, ModelStatisticsRequest, ModelStatisticsResponse


def outcomes(guarded: Guarded, door: str, tenant: str, messages: Sequence[ModelInferRequest]) -> list[Refusal]:
    """Return the outcomes of a tenant's calls made all at once, in the order of the calls."""
    token = guarded.issuer.token(tenant)
    if door == "lane":
        with guarded.lane(token) as lane:
            for number, message in enumerate(messages, 1):
                lane.call(number, message)
            return [lane.refusal(number) for number in range(1, len(messages) + 1)]
    with ThreadPoolExecutor(len(messages)) as callers:
        return list(callers.map(guarded.oip(token).refusal, messages))


def settled(guarded: Guarded, tenant: str) -> None:
    """Wait until a tenant has no call in flight, so that its quotas are full again."""
    wait_until(
        lambda: not Scrape(guarded.mesh.gateway_metrics).sum("unlatch_tenant_calls_in_flight", tenant=tenant),
        f"no call of {tenant} is in flight",
    )


@pytest.mark.parametrize("door", ["oip", "lane"])
def test_calls_a_second(guarded: Guarded, door: str) -> None:
    """A burst is let in. The next call is refused until the time that the refusal names."""
    # The other door's test has used some, which is there again.
    time.sleep(1.6)
    ended = outcomes(guarded, door, "frequent", [vector("identity", 1.0)] * 8)
    refused = [one for one in ended if one.code != "OK"]
    # A further call is allowed for each half second that the eight took.
    assert 3 <= 8 - len(refused) <= 6
    for one in refused:
        assert one.code == "RESOURCE_EXHAUSTED"
        assert one.quota == "tenant:frequent"
        assert "calls_per_second=2" in one.message
        assert 0 < one.retry_after_seconds <= 0.5
    time.sleep(refused[-1].retry_after_seconds + 0.05)
    assert outcomes(guarded, door, "frequent", [vector("identity", 1.0)])[0].code == "OK"


@pytest.mark.parametrize("door", ["oip", "lane"])
def test_calls_in_flight(guarded: Guarded, door: str, tmp_path: Path) -> None:
    """As many calls as the limit run at a time. The next is let in once one has ended."""

    def count_refused() -> float:
        scrape = Scrape(guarded.mesh.gateway_metrics)
        return scrape.sum("unlatch_tenant_calls_total", tenant="parallel", code="RESOURCE_EXHAUSTED")

    before, gates = count_refused(), [Gate(tmp_path / str(number)) for number in range(5)]
    with ThreadPoolExecutor(1) as caller:
        messages = [request("waits_for", path=str(gate)) for gate in gates]
        calls = caller.submit(outcomes, guarded, door, "parallel", messages)
        wait_until(lambda: count_refused() - before == 3, "three calls are refused")
        wait_until(lambda: sum(gate.reached for gate in gates) == 2, "two calls run")
        for gate in gates:
            if gate.reached:
                gate.open()
        ended = calls.result()
    refused = [one for one in ended if one.code != "OK"]
    assert len(refused) == 3
    for one in refused:
        assert (one.code, one.quota) == ("RESOURCE_EXHAUSTED", "tenant:parallel")
        assert "calls_in_flight=2" in one.message
        assert one.retry_after_seconds > 0
    settled(guarded, "parallel")
    assert outcomes(guarded, door, "parallel", [vector("identity", 1.0)])[0].code == "OK"


def test_processor_seconds(guarded: Guarded) -> None:
    """Runs are charged when they end. An overdrawn tenant waits until the time has come back, at either door."""
    assert outcomes(guarded, "oip", "hungry", [request("sleeps", None, seconds=0.5)])[0].code == "OK"
    for door in ("oip", "lane"):
        (one,) = outcomes(guarded, door, "hungry", [vector("identity", 1.0)])
        assert (one.code, one.quota) == ("RESOURCE_EXHAUSTED", "tenant:hungry")
        assert "cpu_seconds_per_minute=0.3" in one.message
        # The tenant lacks a little over 0.2 s, and 0.005 s come back each second.
        assert 30 < one.retry_after_seconds <= 60


@pytest.mark.parametrize("door", ["oip", "lane"])
def test_kernels_allowed(guarded: Guarded, door: str) -> None:
    """Kernels are allowed by patterns. A forbidden kernel looks like a missing one."""
    allowed, forbidden, nowhere = outcomes(
        guarded, door, "modest", [request("sleeps", None, seconds=0), request("matmul"), request("no_such_kernel")]
    )
    assert allowed.code == "OK"
    assert (forbidden.code, forbidden.fields) == ("PERMISSION_DENIED", ("model_name",))
    assert nowhere.code == "PERMISSION_DENIED"


@pytest.mark.parametrize("door", ["oip", "lane"])
def test_priority_allowed(guarded: Guarded, door: str) -> None:
    """A higher priority is refused if it is asked for. A call without one gets the highest allowed."""
    asked = [vector("identity", 1.0, priority=name) for name in ("interactive", "normal", "background")]
    high, same, low = outcomes(guarded, door, "modest", asked)
    assert (high.code, high.fields) == ("PERMISSION_DENIED", ("priority",))
    assert (same.code, low.code) == ("OK", "OK")
    silent, normal = outcomes(guarded, door, "background", [vector("identity", 1.0), asked[1]])
    assert (silent.code, normal.code) == ("OK", "PERMISSION_DENIED")


def run_seconds(mesh: Mesh, oip: Oip) -> tuple[float, float]:
    """Return what tenants were charged, and what a kernel's runs have taken by the protocol's statistics."""
    asked = ModelStatisticsRequest(name="turned").SerializeToString()
    (model,) = ModelStatisticsResponse.FromString(oip.send(asked, "ModelStatistics")).model_stats
    charged = Scrape(mesh.gateway_metrics).sum("unlatch_tenant_run_seconds_total")
    return charged, sum(runs.compute_infer.ns for runs in model.batch_stats) / 1e9


def test_calls_that_run_as_one_are_charged_for_one_run(mesh: Mesh, oip: Oip) -> None:
    """Together the calls are charged what the run took, and not each of them."""
    before = run_seconds(mesh, oip)
    x, z = np.ones((200, 3)), np.ones((200, 100), "c16")
    with BlockingClient(mesh.gateway) as client:
        assert len(list(client.map("turned", [(x, z)] * 128, turns=3))) == 128
    charged, ran = (now - then for now, then in zip(run_seconds(mesh, oip), before, strict=True))
    assert ran > 0
    assert charged == pytest.approx(ran, rel=0.05)


def test_tenants_file_is_read_again(guarded: Guarded) -> None:
    """A new limit holds for connected callers too. A broken file changes nothing, and the log names the place."""
    gateway, whole = guarded.mesh.gateway_service, guarded.tenants.read_text()

    def replace(text: str, event: str) -> str:
        seen = len(gateway.lines)
        beside = guarded.tenants.with_suffix(".new")
        beside.write_text(text)
        os.replace(beside, guarded.tenants)
        return str(gateway.wait_for(event, after=seen).get("message", ""))

    replace(f"{whole}[tenants.late]", "file replaced")
    with guarded.lane(guarded.issuer.token("late")) as lane:
        assert lane.serves(1)
        replace(f'{whole}[tenants.late]\nkernels = ["sleeps"]', "file replaced")
        lane.call(2, vector("identity", 1.0))
        assert lane.refusal(2).code == "PERMISSION_DENIED"
        kept = "file not replaced, old content stays"
        assert "tenants.late.weight" in replace(f"{whole}[tenants.late]\nweight = 0", kept)
        lane.call(3, vector("identity", 1.0))
        assert lane.refusal(3).code == "PERMISSION_DENIED"
        replace(whole, "file replaced")
        lane.call(4, vector("identity", 1.0))
        assert lane.refusal(4).code == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[default", "not valid TOML"),
        ("[others]", "[others]"),
        ("tenants = 3", "tenants"),
        ("[default]\ncalls_per_hour = 1", "default.calls_per_hour: unknown field; did you mean calls_per_second"),
        ("[default]\nin_flight = 1", "default.in_flight: unknown field; did you mean calls_in_flight"),
        ("[tenants]\na = 3", "tenants.a: wanted a table, got 3"),
        ("default = []", "default: wanted a table, got []"),
        ("[default]\nkernels = 'svd'", "default.kernels: wanted a list, got 'svd'"),
        ("[tenants.a]\ncalls_per_second = 0", "tenants.a.calls_per_second"),
        ("[tenants.a]\npriority = 'urgent'", "tenants.a.priority"),
        ("[tenants.a]\nidentities = ['x']\n[tenants.b]\nidentities = ['x']", "tenants.b.identities"),
    ],
)
def test_broken_tenants_file_says_where(tmp_path: Path, text: str, says: str) -> None:
    """A gateway does not start with a broken file, and names table and field."""
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    tenants = Tenants(str(file), HeldBytes())
    assert tenants.file is not None
    with pytest.raises(Exception, match=r"tenants\.toml") as raised:
        tenants.file.load()
    assert says in str(raised.value)


def test_labels_are_bounded(tmp_path: Path) -> None:
    """The first hundred tenants of the file have names in metrics. All others share one label."""
    file = tmp_path / "tenants.toml"
    file.write_text("[default]\n" + "".join(f"[tenants.t{number}]\n" for number in range(150)))
    tenants = Tenants(str(file), HeldBytes())
    assert tenants.file is not None
    tenants.file.load()
    labels = {tenants.of(f"t{number}").label for number in range(150)}
    labels |= {tenants.of(f"somebody {number}").label for number in range(20_000)}
    assert labels == {f"t{number}" for number in range(100)} | {OTHER}
    assert len(tenants._others) <= 10_000


def test_nobody_takes_a_tables_name(tmp_path: Path) -> None:
    """A caller without a table is not the tenant whose table has its name, also if such a table is added later."""
    file = tmp_path / "tenants.toml"
    file.write_text('[default]\n[tenants.research]\nidentities = ["alice"]\n')
    tenants = Tenants(str(file), HeldBytes())
    assert tenants.file is not None
    tenants.file.load()
    assert tenants.of("alice").name == "research"
    assert tenants.of("research").name == "~research"
    later = tenants.of("later")
    assert later.name == "later"
    file.write_text('[default]\n[tenants.later]\nidentities = ["bob"]\n')
    tenants.file.load()
    assert tenants.of("later") is later
    assert later.name == "~later"
    assert tenants.of("research").name == "research"


def test_bucket_comes_back_with_time() -> None:
    """A bucket refills at its rate, up to its size. An overdraft is repaid first."""
    bucket = TokenBucket(2.0, 4.0, now=100.0)
    bucket.take(5.0, 100.0)
    assert bucket.left(100.0) == -1.0
    assert bucket.seconds_until(1.0, 100.0) == 1.0
    assert bucket.left(101.0) == 1.0
    assert bucket.left(1000.0) == 4.0


def test_limits_that_stay_keep_what_was_used() -> None:
    """Reading the file again gives no tenant a new burst. Changed limits begin afresh."""
    tenant = Tenant("a", "a", QuotaLimits(calls_per_second=1.0, burst_calls=1.0), now=0.0, within=HeldBytes())
    tenant.admit(0.0)
    tenant.limit(QuotaLimits(calls_per_second=1.0, burst_calls=1.0), now=0.0)
    with pytest.raises(Exception, match="calls_per_second=1"):
        tenant.admit(0.0)
    tenant.limit(QuotaLimits(calls_per_second=2.0), now=0.0)
    tenant.admit(0.0)


def test_lanes(guarded: Guarded) -> None:
    """A tenant has as many lanes as its quota allows, and another one once a lane has ended. Others have theirs."""
    token = guarded.issuer.token("narrow")
    with guarded.lane(token):
        with pytest.raises(grpc.RpcError) as refused, guarded.lane(token):
            pass
        refusal = refusal_of(refused.value)
        assert (refusal.code, refusal.quota) == ("RESOURCE_EXHAUSTED", "tenant:narrow")
        assert "lanes=1" in refusal.message
        with guarded.lane(guarded.issuer.token("research")):
            pass

    def opens() -> bool:
        try:
            with guarded.lane(token):
                return True
        except grpc.RpcError:
            return False

    wait_until(opens, "the next lane is let in")
