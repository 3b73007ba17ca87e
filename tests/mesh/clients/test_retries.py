"""The service config of docs/clients.md, in gRPC's clients: no call that may have had an effect is begun twice."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.mesh.clients.test_other_languages import BLOCK, DEBIANS_GO, DEBIANS_JARS, SECTIONS, _skip_without
from tests.mesh.faults.conftest import FAULT_KERNELS, gateway_to
from tests.support.doors import KEEPS, vector
from tests.support.http2 import leaving_server
from tests.support.mesh import ROOT, Mesh, running_mesh
from tests.support.watching import Scrape, wait_until

CONFIG = re.search(r"^```json\n(.*?)^```$", SECTIONS["Retries"], re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
METHOD = "/inference.GRPCInferenceService/ModelInfer"
# More than gRPC keeps of a call in any language, unless it is told to keep more.
LARGE = vector("dies", *[1.0] * (2 << 20 >> 3), how="exit").SerializeToString()
RESTARTS = "unlatch_worker_restarts_total"

# Calls the kernel that kills its worker, with a large array, at an address, by a config that lists these codes. Returns
# the status, and the reason if there is one.
Caller = Callable[[str, list[str]], list[str]]


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh with kernels that kill their workers. None of their calls is refused as poison."""
    flags = ["--kernels", str(FAULT_KERNELS), "--poison-seconds", "0"]
    with running_mesh(tmp_path_factory.mktemp("deadly"), dispatcher=flags) as mesh:
        yield mesh


