"""What both services' settings have in common: a flag --a-name or a variable UNLATCH_A_NAME each, checked at birth."""

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
    """Frozen; does nothing."""

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
    drain_seconds: float = Field(20.0, ge=0, description="How long calls in flight may take to end after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged")

    # Looked at every second, and taken anew when they change. A Unix socket speaks no TLS.
    tls_cert: str = Field("", description="A file (PEM): the certificate shown to callers, and those that issued it")
    tls_key: str = Field("", description="A file (PEM): its private key")
    tls_client_ca: str = Field("", description="A file (PEM): whose certificates callers must show; none are asked for")
    # Those who follow at once need a moment. It is also how long a caller may go on whom nothing vouches for any more.
    tls_grace_seconds: float = Field(
        10.0,
        gt=0,
        description="How long lanes whose certificates were replaced, or whose token has ended, may answer their calls",
    )
    # Lanes are asked to open anew; other callers are known by their connections alone, which they keep for days.
    tls_connection_seconds: float = Field(
        300.0, gt=0, description="How long a connection is used before callers must come by another"
    )
    insecure: bool = Field(
        default=False, description="Listen where other machines reach it without TLS, or without knowing who calls"
    )

    # Settings of which any one, where it is given, has callers say who they are.
    identified_by: ClassVar[tuple[str, ...]] = ("tls_client_ca",)

    @model_validator(mode="after")
    def _secured(self) -> Self:
        """What listens where other machines reach it speaks TLS, and knows who calls."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("--tls-cert and --tls-key belong together: one was given alone")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key: callers show certificates over TLS alone")
        if self.insecure or not is_exposed(self.listen):
            return self
        if not self.tls_cert:
            raise ValueError(self._exposed("it needs --tls-cert and --tls-key"))
        if not any(getattr(self, name) for name in self.identified_by):
            wanted = " or ".join(flag(name) for name in self.identified_by)
            raise ValueError(self._exposed(f"callers must be known, by {wanted}"))
        return self

    def _exposed(self, wanted: str) -> str:
        return f"--listen {self.listen} is where other machines reach it: {wanted}; or say --insecure"


def flag(name: str) -> str:
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


class ServiceSettings(Settings):
    """What the port of a service lets through, whoever comes. A lane is one stream of one connection."""

    # A connection costs some 60 KiB; one that is one too many is closed.
    max_connections: int = Field(1024, gt=0, description="Most connections to --listen at a time")
    # What is beyond it waits with the caller.
    max_streams: int = Field(1024, gt=0, description="Most RPCs of one connection at a time")
    # A token is the largest thing in them. What is larger is refused before it is looked at.
    max_metadata_bytes: int = Field(16 * 1024, ge=1024, description="Most bytes of an RPC's metadata")
    # TLS and HTTP/2 together. It ends who connects and then says nothing, or lets it drip.
    handshake_seconds: float = Field(10.0, gt=0, description="Most time that a connection may take to be made")
    # It finds connections whose other end is gone without a word.
    keepalive_seconds: float = Field(60.0, gt=0, description="After what silence a connection is asked for a sign")
    reflection: bool | None = Field(
        None, description="Whether gRPC tells anybody what is served; on loopback alone unless given"
    )

    @property
    def reflects(self) -> bool:
        """Whether it does."""
        return not is_exposed(self.listen) if self.reflection is None else self.reflection


def separated(value: object) -> object:
    """A list as flags and variables give it: a,b,c. (--replicas a --replicas b works too.)"""
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
            raise ValueError(f"a weight is name=number, above 0, not {name}={weight:g}")
    return weights


# Both ends of a lane order calls by them.
TenantWeights = Annotated[dict[str, float], NoDecode, BeforeValidator(_weights), AfterValidator(_positive)]

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], program: str, arguments: Sequence[str]) -> S:
    """Settings from flags, then the environment, then defaults. Exits with code 2 and a message for wrong ones."""
    _refuse_unknown(kind, program, arguments)
    try:
        return CliApp.run(kind, cli_args=list(arguments), cli_settings_source=_source(kind, program))
    except ValidationError as error:
        for problem in error.errors():
            # What several settings say together is at no place of its own, and names them itself.
            place = [flag("-".join(map(str, problem["loc"])))] if problem["loc"] else []
            print(": ".join([program, *place, problem["msg"].removeprefix("Value error, ")]), file=sys.stderr)
        raise SystemExit(2) from None


def _refuse_unknown(kind: type[S], program: str, arguments: Sequence[str]) -> None:
    """Argparse would refuse it too, but knows no near ones. It lets a flag be shortened: that is left to it."""
    known = ["--help", *map(flag, kind.model_fields)]
    for given in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        if not any(name.startswith(given.replace("--no-", "--")) for name in known):
            print(f"{program}: there is no option {given}{near(given, known)}", file=sys.stderr)
            raise SystemExit(2)


def _source(kind: type[S], program: str) -> CliSettingsSource[Any]:
    return CliSettingsSource(kind, cli_prog_name=program, cli_parse_args=False)
