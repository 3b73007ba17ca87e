"""Discovery of replicas: addresses as they were given, and the addresses that names stand for now.

    host:port, unix:/path               one replica each
    dns:///name:port                    every address of the name: a Kubernetes headless service's pods
    dns://server:port/name:port         the same, asked of that server and no other (gRPC's own form of it)

gRPC looks a name up again only when its connection breaks, so that a pod which joins is never found. Here names are
looked up every few seconds, by c-ares as in gRPC itself: over sockets of the event loop, without threads, with the
search list of /etc/resolv.conf and what /etc/hosts has.
"""

import asyncio
import random
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import NoReturn

import aiodns
import structlog

from unlatch.gateway.fleet.subset import subset

log = structlog.get_logger()

_NAME = re.compile(r"dns:(?://(?P<server>[^/]*)/)?(?P<name>[^/:\[\]]+):(?P<port>\d{1,5})")
# The time for one server's answer, how often it is asked, and the time for a whole look-up.
_ATTEMPT_SECONDS, _ATTEMPTS, _LOOK_UP_SECONDS = 1.0, 2, 10.0
# The share by which the time between two look-ups varies, so that gateways do not all ask at once.
_JITTER = 0.1


class Discovery:
    """The fleet's addresses. Names are looked up again every `seconds`.

    Of more than `most` addresses the gateway takes its own subset, by its `name`. Where `most` is a `bound`, and no
    subset was asked for, that is logged.
    """

    def __init__(self, targets: Iterable[str], seconds: float, most: int, *, name: str, bound: bool) -> None:
        targets = tuple(targets)
        self._fixed = [target for target in targets if not is_name(target)]
        self._names = [Name(target) for target in targets if is_name(target)]
        self._seconds = seconds
        self._most = most
        self._name = name
        self._bound = bound
        self._found = 0
        self._told: list[str] = []

    async def run(self, tell: Callable[[Sequence[str]], None]) -> NoReturn:
        """Call `tell` with all addresses at once, and again whenever they change, for ever."""
        self._tell(tell)
        while True:
            await asyncio.gather(*(name.look_up() for name in self._names))
            self._tell(tell)
            await asyncio.sleep(self._seconds * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 (jitter)

    def _tell(self, tell: Callable[[Sequence[str]], None]) -> None:
        found = dict.fromkeys((*self._fixed, *(address for name in self._names for address in name.addresses)))
        chosen = subset(self._name, list(found), self._most)
        if self._bound and len(found) > self._most and len(found) != self._found:
            log.warning("more replicas than max_replicas", found=len(found), max_replicas=self._most)
        self._found = len(found)
        if chosen != self._told:
            self._told = chosen
            tell(chosen)


class Name:
    """A name, and the addresses that its last successful look-up gave."""

    def __init__(self, target: str) -> None:
        server, self._name, port = split_name(target)
        self.addresses: list[str] = []
        self._target = target
        self._port = int(port)
        self._server = server
        self._fails = False

    async def look_up(self) -> None:
        """Look the name up. Where that fails, or gives no address, the known addresses stay."""
        # A new resolver each time: one that is kept caches, by rules of its own, even that there is no address.
        servers = [self._server] if self._server else None
        resolver = aiodns.DNSResolver(servers, timeout=_ATTEMPT_SECONDS, tries=_ATTEMPTS)
        try:
            async with asyncio.timeout(_LOOK_UP_SECONDS):
                found = await resolver.getaddrinfo(self._name, port=self._port, type=socket.SOCK_STREAM)
        except (aiodns.error.DNSError, OSError) as error:
            self._failed(str(error.args[-1]) if error.args else "no answer")
            return
        finally:
            await resolver.close()
        addresses = [_address(node.addr[0], self._port) for node in found.nodes]
        if not addresses:
            self._failed("the name has no address")
            return
        self.addresses = sorted(set(addresses))
        if self._fails:
            self._fails = False
            log.info("name is found again", name=self._target, addresses=len(addresses))

    def _failed(self, reason: str) -> None:
        # Logged once, and not every few seconds.
        if not self._fails:
            self._fails = True
            log.warning("name is not found", name=self._target, message=reason, known_addresses=len(self.addresses))


def is_name(target: str) -> bool:
    """Whether a target is a name to look up, and no address."""
    return target.startswith("dns:")


def split_name(target: str) -> tuple[str, str, str]:
    """The server to ask ("" for the system's), the name and the port. Raises ValueError."""
    match = _NAME.fullmatch(target)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"a name of replicas is dns:///name:port or dns://server:port/name:port, not {target}")
    if match["server"]:
        # The server must be an address: there is no other server to look its name up.
        ip_address(match["server"].rpartition(":")[0].strip("[]") or match["server"])
    return match["server"] or "", match["name"], match["port"]


def _address(host: bytes | str, port: int) -> str:
    text = host.decode() if isinstance(host, bytes) else host
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
