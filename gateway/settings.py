"""The gateway's settings."""

import socket
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from unlatch.common.net.settings import MiB, ServiceSettings, TenantWeights, separated
from unlatch.gateway.fleet.discovery import is_name, split_name

# What a token may be signed by (RFC 7518, RFC 8037).
ASYMMETRIC = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# Whoever can verify such a token can make one.
_SYMMETRIC = ("HS256", "HS384", "HS512")


class GatewaySettings(ServiceSettings):
    """`unlatch gateway`: the door to a fleet of replicas."""

    listen: str = Field("127.0.0.1:8001", description="Where the Open Inference Protocol and clients' lanes are served")
    metrics_listen: str = Field("127.0.0.1:8002", description="Where Prometheus scrapes /metrics")
    health_listen: str = Field("127.0.0.1:8003", description="Where grpc.health.v1 answers, in plaintext")
    replicas: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.1:8011",),
        min_length=1,
        description="Compute replicas: host:port,unix:/path,dns:///name:port,… (a name: all its addresses)",
    )
    # A new pod gets calls so long after it is in the name's answer; one that left it gets none.
    discovery_seconds: float = Field(3.0, ge=0.05, description="How often names of replicas are looked up")
    # Each costs a lane, and a look when a call is sent.
    max_replicas: int = Field(64, gt=0, description="Most replicas that this gateway opens lanes to")
    # For hundreds of replicas and many gateways: each replica then hears reports and calls of a few.
    replica_subset: int = Field(
        0, ge=0, description="How many of the replicas this gateway takes for its own, by its name; 0 takes all"
    )
    name: str = Field(
        default_factory=socket.gethostname, min_length=1, description="By which this gateway's replicas are chosen"
    )
    tenant_weights: TenantWeights = Field(
        {}, description="Shares between tenants whose calls are held here, as the replicas': name=2,other=0.5"
    )
    # With any of the first three TLS is spoken to replicas, Unix sockets aside. Addresses that a name service gave are
    # in no certificate: the fourth says what is.
    replica_ca: str = Field("", description="A file (PEM): who issues replicas' certificates; else public authorities")
    replica_cert: str = Field("", description="A file (PEM): the certificate shown to replicas")
    replica_key: str = Field("", description="A file (PEM): its private key")
    replica_name: str = Field("", description="The name that replicas' certificates have; else it is their address")

    # A caller that gives no deadline gets the first; one that gives a longer one than the second gets that.
    default_timeout_seconds: float = Field(60.0, gt=0, description="A call's time when its caller sets no deadline")
    max_timeout_seconds: float = Field(3600.0, gt=0, description="Most time that any call gets")
    # One gRPC message stalls the loop while grpcio copies it: up to 50 ms at 32 MiB, 0.1 s at 64; and it is in memory
    # six times. Larger calls belong on a lane.
    max_message_bytes: int = Field(32 * MiB, gt=0, description="Most bytes of one ModelInfer request or response")
    # Together they bound the gateway's memory: it holds a call's bytes until the call has ended.
    max_live_calls: int = Field(20_000, gt=0, description="Most calls that the gateway holds at a time")
    max_live_bytes: int = Field(4096 * MiB, gt=0, description="Most bytes of all calls that the gateway holds")
    # From its descriptor on a call takes room that others could use; one whose bytes stop coming gives it back.
    stalled_call_seconds: float = Field(10.0, gt=0, description="Most time that a call's bytes may stop coming")
    # A caller whose bytes drip holds what has come; 64 MiB at 10 Mbit/s take 54 s.
    message_seconds: float = Field(60.0, gt=0, description="Most time that one ModelInfer request may take to come")
    # What one client's lane may have unanswered; the client holds the rest back.
    window_calls: int = Field(1024, gt=0, description="Most unanswered calls of one client's lane")
    window_bytes: int = Field(1024 * MiB, gt=0, description="Most bytes of one client's unanswered calls")

    # A line takes 30 µs of the loop and 400 bytes: at 5,000 calls a second all of them would be an eighth of the loop,
    # and 2 MB/s to keep. A few a second show what is going on, failures why it does not.
    logged_calls_per_second: float = Field(10.0, ge=0, description="Most calls that ended OK of which the log tells")
    logged_failures_per_second: float = Field(100.0, ge=0, description="Most calls that did not, of which it tells")

    # It costs what is read of calls that turn out to be alone: a fiftieth of their runs at most.
    coalescing: bool = Field(default=True, description="Whether identical calls of pure kernels share a run")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.replica_subset > self.max_replicas:
            raise ValueError(f"--replica-subset {self.replica_subset} is more than --max-replicas {self.max_replicas}")
        return self

    @property
    def most_replicas(self) -> int:
        """How many replicas it has at the most."""
        return self.replica_subset or self.max_replicas

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if bool(self.replica_cert) != bool(self.replica_key):
            raise ValueError("--replica-cert and --replica-key belong together: one was given alone")
        if self.replica_name and not (self.replica_ca or self.replica_cert):
            raise ValueError("--replica-name needs --replica-ca: without TLS no name is verified")
        return self

    # Who calls. Tokens are looked at where there are keys for them; issuer and audience must be said then, since a key
    # may sign for others too.
    token_keys: str = Field("", description="A file (JWKS): the keys that callers' tokens (JWT) are signed with")
    token_issuer: str = Field("", description="Who must have issued a token (iss)")
    token_audience: str = Field("", description="Whom a token must be for (aud)")
    # With a symmetric one whoever can verify a token can make one, so they are to be asked for by name.
    token_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        ASYMMETRIC, min_length=1, description="What tokens may be signed by; HS256, HS384, HS512 only if given here"
    )
    token_leeway_seconds: float = Field(10.0, ge=0, le=300, description="How far clocks may be apart")
    token_tenant_claim: str = Field("sub", min_length=1, description="The claim of a token that names its caller")
    tenants: str = Field("", description="A file (TOML): which callers are whose, and what each tenant may")

    # Any of these has callers say who they are.
    identified_by: ClassVar[tuple[str, ...]] = ("tls_client_ca", "token_keys")

    @model_validator(mode="after")
    def _tokens_whole(self) -> Self:
        if self.token_keys and not (self.token_issuer and self.token_audience):
            raise ValueError("--token-keys needs --token-issuer and --token-audience: a key may sign for others too")
        return self

    @field_validator("token_algorithms")
    @classmethod
    def _known(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        known = (*ASYMMETRIC, *_SYMMETRIC)
        for name in algorithms:
            if name not in known:
                raise ValueError(f"there is no {name[:20]!r}; there are {', '.join(known)}")
        return algorithms

    @field_validator("replicas", "token_algorithms", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        return separated(value)

    @field_validator("replicas")
    @classmethod
    def _readable(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for target in filter(is_name, replicas):
            split_name(target)
        return replicas
