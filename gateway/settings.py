"""The gateway's settings."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from common.settings import MiB, Settings, separated


class GatewaySettings(Settings):
    """`unlatch gateway`: the door to a fleet of replicas."""

    listen: str = Field("127.0.0.1:8001", description="Where the Open Inference Protocol and clients' lanes are served")
    metrics_listen: str = Field("127.0.0.1:8002", description="Where Prometheus scrapes /metrics")
    health_listen: str = Field("127.0.0.1:8003", description="Where grpc.health.v1 answers, in plaintext")
    replicas: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.1:8011",), min_length=1, description="Compute replicas: host:port,unix:/path,…"
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
    # What one client's lane may have unanswered; the client holds the rest back.
    window_calls: int = Field(1024, gt=0, description="Most unanswered calls of one client's lane")
    window_bytes: int = Field(1024 * MiB, gt=0, description="Most bytes of one client's unanswered calls")

    # A line takes 30 µs of the loop and 400 bytes: at 5,000 calls a second all of them would be an eighth of the loop,
    # and 2 MB/s to keep. A few a second show what is going on, failures why it does not.
    logged_calls_per_second: float = Field(10.0, ge=0, description="Most calls that ended OK of which the log tells")
    logged_failures_per_second: float = Field(100.0, ge=0, description="Most calls that did not, of which it tells")

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if bool(self.replica_cert) != bool(self.replica_key):
            raise ValueError("--replica-cert and --replica-key belong together: one was given alone")
        if self.replica_name and not (self.replica_ca or self.replica_cert):
            raise ValueError("--replica-name needs --replica-ca: without TLS no name is verified")
        return self

    @field_validator("replicas", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        return separated(value)
