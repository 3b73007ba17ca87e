"""The tenants: which callers are whose, from a file that is read again when it changes.

docs/operations/security.md has an example. Each table [tenants.NAME] has the identities of a tenant, and its limits.
[default] has the limits of each caller that no table names. Without that table such callers are refused.
"""

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any

from pydantic import ValidationError

from unlatch.common.errors import PermissionDenied
from unlatch.common.security.watched import WatchedFile
from unlatch.common.telemetry.recorder import OTHER
from unlatch.gateway.tenants.quotas import Limits, Tenant

# Metrics name so many of the tenants that the file names; the rest, and all others, are one.
_MOST_LABELS = 100
# Callers that no table names are remembered, idle ones only until so many others have come.
_MOST_OTHERS = 10_000
_MOST_TABLES = 10_000
# Names that a table or a pattern of one has been found to mean.
_MOST_KNOWN = 100_000


class Tenants:
    """Without a file everybody is let in and nothing is limited."""

    def __init__(self, path: str) -> None:
        self.file = WatchedFile(path, self._take) if path else None
        # By tenant, for whoever shares out: the same mapping for ever.
        self.weights: dict[str, float] = {}
        self._default: Limits | None = Limits()
        self._named: dict[str, Tenant] = {}
        self._others: dict[str, Tenant] = {}
        # Of names with * in them.
        self._patterns: list[tuple[str, Tenant]] = []
        self._identities: dict[str, Tenant] = {}

    def of(self, identity: str) -> Tenant:
        """Whose calls this caller's are. Raises PermissionDenied for a caller that is nobody's."""
        found = self._identities.get(identity) or self._others.get(identity)
        if found is not None:
            return found
        for pattern, tenant in self._patterns:
            if fnmatchcase(identity, pattern):
                if len(self._identities) < _MOST_KNOWN:
                    self._identities[identity] = tenant
                return tenant
        if self._default is None:
            raise PermissionDenied("this caller is known, but is none of this gateway's tenants")
        if len(self._others) >= _MOST_OTHERS:
            self._forget()
        made = self._others[identity] = Tenant(self._apart(identity), OTHER, self._default, monotonic())
        return made

    def in_flight(self) -> Mapping[tuple[str, ...], float]:
        """Calls in flight by label, as a gauge reads them: from a scrape's thread."""
        found: dict[tuple[str, ...], float] = {}
        for tenant in [*self._named.copy().values(), *self._others.copy().values()]:
            found[tenant.label,] = found.get((tenant.label,), 0.0) + tenant.in_flight
        return found

    def _apart(self, identity: str) -> str:
        """The name of a tenant that no table makes: never a table's, whose share and runs it would have."""
        return f"~{identity}" if identity in self._named else identity

    def _is_other(self, identity: str) -> bool:
        return identity not in self._identities and not any(fnmatchcase(identity, one) for one, _ in self._patterns)

    def _forget(self) -> None:
        """Let go of half of those without a call in flight, the oldest first."""
        idle = [name for name, tenant in self._others.items() if not tenant.in_flight]
        for name in idle[: _MOST_OTHERS // 2]:
            del self._others[name]

    def _take(self, content: bytes) -> None:
        """The tenants of a file. Raises ValueError."""
        default, tables = _read(content)
        now = monotonic()
        named: dict[str, Tenant] = {}
        identities: dict[str, Tenant] = {}
        patterns: list[tuple[str, Tenant]] = []
        for name, limits in tables.items():
            # One that was there goes on, with what it has in flight, and what it has used up where its limits stay.
            tenant = named[name] = self._named.get(name) or Tenant(name, OTHER, limits, now)
            for identity in limits.identities or (name,):
                if "*" in identity:
                    patterns.append((identity, tenant))
                elif identities.setdefault(identity, tenant) is not tenant:
                    raise ValueError(f"tenants.{name}.identities: {identity!r} is another tenant's too")
        for place, (name, tenant) in enumerate(named.items()):
            tenant.label = name if place < _MOST_LABELS else OTHER
            tenant.limit(tables[name], now)
        self._default, self._named, self._identities, self._patterns = default, named, identities, patterns
        others, self._others = self._others, {}
        if default is not None:
            self._others = {name: tenant for name, tenant in others.items() if self._is_other(name)}
            for name, tenant in self._others.items():
                tenant.name = self._apart(name)
                tenant.limit(default, now)
        self.weights.clear()
        self.weights.update({name: limits.weight for name, limits in tables.items()})


def _read(content: bytes) -> tuple[Limits | None, dict[str, Limits]]:
    """What a file says of everybody else, and of each tenant. Raises ValueError."""
    try:
        said = tomllib.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    if unknown := said.keys() - {"default", "tenants"}:
        raise ValueError(f"there is no table [{min(unknown)}]; there are [default] and [tenants.NAME]")
    tables = said.get("tenants", {})
    if not isinstance(tables, dict) or len(tables) > _MOST_TABLES:
        raise ValueError(f"tenants: wanted tables [tenants.NAME], {_MOST_TABLES} at most")
    default = _limits("default", said["default"]) if "default" in said else None
    return default, {name: _limits(f"tenants.{name}", table) for name, table in tables.items()}


def _limits(where: str, table: Any) -> Limits:
    try:
        return Limits.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in (where, *problem["loc"]))
        raise ValueError(f"{field}: {problem['msg']}") from None
