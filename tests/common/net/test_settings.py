"""Wrong settings are told with the flag or variable that they come from, and unknown ones with a similar name."""

import subprocess
import sys
from typing import get_args

import pytest

from unlatch.common.net.settings import Settings, flag, parse, unknown_variables
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings
from unlatch.supervisor.supervisor import main
from unlatch.unit.settings import ServeSettings

# Begins a unit with the arguments as its flags.
BEGIN = """
import os, sys
from unlatch.common.service.begin import begin
from unlatch.unit.settings import PROGRAM, ServeSettings, services
services(begin(ServeSettings, PROGRAM, "supervisor", sys.argv[1:], os.environ), os.environ)
"""
KINDS = [ServeSettings, GatewaySettings, ComputeSettings]


def told(
    kind: type[Settings], flags: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Parse settings that are wrong; return the lines that say so."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            parse(kind, "unlatch service", flags, environment)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--listen", "127.0.0.1"], "--listen 127.0.0.1: wanted host:port or [IPv6]:port"),
        (["--listen", "a:1,b:2"], "--listen a:1,b:2: wanted host:port"),
        (["--listen=127.0.0.1:99999"], "--listen 127.0.0.1:99999: wanted host:port"),
        (["--metrics-listen", "unix:/metrics"], "--metrics-listen unix:/metrics: wanted host:port"),
        (["--drain-seconds", "soon"], "--drain-seconds soon: Input should be a valid number"),
        (["--drain-second", "1"], "unknown option --drain-second; did you mean --drain-seconds"),
        (["--log-level", "trace"], "--log-level trace: Input should be 'debug'"),
        (["--drain-seconds"], "argument --drain-seconds: expected one argument"),
        (["--no-insecur"], "unknown option --insecur; did you mean --insecure"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags(kind: type[Settings], flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line names the flag, its value and what was wanted; there is no wall of usage."""
    [found] = told(kind, flags, {}, capsys)
    assert found.startswith(f"unlatch service: {line}")


@pytest.mark.parametrize("kind", [ComputeSettings, GatewaySettings])
def test_numbers_have_bounds(kind: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """Every number that would fail where it is used is refused at the start, with its flag."""
    numbers = {name: field.annotation for name, field in kind.model_fields.items()}
    tried = 0
    for name, annotation in numbers.items():
        kinds = {float, int} & {annotation, *get_args(annotation)}
        for value in {float: ("inf", "nan", "1e300"), int: (str(2**63),)}[kinds.pop()] if kinds else ():
            [found] = told(kind, [f"{flag(name)}={value}"], {}, capsys)
            assert found.startswith(f"unlatch service: {flag(name)} {value}: "), found
            tried += 1
    assert tried > 20


@pytest.mark.parametrize(("flags", "near"), [(["--worker", "2"], "--workers"), (["--kernel", "a.py"], "--kernels")])
@pytest.mark.parametrize("kind", [ServeSettings, ComputeSettings])
def test_singular_of_a_flag(
    kind: type[Settings], flags: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of a flag's name is no flag; the whole name is suggested first."""
    [found] = told(kind, flags, {}, capsys)
    assert found.startswith(f"unlatch service: unknown option {flags[0]}; did you mean {near}")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_value_from_a_variable(kind: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong value is told with the variable that has it, and no flag; a flag goes before its variable."""
    [found] = told(kind, [], {"UNLATCH_DRAIN_SECONDS": "soon"}, capsys)
    assert found.startswith("unlatch service: UNLATCH_DRAIN_SECONDS=soon: Input should be a valid number")
    [found] = told(kind, ["--drain-seconds=later"], {"UNLATCH_DRAIN_SECONDS": "1"}, capsys)
    assert found.startswith("unlatch service: --drain-seconds later: ")


@pytest.mark.parametrize("variable", ["UNLATCH_MAX_STREAMS", "UNLATCH_POISON_SECONDS", "UNLATCH_MAX_LIVE_CALLS"])
def test_wrong_variable_of_a_service_under_serve(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`serve` checks the variables of both services itself, before it starts them."""
    monkeypatch.setenv(variable, "many")
    with pytest.raises(SystemExit):
        main(["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--health-listen=127.0.0.1:0"])
    assert f"unlatch serve: {variable}=many: Input should be" in capsys.readouterr().err


def test_unknown_variables() -> None:
    """A misspelt variable is told with a similar name; those of services, clients and Kubernetes are known."""
    known = ["UNLATCH_WORKERS", "UNLATCH_REPLICAS", "UNLATCH_RELOAD", "UNLATCH_SERVER", "PATH"]
    links = ["UNLATCH_GATEWAY_SERVICE_HOST", "UNLATCH_GATEWAY_PORT_8001_TCP_ADDR", "UNLATCH_COMPUTE_PORT"]
    assert unknown_variables([*known, *links]) == {}
    [(name, message)] = unknown_variables(["UNLATCH_WORKER", *known]).items()
    assert name == "UNLATCH_WORKER"
    assert message.startswith("unknown variable UNLATCH_WORKER; did you mean UNLATCH_WORKERS")


def test_strict_refuses_unknown_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With --strict, an unknown variable ends the start."""
    monkeypatch.setenv("UNLATCH_WORKER", "1")
    with pytest.raises(SystemExit) as ended:
        main(["--strict"])
    assert ended.value.code == 2
    assert "unlatch serve: unknown variable UNLATCH_WORKER; did you mean UNLATCH_WORKERS" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["REPLICAS", "REPLICA_CERT", "REPLICA_CA", "MAX_REPLICAS"])
def test_variables_without_effect_under_serve(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings of a gateway's other replicas are told in the log of `serve`, and refused with --strict or as flags."""
    monkeypatch.setenv(f"UNLATCH_{name}", "/some/file")
    addresses = [f"--{kind}=127.0.0.1:0" for kind in ("listen", "metrics-listen", "health-listen")]
    told = f"the variable UNLATCH_{name} has no effect: the replica of unlatch serve is in the same process"
    with pytest.raises(SystemExit) as ended:
        main([*addresses, "--strict"])
    assert (ended.value.code, capsys.readouterr().err) == (2, f"unlatch serve: {told}\n")
    with pytest.raises(SystemExit):
        main([f"--{name.lower().replace('_', '-')}=x"])
    assert ": the replica of unlatch serve is in the same process" in capsys.readouterr().err
    # In a process of its own, whose log `begin` sets up.
    begun = subprocess.run([sys.executable, "-c", BEGIN, *addresses], capture_output=True, text=True, check=True)
    assert told in begun.stderr