def began_once(mesh: Mesh, before: float) -> None:
    """Check that one worker ended, and that all are up again."""
    wait_until(lambda: Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_up") == 2, "every worker is up")
    assert Scrape(mesh.dispatcher_metrics).sum(RESTARTS) == before + 1


@pytest.mark.parametrize("codes", [["UNAVAILABLE"], ["UNAVAILABLE", "ABORTED"]])
def test_python_begins_no_call_twice(deadly: Mesh, codes: list[str]) -> None:
    """A worker dies of the call of a kernel that is not pure. The caller hears so at once, with a reason."""
    before = Scrape(deadly.dispatcher_metrics).sum(RESTARTS)
    with grpc.insecure_channel(deadly.gateway, options=[("grpc.service_config", _config(codes))]) as channel:
        rpc: Any = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as raised:
            rpc(vector("dies", 1.0, how="exit").SerializeToString(), timeout=20.0)
    error: Any = raised.value
    trailers = dict(error.trailing_metadata())
    assert error.code() is grpc.StatusCode.ABORTED
    assert "ended while it ran the call" in error.details()
    assert trailers["grpc-retry-pushback-ms"] == "-1"
    (packed,) = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    info = error_details_pb2.ErrorInfo()
    assert packed.Unpack(info)
    assert (info.reason, info.domain) == ("MAY_HAVE_BEGUN", "unlatch")
    began_once(deadly, before)


@pytest.mark.timeout(400)  # the first test of a language compiles
@pytest.mark.parametrize("codes", [["UNAVAILABLE"], ["UNAVAILABLE", "ABORTED"]])
@pytest.mark.parametrize("caller", ["Go", "Java"], indirect=True)
def test_other_languages_begin_no_call_twice(deadly: Mesh, caller: Caller, codes: list[str]) -> None:
    """The client hears the status and the reason, with the same service config and one that lists ABORTED too."""
    before = Scrape(deadly.dispatcher_metrics).sum(RESTARTS)
    assert caller(deadly.gateway, codes) == ["ABORTED", "MAY_HAVE_BEGUN"]
    began_once(deadly, before)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("caller", ["Python", "Go", "Java"], indirect=True)
def test_a_call_that_was_not_begun_is_sent_again(tmp_path: Path, caller: Caller) -> None:
    """A gateway without a replica refuses each attempt of a call, UNAVAILABLE. So the retries do happen."""
    with gateway_to(tmp_path / "none.sock", "--hold-seconds", "0") as gateway:
        serving = gateway.wait_for("serving")
        assert caller(serving["listen"], ["UNAVAILABLE"]) == ["UNAVAILABLE"]
        refused = Scrape(serving["metrics_listen"]).sum("unlatch_calls_total", code="UNAVAILABLE")
    assert refused == json.loads(CONFIG)["methodConfig"][0]["retryPolicy"]["maxAttempts"]


@pytest.mark.parametrize(
    ("options", "size", "is_sent_again"),
    [
        ([], 1000, True),
        ([], len(LARGE), False),
        ([("grpc.service_config", CONFIG)], len(LARGE), False),
        ([KEEPS], len(LARGE), True),
    ],
    ids=["small", "large", "large, with a retry policy", "large, kept"],
)
def test_call_on_a_connection_that_ends_is_sent_again_if_it_was_kept(
    options: list[tuple[str, Any]], size: int, *, is_sent_again: bool
) -> None:
    """A connection ends by its age while a call is on its way. gRPC sends the call again without a retry policy.

    But it has not kept a large call, unless it was told to.
    """
    with leaving_server(b"answer") as address, grpc.insecure_channel(address, options=options) as channel:
        rpc: Any = channel.unary_unary(METHOD)
        if is_sent_again:
            assert rpc(bytes(size), timeout=20.0) == b"answer"
            return
        with pytest.raises(grpc.RpcError, match="max_age") as raised:
            rpc(bytes(size), timeout=20.0)
        error: Any = raised.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_docs_tell_what_is_kept() -> None:
    """The tests keep as much as docs/clients.md says."""
    assert '("grpc.per_rpc_retry_buffer_size", 64 << 20)' in SECTIONS["Retries"]
    assert "grpc.MaxRetryRPCBufferSize(64 << 20)" in SECTIONS["Retries"]
    assert "perRpcBufferLimit(64 << 20)" in SECTIONS["Retries"]


@pytest.fixture(scope="module")
def caller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Caller:
    """Build a caller in one language."""
    builders: dict[str, Callable[[Path], Caller]] = {"Python": _python, "Go": _go, "Java": _java}
    return builders[request.param](tmp_path_factory.mktemp(request.param))


def _python(_: Path) -> Caller:
    def call(target: str, codes: list[str]) -> list[str]:
        with grpc.insecure_channel(target, options=[("grpc.service_config", _config(codes)), KEEPS]) as channel:
            rpc: Any = channel.unary_unary(METHOD)
            with pytest.raises(grpc.RpcError) as raised:
                rpc(LARGE, timeout=20.0)
        error: Any = raised.value
        return [error.code().name]

    return call


def _go(directory: Path) -> Caller:
    """Build a caller by Debian's gRPC for Go, whose version does not retry unless it is told to."""
    _skip_without("Go")
    source = directory / "src" / "example.org" / "caller"
    source.mkdir(parents=True)
    (source / "protos").symlink_to(ROOT / "protos")
    shutil.copy(Path(__file__).with_name("retries.go"), source / "main.go")
    environment = {"GO111MODULE": "off", "GOPATH": f"{directory}:{DEBIANS_GO}", "GRPC_GO_RETRY": "on"}
    _bash(f"{_code('Go', 'bash')}\ngo build -o caller .", source, environment)
    return lambda target, codes: _bash('./caller "$@"', source, environment, target, _config(codes)).upper().split()


def _java(directory: Path) -> Caller:
    """Build a caller by Debian's gRPC for Java. Its service config is the one that docs/clients.md writes in Java."""
    _skip_without("Java")
    (directory / "protos").symlink_to(ROOT / "protos")
    shutil.copy(Path(__file__).with_name("Retries.java"), directory)
    config = directory / "RetryConfig.java"
    config.write_text(_code("Retries", "java"))
    environment = {"JARS": str(DEBIANS_JARS)}
    stubs = _code("Java", "bash")
    _bash(f'{stubs}\njavac -cp ".:$JARS/*" Retries.java RetryConfig.java inference/*.java', directory, environment)

    def call(target: str, codes: list[str]) -> list[str]:
        listed = ", ".join(f'"{code}"' for code in codes)
        config.write_text(_code("Retries", "java").replace('List.of("UNAVAILABLE")', f"List.of({listed})"))
        run = 'javac RetryConfig.java && java -cp ".:$JARS/*" Retries "$@"'
        return _bash(run, directory, environment, target).split()

    return call


def _code(section: str, kind: str) -> str:
    """Return the first block of a kind in a section of docs/clients.md."""
    blocks: list[tuple[str, str]] = BLOCK.findall(SECTIONS[section])
    return next(code for found, code in blocks if found == kind)


def _config(codes: list[str]) -> str:
    """Return the service config of docs/clients.md with other codes."""
    config = json.loads(CONFIG)
    assert config["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    config["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] = codes
    return json.dumps(config)


def _bash(code: str, directory: Path, environment: dict[str, str], *arguments: str) -> str:
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code, "bash", *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
