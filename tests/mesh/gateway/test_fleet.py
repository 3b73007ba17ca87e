"""A gateway and several replicas: which one gets a call, how replicas join and leave, and when one counts as gone."""

import asyncio
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.support.dns import NameServer
from tests.support.doors import Oip, arrays_of, request, vector
from tests.support.mesh import ROOT, Service
from tests.support.watching import Gate, Scrape, until
from unlatch import Client
from unlatch.common.errors import Aborted, ResourceExhausted
from unlatch.gateway.fleet.subset import subset
from unlatch.protos.inference_pb2 import (
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

ANY_PORTS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
KERNELS = str(ROOT / "tests" / "support" / "kernels.py")


def replica(stack: ExitStack, listen: str, *flags: str, kernels: str = KERNELS) -> Service:
    """Run a replica that may end in any way."""
    defaults = ("--workers", "1", "--kernels", kernels, "--drain-seconds", "5")
    service = stack.enter_context(Service("compute", "--listen", listen, *ANY_PORTS, *defaults, *flags))
    service.wait_for("serving")
    return service


@contextmanager
def gateway(*targets: str, ready: int | None = None, flags: tuple[str, ...] = ()) -> Iterator[Service]:
    """Run a gateway to these replicas, once it has heard of all of them, or of the given number."""
    arguments = ("--listen", "127.0.0.1:0", "--replicas", ",".join(targets), *ANY_PORTS, *flags)
    with Service("gateway", *arguments) as door:
        door.wait_for("serving")
        for target in targets[:ready]:
            door.wait_for("replica is ready", replica=target)
        yield door
        door.stop()


@asynccontextmanager
async def client_of(door: Service) -> AsyncIterator[Client]:
    async with Client(door.wait_for("serving")["listen"], timeout=20.0) as client:
        yield client


def of_replicas(door: Service, metric: str) -> dict[str, float]:
    """Return a metric of each replica, as the gateway sees them."""
    samples = Scrape(door.wait_for("serving")["metrics_listen"]).samples
    name = f"unlatch_replica_{metric}"
    return {dict(labels)["replica"]: value for (found, labels), value in samples.items() if found == name}


def served(dispatcher: Service, kernel: str) -> float:
    metrics = dispatcher.wait_for("serving")["metrics_listen"]
    return Scrape(metrics).sum("unlatch_calls_total", kernel=kernel, code="OK")


def nap_kernels(path: Path, seconds: float, version: str = "1", argument: str = "x") -> str:
    """Write a module of one kernel, `nap`, of that length, version and argument."""
    path.write_text(
        "import time\nimport numpy as np\nfrom jaxtyping import Float64\nfrom unlatch import kernel\n\n\n"
        f'@kernel(pure=True, version="{version}")\n'
        f'def nap({argument}: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:\n'
        f'    """A nap."""\n    time.sleep({seconds})\n    return {argument} + {version}\n'
    )
    return str(path)


async def test_slow_replica_gets_less_and_everyone_is_answered(tmp_path: Path) -> None:
    """Of three replicas one is four times slower: it gets least of a saturating load, and is not ejected."""
    targets = [f"unix:{tmp_path}/{number}.sock" for number in range(3)]
    fast, slow = nap_kernels(tmp_path / "fast.py", 0.02), nap_kernels(tmp_path / "slow.py", 0.08)
    with ExitStack() as stack:
        dispatchers = [replica(stack, target, kernels=slow if target is targets[2] else fast) for target in targets]
        with gateway(*targets) as door:
            async with client_of(door) as client:

                async def caller(number: int) -> None:
                    for turn in range(12):
                        x = np.array([number, turn], "f8")
                        np.testing.assert_array_equal(await client.nap(x), x + 1)

                await asyncio.gather(*(caller(number) for number in range(16)))
            counts = [served(dispatcher, "nap") for dispatcher in dispatchers]
            assert sum(counts) == 16 * 12
            assert counts[2] < min(counts[:2]) * 0.6, counts
            assert counts[2] > 0
            assert set(of_replicas(door, "ejected").values()) == {0.0}


async def test_frozen_replica_is_noticed_and_others_serve_on(tmp_path: Path) -> None:
    """SIGSTOP breaks no connection, but its silence is noticed.

    Its calls fail, new ones go elsewhere, and it comes back.
    """
    targets = [f"unix:{tmp_path}/{number}.sock" for number in range(2)]
    gates = [Gate(tmp_path / f"gate{number}") for number in range(2)]
    with ExitStack() as stack:
        dispatchers = [replica(stack, target) for target in targets]
        with gateway(*targets) as door:
            async with client_of(door) as client:
                held = [asyncio.ensure_future(client.waits_for(path=str(gate))) for gate in gates]
                await until(lambda: all(gate.reached for gate in gates), "both replicas run a call")
                dispatchers[0].signal(signal.SIGSTOP)
                broke = await asyncio.to_thread(door.wait_for, "lane to replica broke", replica=targets[0], within=6.0)
                assert "nothing was heard of it" in broke["message"]
                for gate in gates:
                    gate.open()
                outcomes = await asyncio.gather(*held, return_exceptions=True)
                # Neither call may run twice: the frozen replica's caller gets an error, the other call is answered.
                assert Counter(map(type, outcomes)) == {np.ndarray: 1, Aborted: 1}, outcomes
                assert "may have had an effect" in str([outcome for outcome in outcomes if type(outcome) is Aborted])
                for number in range(20):
                    assert int(await client.turn()) > 0, number
                dispatchers[0].signal(signal.SIGCONT)
                await until(lambda: of_replicas(door, "up")[targets[0]] == 1, "it is back")


async def test_gateway_that_stood_still_takes_nobody_for_frozen(tmp_path: Path) -> None:
    """A gateway that was stopped for longer than replicas may be silent reads their reports before it judges them."""
    target = f"unix:{tmp_path}/one.sock"
    with ExitStack() as stack:
        replica(stack, target, "--report-seconds", "0.1")
        with gateway(target) as door:
            async with client_of(door) as client:
                await client.turn()
                door.signal(signal.SIGSTOP)
                await asyncio.sleep(1.5)
                door.signal(signal.SIGCONT)
                for _ in range(20):
                    await client.turn()
            assert not [entry for entry in door.entries if entry["event"] == "lane to replica broke"]


async def test_only_replica_that_is_frozen_is_kept(tmp_path: Path) -> None:
    """Another lane to the same process would do no better: its calls wait, and are answered when it goes on."""
    target = f"unix:{tmp_path}/one.sock"
    with ExitStack() as stack:
        only = replica(stack, target, "--report-seconds", "0.1")
        with gateway(target) as door:
            async with client_of(door) as client:
                await client.turn()
                only.signal(signal.SIGSTOP)
                calls = [asyncio.ensure_future(client.turn()) for _ in range(8)]
                await asyncio.to_thread(door.wait_for, "replica is silent, and is kept", replica=target)
                only.signal(signal.SIGCONT)
                assert sorted(map(int, await asyncio.gather(*calls))) == list(range(2, 10))
            assert not [entry for entry in door.entries if entry["event"] == "lane to replica broke"]


async def test_calls_wait_for_the_first_replica_and_for_the_next_ones(tmp_path: Path) -> None:
    """A call comes before there is a replica, and others while all of them are being replaced. All are answered."""
    targets = [f"unix:{tmp_path}/{number}.sock" for number in range(2)]
    with ExitStack() as stack, gateway(*targets, ready=0, flags=("--hold-seconds", "120")) as door:
        entry = door.wait_for("serving")
        channel = stack.enter_context(grpc.insecure_channel(entry["listen"]))

        async def held(number: int) -> "asyncio.Future[ModelInferResponse]":
            message = vector("identity", float(number))
            call = asyncio.ensure_future(asyncio.to_thread(Oip(channel).infer, message, 120.0))
            await until(lambda: Scrape(entry["metrics_listen"]).sum("unlatch_queue_depth") == 1, "it waits")
            return call

        for number in range(2):
            call = await held(number)
            replicas = [await asyncio.to_thread(replica, stack, target) for target in targets]
            assert arrays_of(await call)[0].tolist() == [float(number)]
            for target in targets:
                await until(lambda: of_replicas(door, "up")[target] == 1, "it is up")  # noqa: B023 (awaited here)
            for one in replicas:
                one.kill()
            await until(lambda: not any(of_replicas(door, "up").values()), "both are gone")


async def test_name_gains_and_loses_addresses_under_load(tmp_path: Path) -> None:
    """An added address gets calls. A removed one answers its calls and gets no more. Failed lookups change nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    with ExitStack() as stack, NameServer(*hosts[:2]) as names:
        dispatchers = {host: replica(stack, f"{host}:{port}") for host in hosts}
        target = f"dns://{names.target}/fleet.test:{port}"
        with gateway(target, ready=0, flags=("--discovery-seconds", "0.1")) as door:
            for host in hosts[:2]:
                door.wait_for("replica is ready", replica=f"{host}:{port}")
            async with client_of(door) as client:
                stop, answers = asyncio.Event(), Counter[float]()

                async def caller() -> None:
                    while not stop.is_set():
                        answers[float(await client.sleeps(seconds=0.01))] += 1

                callers = [asyncio.ensure_future(caller()) for _ in range(12)]
                try:
                    await until(
                        lambda: all(served(dispatchers[host], "sleeps") > 5 for host in hosts[:2]), "both serve"
                    )
                    await asyncio.to_thread(names.answers, hosts)
                    await until(lambda: served(dispatchers[hosts[2]], "sleeps") > 5, "the third serves")
                    await asyncio.to_thread(names.answers, hosts[1:])
                    await until(lambda: f"{hosts[0]}:{port}" not in of_replicas(door, "up"), "the first is gone")
                    before = served(dispatchers[hosts[0]], "sleeps")
                    failures: tuple[list[str] | None, ...] = (None, [])
                    for wrong in failures:
                        await asyncio.to_thread(names.answers, wrong)
                        assert set(of_replicas(door, "up")) == {f"{host}:{port}" for host in hosts[1:]}
                    assert [entry["event"] for entry in door.entries].count("name is not found") == 1
                    await asyncio.to_thread(names.answers, hosts[:2])
                    await until(lambda: served(dispatchers[hosts[0]], "sleeps") > before, "the first is back")
                finally:
                    stop.set()
                    await asyncio.gather(*callers)
                assert set(answers) == {0.01}


async def test_file_gains_and_loses_addresses(tmp_path: Path) -> None:
    """A file may come after the gateway, and be emptied for a moment. An address that leaves it answers its calls."""
    first, second = targets = [f"unix:{tmp_path}/{number}.sock" for number in range(2)]
    file, new, gate = tmp_path / "replicas", tmp_path / "new", Gate(tmp_path / "gate")
    with ExitStack() as stack:
        for target in targets:
            replica(stack, target)
        with gateway(f"file:{file}", ready=0) as door:
            missing = door.wait_for("file has no replicas yet")
            assert missing["message"] == f"--replicas {file}: No such file or directory"
            file.write_text(f"# one rack\n{first}\n")
            await asyncio.to_thread(door.wait_for, "replica is ready", replica=first)
            async with client_of(door) as client:
                held = asyncio.ensure_future(client.waits_for(path=str(gate)))
                await until(lambda: gate.reached, "the first replica runs a call")
                file.write_text("")
                await asyncio.to_thread(door.wait_for, "file not replaced, old content stays")
                assert of_replicas(door, "up") == {first: 1.0}
                new.write_text(f"{second}\nwrong\n")
                new.replace(file)
                told = await asyncio.to_thread(door.wait_for, "line not used, other lines are")
                assert (told["path"], told["line"]) == (str(file), 2)
                await asyncio.to_thread(door.wait_for, "replica is ready", replica=second)
                # The first replica's only worker is still busy.
                assert int(await client.turn()) > 0
                gate.open()
                await held
                await until(lambda: of_replicas(door, "up") == {second: 1.0}, "the first has left")


async def test_each_gateway_has_a_subset_of_its_own(tmp_path: Path) -> None:
    """A subset depends on the gateway's name and survives a restart. A lost replica is replaced, and no call fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [f"127.0.0.{last}" for last in range(2, 6)]
    addresses = [f"{host}:{port}" for host in hosts]
    with ExitStack() as stack, NameServer(*hosts) as names:
        for address in addresses:
            replica(stack, address)
        target = f"dns://{names.target}/fleet.test:{port}"
        flags = ("--discovery-seconds", "0.1", "--replica-subset", "2", "--name")
        for name in ("a", "b", "a"):
            own = subset(name, addresses, 2)
            left = [host for host in hosts if f"{host}:{port}" != own[0]]
            then = set(subset(name, [f"{host}:{port}" for host in left], 2))
            assert own[1] in then
            with gateway(target, ready=0, flags=(*flags, name)) as door:
                for address in own:
                    door.wait_for("replica is ready", replica=address)
                async with client_of(door) as client:
                    await loses_one(client, door, names, set(own), left, then)
            await asyncio.to_thread(names.answers, hosts, times=0)


async def loses_one(
    client: Client, door: Service, names: NameServer, own: set[str], left: list[str], then: set[str]
) -> None:
    """A gateway's own replica leaves the name under load: another takes its place, and all calls are answered."""
    await until(lambda: set(of_replicas(door, "up")) == own, "its own are there")
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            await client.sleeps(seconds=0.005)

    callers = [asyncio.ensure_future(caller()) for _ in range(4)]
    try:
        await asyncio.to_thread(names.answers, left)
        await until(lambda: set(of_replicas(door, "up")) == then, "another has come")
    finally:
        stop.set()
        await asyncio.gather(*callers)


async def test_versions_during_a_roll_out(tmp_path: Path) -> None:
    """A call goes to a replica with its version.

    A call without a version goes to all replicas with the same signature.
    """
    targets = [f"unix:{tmp_path}/{number}.sock" for number in range(3)]
    modules = [
        nap_kernels(tmp_path / "old.py", 0.0, "1"),
        nap_kernels(tmp_path / "new.py", 0.0, "2"),
        nap_kernels(tmp_path / "other.py", 0.0, "10", "y"),
    ]
    with ExitStack() as stack:
        for target, module in zip(targets, modules, strict=True):
            replica(stack, target, kernels=module)
        with gateway(*targets) as door, grpc.insecure_channel(door.wait_for("serving")["listen"]) as channel:
            oip = Oip(channel)
            index = RepositoryIndexResponse.FromString(
                oip.send(RepositoryIndexRequest().SerializeToString(), "RepositoryIndex")
            )
            assert [model.version for model in index.models if model.name == "nap"] == ["1", "2", "10"]
            for version, argument in (("1", "x"), ("2", "x"), ("10", "y"), ("", "y")):
                asked = ModelMetadataRequest(name="nap", version=version).SerializeToString()
                told = ModelMetadataResponse.FromString(oip.send(asked, "ModelMetadata"))
                assert [one.name for one in told.inputs] == [argument]
            for version, adds in (("1", 1.0), ("2", 2.0)):
                message = vector("nap", 1.0, 2.0)
                message.model_version = version
                answer = oip.infer(message)
                assert answer.model_version == version
                assert arrays_of(answer)[0].tolist() == [1.0 + adds, 2.0 + adds]
            # Of equally many replicas each, the newest version counts, and no other has its arguments.
            assert oip.infer(request("nap", {"y": np.ones(1)})).model_version == "10"
            unknown = vector("nap", 1.0)
            unknown.model_version = "3"
            refusal = oip.refusal(unknown)
            assert (refusal.code, "1, 2, 10" in refusal.message) == ("NOT_FOUND", True), refusal


async def test_what_cannot_be_in_time_is_refused_by_the_gateway(tmp_path: Path) -> None:
    """The gateway decides by the replica's report and by the calls that it holds. The replica gets no such call."""
    target, gate = f"unix:{tmp_path}/one.sock", Gate(tmp_path / "gate")
    with ExitStack() as stack:
        dispatcher = replica(stack, target)
        with gateway(target) as door:
            async with client_of(door) as client:
                for _ in range(5):
                    await client.sleeps(seconds=0.05)
                running = asyncio.ensure_future(client.waits_for(path=str(gate)))
                await until(lambda: gate.reached, "the worker is held")
                others = [asyncio.ensure_future(client.sleeps(seconds=0.05, priority="interactive")) for _ in range(80)]
                metrics = door.wait_for("serving")["metrics_listen"]
                await until(lambda: Scrape(metrics).sum("unlatch_calls_in_flight") == 81, "all are there")
                # A refusal takes far less, on a busy machine too.
                with pytest.raises(ResourceExhausted, match="sleeps would be done in") as refused:
                    await client.sleeps(seconds=0.05, timeout=2.0)
                assert refused.value.retry_after_milliseconds > 0
                gate.open()
                await asyncio.gather(running, *others)
            told = Scrape(dispatcher.wait_for("serving")["metrics_listen"])
            assert told.sum("unlatch_calls_total", code="RESOURCE_EXHAUSTED") == 0


async def test_replica_that_fails_again_and_again_is_ejected_and_tried_again(tmp_path: Path) -> None:
    """Calls go to the other replica. After the ejection one call is tried, and its success brings the replica back."""
    sick = tmp_path / "sick"
    module = tmp_path / "sickly.py"
    module.write_text(
        "import os\nimport signal\nimport numpy as np\nfrom jaxtyping import Float64\nfrom unlatch import kernel\n\n\n"
        '@kernel\ndef ails(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:\n    """May die."""\n'
        f"    if os.path.exists({str(sick)!r}):\n        os.kill(os.getpid(), signal.SIGKILL)\n    return x\n"
    )
    well = tmp_path / "healthy.py"
    well.write_text(module.read_text().replace(str(sick), "/nowhere"))
    targets = [f"unix:{tmp_path}/{number}.sock" for number in range(2)]
    with ExitStack() as stack:
        # Each call is a different one: a call that has killed two workers would be refused as poison.
        sickly = replica(stack, targets[0], "--poison-seconds", "0", kernels=str(module))
        replica(stack, targets[1], kernels=str(well))
        with gateway(*targets) as door:
            async with client_of(door) as client:
                sick.touch()
                outcomes = Counter[type]()
                while not outcomes[Aborted] >= 5:
                    x = np.array([float(sum(outcomes.values()))])
                    outcome: Any = (await asyncio.gather(client.ails(x), return_exceptions=True))[0]
                    outcomes[type(outcome)] += 1
                await asyncio.to_thread(door.wait_for, "replica is ejected", replica=targets[0])
                sick.unlink()
                for _ in range(20):
                    np.testing.assert_array_equal(await client.ails(np.ones(2)), np.ones(2))
                await until(lambda: of_replicas(door, "ejected")[targets[0]] == 0, "its time is over")
                before = served(sickly, "ails")
                while served(sickly, "ails") < before + 2:
                    await asyncio.gather(*(client.ails(np.ones(2)) for _ in range(8)))
