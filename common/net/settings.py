"""Settings that both services share. Each is a flag --a-name or a variable UNLATCH_A_NAME, validated at start."""

import math
import re
import sys
from argparse import ArgumentParser
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from unlatch.common.errors import near
from unlatch.common.net.addresses import host_and_port, is_exposed, is_unix

MiB = 1024 * 1024
# What gRPC's settings, timers and the system's limits can hold. gRPC counts milliseconds.
_MAX_NUMBER, _MAX_BYTES = 2**31 - 1, 2**62
_MAX_SECONDS = _MAX_NUMBER // 1000


def _checked(address: str) -> str:
    return address if is_unix(address) else _tcp(address)


def _tcp(address: str) -> str:
    host_and_port(address)
    return address


Address = Annotated[str, AfterValidator(_checked)]
# HTTP needs a port.
TcpAddress = Annotated[str, AfterValidator(_tcp)]


class Settings(BaseSettings):
    """Settings of every command that starts a service: frozen, validated, without behaviour."""

    model_config = SettingsConfigDict(
        env_prefix="UNLATCH_",
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )

    listen: Address
    metrics_listen: TcpAddress
    health_listen: Address
    drain_seconds: float = Field(20.0, ge=0, description="Maximum seconds for calls in flight to end after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged")
    strict: bool = Field(
        default=False, description="Refuse to start with UNLATCH_ variables that are unknown or have no effect"
    )

    # Checked every second, and read again when they change. A Unix socket never speaks TLS.
    tls_cert: str = Field("", description="PEM file: certificate shown to callers, with its issuers")
    tls_key: str = Field("", description="PEM file: private key of --tls-cert")
    tls_client_ca: str = Field(
        "", description="PEM file: authorities of callers' certificates; without it, callers need none"
    )
    # Callers need a moment to reconnect. A caller whose certificate or token is no longer valid gets as long.
    tls_grace_seconds: float = Field(
        10.0,
        gt=0,
        description="Seconds for a lane to answer its calls after its certificate was replaced or its token ended",
    )
    # A connection ends at a time of its own, up to a tenth earlier or later. Calls on it are answered, and its callers
    # open another one. So callers other than lanes authenticate again, and leave a service that drains.
    connection_seconds: float = Field(300.0, gt=0, description="Seconds until callers open another connection")
    insecure: bool = Field(
        default=False, description="Listen on addresses that other machines reach without TLS or authentication"
    )

    # Names of settings that a command has no flag for, because it passes their variables on to its services.
    passed_on: ClassVar[frozenset[str]] = frozenset()
    # Names of settings of those services that have no effect under a command, each with the reason.
    without_effect: ClassVar[Mapping[str, str]] = {}
    # Each of these settings, where it is given, makes callers authenticate. Empty: the services that the command starts
    # have further ones, and check it.
    identified_by: ClassVar[tuple[str, ...]] = ("tls_client_ca",)

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers that would fail only where they are used."""
        is_bytes = str(info.field_name).endswith("_bytes")
        most = _MAX_SECONDS if isinstance(value, float) else _MAX_BYTES if is_bytes else _MAX_NUMBER
        if isinstance(value, int | float) and value > most:
            raise ValueError(f"wanted at most {most}")
        return value

    @model_validator(mode="after")
    def _secured(self) -> Self:
        """Require TLS and authentication for a --listen address that other machines can reach."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("--tls-cert and --tls-key must be given together: one is missing")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key: callers show certificates over TLS only")
        if self.insecure or not is_exposed(self.listen):
            return self
        if not self.tls_cert:
            raise ValueError(self._exposed("give --tls-cert and --tls-key"))
        if self.identified_by and not any(getattr(self, name) for name in self.identified_by):
            wanted = " or ".join(flag(name) for name in self.identified_by)
            raise ValueError(self._exposed(f"callers must authenticate, by {wanted}"))
        return self

    def _exposed(self, wanted: str) -> str:
        return f"--listen {self.listen} can be reached by other machines: {wanted}; or give --insecure"


_READ_BY_CLIENTS = {f"UNLATCH_{name}" for name in ("SERVER", "TLS_CA", "TLS_NAME", "TOKEN_FILE")}


def flag(name: str) -> str:
    """A setting's name on the command line: `drain_seconds` is `--drain-seconds`."""
    return f"--{name.replace('_', '-')}"


class ServiceSettings(Settings):
    """Limits of a service's port, for all callers. A lane is one stream of one connection."""

    # A connection costs some 60 KiB. Connections over the limit are closed.
    max_connections: int = Field(1024, gt=0, description="Maximum connections to --listen at a time")
    # RPCs over the limit wait in the caller.
    max_streams: int = Field(1024, gt=0, description="Maximum RPCs of one connection at a time")
    # A token is the largest part of it. Larger metadata is refused before it is parsed.
    max_metadata_bytes: int = Field(
        16 * 1024, ge=1024, le=_MAX_NUMBER, description="Maximum bytes of an RPC's metadata"
    )
    # TLS and HTTP/2 together. This closes connections that send nothing, or send it too slowly.
    handshake_seconds: float = Field(10.0, gt=0, description="Maximum seconds for a connection's handshakes")
    # Pings find connections whose other end has vanished without closing them.
    keepalive_seconds: float = Field(60.0, gt=0, description="Idle seconds before a keepalive ping")
    # gRPC's own limit is 5 minutes. Clients whose pings are more frequent lose their connection: too_many_pings.
    min_ping_seconds: float = Field(0.5, gt=0, description="Minimum seconds between keepalive pings of a caller")
    # Until then the service holds the reply. A slower caller is disconnected: 32 MiB at 10 Mbit/s take 27 s.
    unread_seconds: float = Field(
        60.0, gt=0, description="Maximum seconds for a caller to read a message of its replies"
    )
    reflection: bool | None = Field(
        None, description="Serve gRPC reflection; by default only if other machines cannot reach --listen"
    )

    @property
    def reflects(self) -> bool:
        """Whether reflection is served."""
        return not is_exposed(self.listen) if self.reflection is None else self.reflection


