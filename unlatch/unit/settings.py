"""The settings of `unlatch serve`, and those that they are for its gateway and its replica."""

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import Field, model_validator

from unlatch.common.machine.cgroups import granted_cores
from unlatch.common.net.addresses import is_unix
from unlatch.common.net.settings import Address, Settings, Several, TcpAddress, flag, parse
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings
from unlatch.unit.place import Place

PROGRAM = "unlatch serve"
# Settings of a gateway that finds its replicas on a network.
_OF_OTHER_REPLICAS = (
    *("replicas", "discovery_seconds", "max_replicas", "replica_subset"),
    *("replica_ca", "replica_cert", "replica_key", "replica_name"),
)
# The address by which the gateway of a unit that is alone knows its replica, which listens nowhere.
LOCAL = "unix:local"
# With kernels of 2 ms, this number of workers keeps one event loop busy (docs/decisions/0028).
_WORKERS_OF_A_UNIT = 6
# What holds for all units together and is divided among them. Gateways count their other bounds together.
_DIVIDED_RATES = ("logged_calls_per_second", "logged_failures_per_second")
_DIVIDED_AMONG_REPLICAS = ("input_arena_bytes", "max_queued_calls")


class ServeSettings(Settings):
    """`unlatch serve`: gateway and compute on this machine."""

    without_effect = dict.fromkeys(_OF_OTHER_REPLICAS, f"the replica of {PROGRAM} is in the same process")
    passed_on = frozenset({**GatewaySettings.model_fields, **ComputeSettings.model_fields}) - frozenset(without_effect)
    # Callers may authenticate by tokens, which are settings of the gateway.
    identified_by = ()

    listen: Address = Field("127.0.0.1:8001", description="Address for callers: host:port or unix:/path")
    metrics_listen: TcpAddress = Field("127.0.0.1:8002", description="Address of /metrics, for Prometheus")
    health_listen: Address = Field("127.0.0.1:8003", description="Address of grpc.health.v1, in plaintext")
    kernels: Several = Field((), description="Kernel modules besides the built-in ones: pkg.module,path/to/file.py")
    workers: int = Field(0, ge=0, le=1024, description="Worker processes; 0 is one for each granted core")
    worker_python: str = Field("", description="Python interpreter of the workers; by default the service's own")
    # A unit answers some 2,500 small calls a second (docs/decisions/0028).
    units: int = Field(0, ge=0, le=64, description="Processes that serve callers; 0 is one for every six workers")
    reload: bool = Field(default=False, description="Reload kernels when their files change; for development")
    # A user waits for the prompt to return, two seconds at most, of which closing the service takes 0.7. A replica in
    # a cluster has twenty.
    drain_seconds: float = Field(0.5, ge=0, description="Maximum seconds for calls in flight to end after SIGTERM")

    @property
    def worker_count(self) -> int:
        """The number of workers of all units, at least one."""
        return self.workers or granted_cores()

    @property
    def unit_count(self) -> int:
        """The number of units, at least one."""
        if self.units or is_unix(self.listen) or is_unix(self.health_listen):
            return self.units or 1
        return max(1, self.worker_count // _WORKERS_OF_A_UNIT)

    @model_validator(mode="after")
    def _units_possible(self) -> Self:
        if self.units > self.worker_count:
            raise ValueError(
                f"--units {self.units} is more than the workers ({self.worker_count}): each unit needs one"
            )
        for name in ("listen", "health_listen"):
            if self.units > 1 and is_unix(getattr(self, name)):
                raise ValueError(f"{flag(name)} {getattr(self, name)}: several units need host:port, or give --units 1")
        return self


def services(
    settings: ServeSettings, environment: Mapping[str, str], place: Place | None = None
) -> tuple[GatewaySettings, ComputeSettings]:
    """Return the settings of a unit's gateway and replica. Exits with code 2 for wrong variables."""
    gateway = parse(GatewaySettings, PROGRAM, _flags(settings, GatewaySettings, replicas=LOCAL), environment)
    compute = parse(ComputeSettings, PROGRAM, _flags(settings, ComputeSettings, listen=LOCAL), environment)
    return (gateway, compute) if place is None else (_gateway_of(gateway, place), _compute_of(compute, place))


def _gateway_of(settings: GatewaySettings, place: Place) -> GatewaySettings:
    """The settings of one unit's gateway: it has the replicas of all units, and its share of what is logged."""
    rates = {name: getattr(settings, name) / place.units for name in _DIVIDED_RATES}
    own = {
        # Its own replica too has the address that siblings know it by, and with it the same label in metrics.
        "replicas": tuple(map(place.lanes, range(place.units))),
        "listen": place.listen,
        "health_listen": place.health_listen,
        "metrics_listen": place.metrics(place.number),
    }
    return settings.model_copy(update=rates | own)


def _compute_of(settings: ComputeSettings, place: Place) -> ComputeSettings:
    """The settings of one unit's replica: its share of the workers, and of what is bounded."""
    shares = {name: place.share(value) for name in _DIVIDED_AMONG_REPLICAS if (value := getattr(settings, name))}
    own = {
        "name": f"{settings.name}-{place.number}",
        "workers": place.share(settings.worker_count),
        "blas_threads": settings.worker_blas_threads,
    }
    return settings.model_copy(update=shares | own)


def _flags(settings: ServeSettings, kind: type[Settings], **own: str) -> Sequence[str]:
    """A service's flags: the settings that it shares with `serve`, and its own."""
    shared = {name: getattr(settings, name) for name in ServeSettings.model_fields if name in kind.model_fields}
    return [_as_flag(name, value) for name, value in (shared | own).items()]


def _as_flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)}={','.join(value) if isinstance(value, tuple) else value}"
