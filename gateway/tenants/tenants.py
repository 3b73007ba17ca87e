"""The tenants: which callers belong to which tenant, from a file that is read again when it changes.

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
from unlatch.gateway.tenants.quotas import QuotaLimits, Tenant

# The tenants of the file that metrics name; the rest, and all callers that no table names, are counted together.
_MAX_LABELS = 100
# Callers that no table names are remembered, idle ones only until this many have come.
_MAX_OTHERS = 10_000
_MAX_TABLES = 10_000
# Remembered identities that a table or a pattern was found for.
_MAX_KNOWN = 100_000


class Tenants:
    """The tenants by identity. Without a file every caller is let in and nothing is limited."""

    def __init__(self, path: str) -> None:
        self.file = WatchedFile(path, self._take) if path else None
        # By tenant. Always the same mapping: the fleet keeps it, and reads the weights as they are.
        self.weights: dict[str, float] = {}
        self._default: QuotaLimits | None = QuotaLimits()
        self._named: dict[str, Tenant] = {}
        self._others: dict[str, Tenant] = {}
        # For identities with * in them.
        self._patterns: list[tuple[str, Tenant]] = []
        self._identities: dict[str, Tenant] = {}

    def of(self, identity: str) -> Tenant:
        """The tenant of an identity. Raises PermissionDenied if it has none."""
        found = self._identities.get(identity) or self._others.get(identity)
        if found is not None:
            return found
        for pattern, tenant in self._patterns:
            if fnmatchcase(identity, pattern):
                if len(self._identities) < _MAX_KNOWN:
                    self._identities[identity] = tenant
                return tenant
        if self._default is None:
            raise PermissionDenied("this caller is known, but is none of this gateway's tenants")
        if len(self._others) >= _MAX_OTHERS:
            self._forget()
        made = self._others[identity] = Tenant(self._apart(identity), OTHER, self._default, monotonic())
        return made

    def in_flight(self) -> Mapping[tuple[str, ...], float]:
        """Calls in flight by label. A gauge reads it, from the thread of a scrape."""
        found: dict[tuple[str, ...], float] = {}
        for tenant in [*self._named.copy().values(), *self._others.copy().values()]:
            found[tenant.label,] = found.get((tenant.label,), 0.0) + tenant.in_flight
        return found

    def _apart(self, identity: str) -> str:
        """The name of a tenant without a table: never that of a table, whose share and runs it would have."""
        return f"~{identity}" if identity in self._named else identity

    def _is_other(self, identity: str) -> bool:
        return identity not in self._identities and not any(fnmatchcase(identity, one) for one, _ in self._patterns)

    def _forget(self) -> None:
        """Forget half of the callers without a table and without a call in flight, the oldest first."""
        idle = [name for name, tenant in self._others.items() if not tenant.in_flight]
        for name in idle[: _MAX_OTHERS // 2]:
            del self._others[name]

    def _take(self, content: bytes) -> None:
        """Take the tenants of a file. Raises ValueError."""
        default, tables = _read(content)
        now = monotonic()
        # A tenant that was there before keeps its calls in flight, and what it has used where its limits stay.
        named = {name: self._named.get(name) or Tenant(name, OTHER, limits, now) for name, limits in tables.items()}
        identities, patterns = _by_identity(named, tables)
        # From here on the file holds.
        for place, (name, tenant) in enumerate(named.items()):
            tenant.label = name if place < _MAX_LABELS else OTHER
            tenant.limit(tables[name], now)
        self._default, self._named, self._identities, self._patterns = default, named, identities, patterns
        self._keep_others(default, now)
        self.weights.clear()
        self.weights.update({name: limits.weight for name, limits in tables.items()})

    def _keep_others(self, default: QuotaLimits | None, now: float) -> None:
        """Keep the callers that no table names, where there still are default limits for them."""
        others, self._others = self._others, {}
        if default is None:
            return
        self._others = {name: tenant for name, tenant in others.items() if self._is_other(name)}
        for name, tenant in self._others.items():
            tenant.name = self._apart(name)
            tenant.limit(default, now)


def _by_identity(
    named: Mapping[str, Tenant], tables: Mapping[str, QuotaLimits]
) -> tuple[dict[str, Tenant], list[tuple[str, Tenant]]]:
    """The tenants by identity, and by identities with * in them. Raises ValueError where two have the same."""
    identities: dict[str, Tenant] = {}
    patterns: list[tuple[str, Tenant]] = []
    for name, tenant in named.items():
        for identity in tables[name].identities or (name,):
            if "*" in identity:
                patterns.append((identity, tenant))
            elif identities.setdefault(identity, tenant) is not tenant:
                raise ValueError(f"tenants.{name}.identities: {identity!r} is another tenant's too")
    return identities, patterns


def _read(content: bytes) -> tuple[QuotaLimits | None, dict[str, QuotaLimits]]:
    """The default limits of a file, and the limits of each tenant. Raises ValueError."""
    try:
        said = tomllib.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    if unknown := said.keys() - {"default", "tenants"}:
        raise ValueError(f"there is no table [{min(unknown)}]; there are [default] and [tenants.NAME]")
    tables = said.get("tenants", {})
    if not isinstance(tables, dict) or len(tables) > _MAX_TABLES:
        raise ValueError(f"tenants: wanted tables [tenants.NAME], {_MAX_TABLES} at most")
    default = _limits("default", said["default"]) if "default" in said else None
    return default, {name: _limits(f"tenants.{name}", table) for name, table in tables.items()}


def _limits(where: str, table: Any) -> QuotaLimits:
    try:
        return QuotaLimits.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in (where, *problem["loc"]))
        raise ValueError(f"{field}: {problem['msg']}") from None