def separated(value: object) -> object:
    """Split a list that a flag or variable gives as a,b,c. (--replicas a --replicas b works too.)"""
    if isinstance(value, str):
        return tuple(filter(None, value.split(",")))
    if isinstance(value, list | tuple):
        return tuple(part for item in value for part in str(item).split(",") if part)
    return value


# A setting with several values.
Several = Annotated[tuple[str, ...], NoDecode, BeforeValidator(separated)]


def _weights(value: object) -> object:
    parts = separated(value)
    if not isinstance(parts, tuple):
        return value
    return {name: weight for name, _, weight in (part.rpartition("=") for part in parts)}


def _positive(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"{name}={weight:g}: wanted name=number, with a number above 0")
    return weights


# Both the gateway and the replicas order waiting calls by these.
TenantWeights = Annotated[dict[str, float], NoDecode, BeforeValidator(_weights), AfterValidator(_positive)]

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> S:
    """Read settings from flags, then the environment, then defaults. Wrong ones exit with code 2 and a message."""
    given = {word.partition("=")[0].replace("--no-", "--") for word in arguments if word.startswith("--")}
    known = ["--help", *map(flag, kind.model_fields)]
    instead = {flag(name): f"; set the variable {variable(name)} instead" for name in kind.passed_on}
    instead |= {flag(name): f": {why}" for name, why in kind.without_effect.items()}
    wrong = [f"unknown option {name}{instead.get(name) or near(name, known)}" for name in sorted(given - set(known))]
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(kind, cli_prog_name=program, cli_exit_on_error=False)
        _show_plainly(source.root_parser, kind)
        if not wrong:
            return CliApp.run(kind, cli_args=list(arguments), cli_settings_source=source)
    except ValidationError as error:
        wrong = [_told(problem, given, environment) for problem in error.errors()]
    except SettingsError as error:
        wrong = [str(error).removeprefix("error parsing CLI: ")]
    raise refused(program, wrong)


# What `--help` shows for the types of settings.
_VALUES = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "tuple[str,...]": "LIST", "dict[str,float]": "LIST"}


def _show_plainly(parser: ArgumentParser, kind: type[Settings]) -> None:
    """Have `--help` show a setting's values and default as the docs do, not as Python's types and objects."""
    parser.epilog = "Each flag --a-name is a variable UNLATCH_A_NAME, too. The flag wins."
    if kind.passed_on:
        parser.epilog += "\nOther flags of `unlatch gateway` and `unlatch compute` are set by their variables here."
    for action in parser._actions:  # noqa: SLF001 (argparse has no other way to list a parser's flags)
        if (field := kind.model_fields.get(action.dest)) is not None:
            action.metavar = _VALUES.get(str(action.metavar), action.metavar)
            default = default_text(field)
            action.help = f"{field.description} (default: {default})" if default else field.description


def default_text(field: FieldInfo) -> str:
    """A setting's default as it is written on the command line; "" if there is none."""
    if field.default_factory is not None:
        return "the host's name"
    if isinstance(field.default, tuple):
        return ",".join(field.default)
    return "" if field.default in (None, "", {}) else str(field.default)


def refused(program: str, wrong: Iterable[str], code: int = 2) -> SystemExit:
    """Print what is wrong with a command, a line each. Returns the exit of the program, with this code."""
    for each in wrong:
        print(f"{program}: {each}", file=sys.stderr)
    return SystemExit(code)


def _told(problem: ErrorDetails, given: Container[str], environment: Mapping[str, str]) -> str:
    """A wrong value, with the flag or variable that it comes from."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        # An error about several settings together; its text names them.
        return message
    name = str(problem["loc"][0])
    at = flag(name)
    if at in given or variable(name) not in environment:
        return f"{at} {problem['input']}: {message}"
    return f"{variable(name)}={environment[variable(name)]}: {message}"


def variable(name: str) -> str:
    """The variable that a setting is read from: `drain_seconds` is read from `UNLATCH_DRAIN_SECONDS`."""
    return f"UNLATCH_{name.upper()}"


# What Kubernetes and Docker set for a service that is called unlatch.
_LINK = re.compile("_SERVICE_|_PORT(_|$)")


def unknown_variables(environment: Iterable[str]) -> dict[str, str]:
    """Variables UNLATCH_… that no setting is read from, each with a message that names similar ones."""
    # One environment may serve several services. This module has the settings of all of them.
    import_module("unlatch.unit.settings")
    kinds = [kind for base in Settings.__subclasses__() for kind in (base, *base.__subclasses__())]
    known = {variable(name) for kind in kinds for name in kind.model_fields} | _READ_BY_CLIENTS
    ours = {name for name in environment if name.startswith("UNLATCH_") and not _LINK.search(name)}
    return {name: f"unknown variable {name}{near(name, known)}" for name in sorted(ours - known)}


def variables_without_effect(kind: type[Settings], environment: Container[str]) -> dict[str, str]:
    """Variables of settings that have no effect under a command, each with a message that says why."""
    given = {variable(name): why for name, why in kind.without_effect.items() if variable(name) in environment}
    return {name: f"the variable {name} has no effect: {why}" for name, why in given.items()}
