"""The gateway's settings."""

import socket
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from unlatch.common.net.settings import Address, MiB, ServiceSettings, Several, TcpAddress, TenantWeights
from unlatch.gateway.fleet.discovery import by_tenant, check_target

# Signature algorithms of tokens (RFC 7518, RFC 8037).
ASYMMETRIC = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# The key that verifies such a token can also sign one.
_SYMMETRIC = ("HS256", "HS384", "HS512")


class GatewaySettings(ServiceSettings):
    """`unlatch gateway`: the entry to a fleet of replicas."""

    listen: Address = Field("127.0.0.1:8001", description="Address for Open Inference Protocol calls and client lanes")
    metrics_listen: TcpAddress = Field("127.0.0.1:8002", description="Address of /metrics, for Prometheus")
    health_listen: Address = Field("127.0.0.1:8003", description="Address of grpc.health.v1, in plaintext")
    # Less than half of a drain: callers leave their connections before they would be refused. A new connection costs a
    # gateway some 0.1 ms, and 2 ms with TLS. So thousands of them want both to be longer.
    connection_seconds: float = Field(10.0, gt=0, description="Seconds until callers open another connection")
    replicas: Several = Field(
        ("127.0.0.1:8011",),
        min_length=1,
        description="Compute replicas: host:port,unix:/path,dns:///name:port,file:PATH,… (a name stands for all its "
        "addresses, a file has an address on each line); tenant=host:port,… for calls of that tenant only",
    )
    # A new pod gets its first calls, and one that has left its last, up to this long after the DNS answer changed.
    discovery_seconds: float = Field(3.0, ge=0.05, description="Seconds between DNS lookups of replica names")
    # As long as a replica takes to start again. A replica that has taken the place of the last one of a name may not be
    # found for as long as resolvers cache their answers: 30 s, often.
    hold_seconds: float = Field(
        10.0, ge=0, description="Seconds for which calls wait if no replica takes calls; 0 refuses them at once"
    )
    max_held_calls: int = Field(10_000, ge=0, description="Maximum calls that wait because no replica takes calls")
    max_held_bytes: int = Field(512 * MiB, ge=0, description="Maximum bytes of calls that wait for any replica")
    # Each replica costs a lane, and one comparison for each call that is sent.
    max_replicas: int = Field(64, gt=0, description="Maximum replicas that this gateway opens lanes to")
    # For hundreds of replicas and many gateways: each replica then has lanes to a few gateways only.
    replica_subset: int = Field(
        0, ge=0, description="Number of replicas that this gateway uses, chosen by its --name; 0 uses all"
    )
    name: str = Field(
        default_factory=socket.gethostname, min_length=1, description="Name by which --replica-subset chooses replicas"
    )
    tenant_weights: TenantWeights = Field(
        {}, description="Weights of tenants whose calls wait in this gateway: name=2,other=0.5; 1 for tenants not named"
    )
    # Any of the first three makes the gateway speak TLS to replicas, except on Unix sockets. Certificates do not
    # contain the addresses that DNS returns, so the fourth gives the name that they do contain.
    replica_ca: str = Field(
        "", description="PEM file: authorities of replicas' certificates; without it, the public ones"
    )
    replica_cert: str = Field("", description="PEM file: certificate shown to replicas")
    replica_key: str = Field("", description="PEM file: private key of --replica-cert")
    replica_name: str = Field("", description="Host name in replicas' certificates; without it, their address")

    # A caller that sets no deadline gets the first. A caller whose deadline is longer than the second gets the second.
    default_timeout_seconds: float = Field(60.0, gt=0, description="Timeout in seconds of a call without a deadline")
    max_timeout_seconds: float = Field(3600.0, gt=0, description="Maximum timeout in seconds of any call")
    # A gRPC message stalls the loop while grpcio copies it (up to 50 ms at 32 MiB, 0.1 s at 64 MiB), and is in memory
    # six times. Larger calls belong on a lane.
    max_message_bytes: int = Field(32 * MiB, gt=0, description="Maximum bytes of one ModelInfer request or response")
    # These two bound the gateway's memory: it holds a call's bytes until the call has ended.
    max_live_calls: int = Field(20_000, gt=0, description="Maximum calls held by the gateway at a time")
    max_live_bytes: int = Field(4096 * MiB, gt=0, description="Maximum bytes of all calls held by the gateway")
    # A call takes room that others could use from its descriptor on. A call whose bytes stop arriving gives it back.
    stalled_call_seconds: float = Field(10.0, gt=0, description="Maximum seconds between arrivals of a call's bytes")
    # A caller that sends slowly holds the memory of what has arrived; 64 MiB at 10 Mbit/s take 54 s.
    message_seconds: float = Field(60.0, gt=0, description="Maximum seconds for a ModelInfer request to arrive")
    # By parts of grpcio that are not its public API, if the installed version has them (docs/decisions/0027).
    accept_ahead: bool = Field(default=True, description="Accept several ModelInfer calls at a time")
    # An idle lane takes some 100 KiB.
    max_lanes: int = Field(4096, gt=0, description="Maximum open lanes of clients")
    # The window of one client's lane; the client holds back what exceeds it.
    window_calls: int = Field(1024, gt=0, description="Maximum unanswered calls of one client lane")
    window_bytes: int = Field(1024 * MiB, gt=0, description="Maximum bytes of one client lane's unanswered calls")

    # A log line takes 30 µs of the loop and 400 bytes: one for each of 5,000 calls a second would take an eighth of the
    # loop and 2 MB/s of storage. A few lines a second show what is going on; lines of failures show what goes wrong.
    logged_calls_per_second: float = Field(10.0, ge=0, description="Maximum logged calls a second that ended OK")
    logged_failures_per_second: float = Field(100.0, ge=0, description="Maximum logged calls a second that failed")

    # Coalescing hashes calls that may turn out to have no twin, which costs at most a fiftieth of their run time.
    coalescing: bool = Field(default=True, description="Let identical calls of a pure kernel share one run")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.replica_subset > self.max_replicas:
            raise ValueError(f"--replica-subset {self.replica_subset} is more than --max-replicas {self.max_replicas}")
        return self

    @property
    def most_replicas(self) -> int:
        """The maximum number of replicas that this gateway uses."""
        return self.replica_subset or self.max_replicas

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if bool(self.replica_cert) != bool(self.replica_key):
            raise ValueError("--replica-cert and --replica-key must be given together: one is missing")
        if self.replica_name and not (self.replica_ca or self.replica_cert):
            raise ValueError("--replica-name needs --replica-ca or --replica-cert: without TLS no name is verified")
        return self

    # Authentication of callers. Tokens are checked if --token-keys is given. Issuer and audience are required then,
    # since a key may also sign tokens for other services.
    token_keys: str = Field("", description="JWKS file: keys that sign callers' tokens (JWT)")
    token_issuer: str = Field("", description="Required issuer (iss) of a token")
    token_audience: str = Field("", description="Required audience (aud) of a token")
    # A key of a symmetric algorithm can both verify and sign tokens, so these must be asked for by name.
    token_algorithms: Several = Field(
        ASYMMETRIC, min_length=1, description="Accepted signature algorithms; HS256, HS384 and HS512 only if listed"
    )
    token_leeway_seconds: float = Field(10.0, ge=0, le=300, description="Allowed clock skew in seconds, for tokens")
    token_tenant_claim: str = Field("sub", min_length=1, description="Token claim that names the caller")
    tenants: str = Field("", description="TOML file: the callers and the limits of each tenant")

    # Each of these settings makes callers authenticate.
    identified_by: ClassVar[tuple[str, ...]] = ("tls_client_ca", "token_keys")

    @model_validator(mode="after")
    def _tokens_whole(self) -> Self:
        if self.token_keys and not (self.token_issuer and self.token_audience):
            raise ValueError("--token-keys needs --token-issuer and --token-audience: a key may sign for others too")
        return self

    @model_validator(mode="after")
    def _tenants_known(self) -> Self:
        own = [tenant for tenant in by_tenant(self.replicas) if tenant]
        if own and not any(getattr(self, name) for name in self.identified_by):
            raise ValueError(f"--replicas {own[0]}=… needs --token-keys or --tls-client-ca: else no caller is known")
        return self

    @field_validator("token_algorithms")
    @classmethod
    def _known(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        known = (*ASYMMETRIC, *_SYMMETRIC)
        for name in algorithms:
            if name not in known:
                raise ValueError(f"unknown algorithm {name[:20]!r}; known are {', '.join(known)}")
        return algorithms

    @field_validator("replicas")
    @classmethod
    def _readable(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for tenant, targets in by_tenant(replicas).items():
            if "" in targets:
                raise ValueError(f"wanted tenant=host:port, got no address after {tenant}=")
            for target in targets:
                check_target(target)
        return replicas
