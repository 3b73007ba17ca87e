"""Settings that both services share. Each is a flag --a-name or a variable UNLATCH_A_NAME, validated at start."""

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, NoDecode, SettingsConfigDict

from unlatch.common.errors import near
from unlatch.common.net.addresses import is_exposed

MiB = 1024 * 1024


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

    listen: str
    metrics_listen: str
    health_listen: str
    drain_seconds: float = Field(20.0, ge=0, description="Maximum seconds for calls in flight to end after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged")

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
    # Lanes are asked to reconnect. Other callers are authenticated by their connection, which they may keep for days.
    tls_connection_seconds: float = Field(
        300.0, gt=0, description="Maximum seconds that a connection is used before callers must open another"
    )
    insecure: bool = Field(
        default=False, description="Listen on addresses that other machines reach without TLS or authentication"
    )

    # Each of these settings, where it is given, makes callers authenticate.
    identified_by: ClassVar[tuple[str, ...]] = ("tls_client_ca",)

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
        if not any(getattr(self, name) for name in self.identified_by):
            wanted = " or ".join(flag(name) for name in self.identified_by)
            raise ValueError(self._exposed(f"callers must authenticate, by {wanted}"))
        return self

    def _exposed(self, wanted: str) -> str:
        return f"--listen {self.listen} can be reached by other machines: {wanted}; or give --insecure"


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
    max_metadata_bytes: int = Field(16 * 1024, ge=1024, description="Maximum bytes of an RPC's metadata")
    # TLS and HTTP/2 together. This closes connections that send nothing, or send it too slowly.
    handshake_seconds: float = Field(10.0, gt=0, description="Maximum seconds for a connection's handshakes")
    # Pings find connections whose other end has vanished without closing them.
    keepalive_seconds: float = Field(60.0, gt=0, description="Idle seconds before a keepalive ping")
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


def parse(kind: type[S], program: str, arguments: Sequence[str]) -> S:
    """Read settings from flags, then the environment, then defaults. Invalid ones exit with code 2 and a message."""
    _refuse_unknown(kind, program, arguments)
    try:
        return CliApp.run(kind, cli_args=list(arguments), cli_settings_source=_source(kind, program))
    except ValidationError as error:
        for problem in error.errors():
            # An error about several settings together has no location; its text names them.
            place = [flag("-".join(map(str, problem["loc"])))] if problem["loc"] else []
            print(": ".join([program, *place, problem["msg"].removeprefix("Value error, ")]), file=sys.stderr)
        raise SystemExit(2) from None


def _refuse_unknown(kind: type[S], program: str, arguments: Sequence[str]) -> None:
    """Refuse unknown flags and suggest a similar one, which argparse cannot. Abbreviations are left to argparse."""
    known = ["--help", *map(flag, kind.model_fields)]
    for given in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        if not any(name.startswith(given.replace("--no-", "--")) for name in known):
            print(f"{program}: unknown option {given}{near(given, known)}", file=sys.stderr)
            raise SystemExit(2)


def _source(kind: type[S], program: str) -> CliSettingsSource[Any]:
    return CliSettingsSource(kind, cli_prog_name=program, cli_parse_args=False)
