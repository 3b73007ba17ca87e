"""Discovery of replicas: addresses as they were given, and the addresses that names and files stand for now.

    host:port, unix:/path               one replica each
    file:PATH                           the addresses in a file, one on each line, read again when it changes
    dns:///name:port                    every address of the name: a Kubernetes headless service's pods
    dns://server:port/name:port         the same, asked of that server and no other (gRPC's own form of it)
    tenant=TARGET                       the same, for the calls of this tenant only (gateway/fleet/fleets.py)

gRPC looks a name up again only when its connection breaks, so that a pod which joins is never found. Here names are
looked up every few seconds, by c-ares as in gRPC itself: over sockets of the event loop, without threads, with the
search list of /etc/resolv.conf and what /etc/hosts has.

Names and files follow one rule: while they give no address, the addresses that were known last stay. An editor or a
full disk may empty a file for a moment, and a DNS server may forget a name. A replica that is really gone takes no
calls anyway, because its lane is broken. So an old address costs only attempts to connect, and a lost one a fleet.
"""

import asyncio
import codecs
import random
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import NoReturn

import structlog

from unlatch.common.net.addresses import host_and_port, is_unix, unix_name
from unlatch.common.security.files import LOOK_SECONDS, read_apart
from unlatch.common.security.watched import FileError, WatchedFile
from unlatch.gateway.fleet.subset import subset

log = structlog.get_logger()

_NAME = re.compile(r"dns:(?://(?P<server>[^/]*)/)?(?P<name>[^/:\[\]]+):(?P<port>\d{1,5})")
# A host's name or address; an IPv6 address may have a zone.
_HOST = re.compile(r"[\w.:%-]+", re.ASCII)
_FILE = "file:"
# Characters of a message about a wrong line, which it quotes.
_MAX_TOLD = 200
_COMMENT = re.compile(r"(?:^|\s)#.*")
# The time for one server's answer, how often it is asked, and the time for a whole look-up.
_ATTEMPT_SECONDS, _ATTEMPTS, _LOOK_UP_SECONDS = 1.0, 2, 10.0
# The share by which the time between two look-ups varies, so that gateways do not all ask at once.
_JITTER = 0.1


class Discovery:
    """The fleet's addresses. Names are looked up again every `seconds`, and files are looked at every second.

    Of more than `most` addresses the gateway takes its own subset, by its `name`. Where `most` is a `bound`, and no
    subset was asked for, that is logged.
    """

    def __init__(self, targets: Iterable[str], seconds: float, most: int, *, name: str, bound: bool) -> None:
        targets = tuple(targets)
        self._fixed = [target for target in targets if not (is_name(target) or _is_file(target))]
        self._files = [AddressFile(target.removeprefix(_FILE)) for target in targets if _is_file(target)]
        self._names = [Name(target) for target in targets if is_name(target)]
        self._seconds = seconds
        self._most = most
        self._name = name
        self._bound = bound
        self._found = 0
        self._told: list[str] = []

    @property
    def goes_on(self) -> bool:
        """Whether other addresses may be found later."""
        return bool(self._names or self._files)

    async def run(self, tell: Callable[[Sequence[str]], None]) -> NoReturn:
        """Call `tell` with all addresses at once, and again whenever they change, for ever.

        A file that cannot be read in a second is not waited for.
        """
        async with asyncio.TaskGroup() as watching:
            loads = [watching.create_task(file.load()) for file in self._files]
            if loads:
                await asyncio.wait(loads, timeout=LOOK_SECONDS)
            self._tell(tell)
            for file, load in zip(self._files, loads, strict=True):
                watching.create_task(self._watch_file(file, load, tell))
            watching.create_task(self._look_up_names(tell))
        raise AssertionError("all watch for ever")

    async def _watch_file(
        self, file: "AddressFile", load: asyncio.Task[None], tell: Callable[[Sequence[str]], None]
    ) -> NoReturn:
        await load
        while True:
            self._tell(tell)
            await asyncio.sleep(LOOK_SECONDS)
            await file.look()

    async def _look_up_names(self, tell: Callable[[Sequence[str]], None]) -> NoReturn:
        while True:
            await asyncio.gather(*(name.look_up() for name in self._names))
            self._tell(tell)
            await asyncio.sleep(self._seconds * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 (jitter)

    def _tell(self, tell: Callable[[Sequence[str]], None]) -> None:
        sources: list[AddressFile | Name] = [*self._files, *self._names]
        found = dict.fromkeys((*self._fixed, *(address for source in sources for address in source.addresses)))
        chosen = subset(self._name, list(found), self._most)
        if self._bound and len(found) > self._most and len(found) != self._found:
            log.warning("more replicas than max_replicas", found=len(found), max_replicas=self._most)
        self._found = len(found)
        if chosen != self._told:
            self._told = chosen
            tell(chosen)


class AddressFile:
    """A file of addresses, and those that it had when it last had any."""

    def __init__(self, path: str) -> None:
        self.addresses: list[str] = []
        self._path = path
        self._file = WatchedFile("--replicas", path, self._take)

    async def load(self) -> None:
        """Read the file for the first time. It may still be missing: its writer may start after the gateway."""
        try:
            await read_apart(self._path, self._file.load)
        except FileError as error:
            log.warning("file has no replicas yet", message=str(error))

    async def look(self) -> None:
        """Read the file again if it has changed. Where that fails, or gives no address, the known addresses stay."""
        await self._file.look()

    def _take(self, content: bytes) -> None:
        addresses = dict[str, None]()
        for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
            try:
                if address := _COMMENT.sub("", line.decode(errors="surrogateescape")).strip():
                    _check_address(address)
                    addresses[address] = None
            except ValueError as error:
                log.error(
                    "line not used, other lines are", path=self._path, line=number, message=str(error)[:_MAX_TOLD]
                )
        if not addresses:
            raise ValueError("no line of it has an address")
        self.addresses = list(addresses)


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
        # Imported here, since only names need c-ares, which takes 25 ms.
        import aiodns

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


def by_tenant(targets: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Targets by the tenant whose own they are; those under "" serve all tenants that have none of their own."""
    found: dict[str, tuple[str, ...]] = {}
    for target in targets:
        tenant, separator, own = target.partition("=")
        # A path may have the sign, too.
        tenant, own = (tenant, own) if separator and not (is_unix(tenant) or _is_file(tenant)) else ("", target)
        found[tenant] = (*found.get(tenant, ()), own)
    return found


def is_name(target: str) -> bool:
    """Whether a target is a name to look up, and no address."""
    return target.startswith("dns:")


def _is_file(target: str) -> bool:
    return target.startswith(_FILE)


def check_target(target: str) -> None:
    """Raise ValueError if a target is neither an address, nor a name, nor a file."""
    if is_name(target):
        split_name(target)
    elif not _is_file(target):
        _check_address(target)
    elif target == _FILE:
        raise ValueError(f"wanted {_FILE}PATH, got no path")


def _check_address(address: str) -> None:
    if is_unix(address):
        name = unix_name(address).removeprefix("\0")
        right = bool(name) and name.isprintable()
    else:
        host, port = host_and_port(address)
        right = _HOST.fullmatch(host) is not None and port > 0
    if not right:
        raise ValueError(f"wanted host:port, [IPv6]:port or unix:/path of a replica, got {address!r}")


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
