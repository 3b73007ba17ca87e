"""The tenants: which callers belong to which tenant, from a file that is read again when it changes.

docs/operations/security.md has an example. Each table [tenants.NAME] has the identities of a tenant, and its limits.
[default] has the limits of each caller that no table names. Without that table such callers are refused.
"""

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from time import monotonic
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from unlatch.common.errors import PermissionDenied, near, shown
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.security.watched import WatchedFile
from unlatch.common.telemetry.recorder import OTHER
from unlatch.gateway.tenants.quotas import QuotaLimits, Tenant
from unlatch.gateway.tenants.shared_quotas import UnitTenant
from unlatch.gateway.tenants.shared_usage import SharedUsage

# The tenants of the file that metrics name; the rest, and all callers that no table names, are counted together.
_MAX_LABELS = 100
# Callers that no table names are remembered, idle ones only until this many have come.
_MAX_OTHERS = 10_000
_MAX_TABLES = 10_000
_OTHERS = "~"
# Remembered identities that a table or a pattern was found for.
_MAX_KNOWN = 100_000
# What TOML calls the types that a field may have, by the code of the error for another type.
_WANTED = {"model_type": "a table", "tuple_type": "a list"}


class Tenants:
    """The tenants by identity. Without a file every caller is accepted, and nothing is limited.

    `held` counts the bytes that all tenants make the gateway hold. `weights` are the shares of tenants for which the
    file has none. `usage` is where the units of a machine count together, if there are several.
    """

    def __init__(
        self,
        path: str,
        held: HeldBytes,
        weights: Mapping[str, float] = MappingProxyType({}),
        usage: SharedUsage | None = None,
    ) -> None:
        self._held = held
        self._usage = usage
        self.file = WatchedFile("--tenants", path, self._take) if path else None
        # By tenant. Always the same mapping, because the fleet keeps a reference to it.
        self.weights = dict(weights)
        self._weights_beside_file = weights
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
            raise PermissionDenied("this caller belongs to no tenant of this gateway")
        if len(self._others) >= _MAX_OTHERS:
            self._forget()
        made = self._new(self._apart(identity), self._default, monotonic(), f"caller {identity}")
        self._others[identity] = made
        return made

    def in_flight(self) -> Mapping[tuple[str, ...], float]:
        """Calls in flight by label. A gauge reads it, from the thread of a scrape."""
        found: dict[tuple[str, ...], float] = {}
        for tenant in [*self._named.copy().values(), *self._others.copy().values()]:
            found[tenant.label,] = found.get((tenant.label,), 0.0) + tenant.in_flight
        return found

    def _new(self, name: str, limits: QuotaLimits, now: float, key: str) -> Tenant:
        """Make a tenant. `key` stays its own, also where `_apart` gives a caller another name."""
        if self._usage is None:
            return Tenant(name, OTHER, limits, now, self._held)
        return UnitTenant(name, OTHER, limits, now, self._held, self._usage, key)

    def _apart(self, identity: str) -> str:
        """Return the tenant name of a caller without a table. It differs from all tables and from other callers."""
        return _OTHERS + identity if identity in self._named or identity.startswith(_OTHERS) else identity

    def _is_other(self, identity: str) -> bool:
        return identity not in self._identities and not any(fnmatchcase(identity, one) for one, _ in self._patterns)

    def _forget(self) -> None:
        """Forget half of the callers without a table for whom nothing is held, the oldest first."""
        held = {name for name, tenant in self._others.items() if tenant.live_calls or tenant.held.held or tenant.lanes}
        idle = [name for name in self._others if name not in held]
        for name in idle[: _MAX_OTHERS // 2]:
            self._others.pop(name).forget()

    def _take(self, content: bytes) -> None:
        """Replace the tenants by those of a file. Raises ValueError."""
        default, tables = _read(content)
        owners, patterns = _by_identity(tables)
        # From here on nothing raises: the file is valid.
        now = monotonic()
        before, named = self._named, dict[str, Tenant]()
        for place, (name, limits) in enumerate(tables.items()):
            # A tenant that was there before keeps its calls in flight, and what it has used where its limits stay.
            tenant = before.pop(name) if name in before else self._new(name, limits, now, f"table {name}")
            named[name] = tenant
            tenant.label = name if place < _MAX_LABELS else OTHER
            tenant.limit(limits, now)
        for gone in before.values():
            gone.forget()
        self._default, self._named = default, named
        self._identities = {identity: named[name] for identity, name in owners.items()}
        self._patterns = [(pattern, named[name]) for pattern, name in patterns]
        self._keep_others(default, now)
        self.weights.clear()
        self.weights.update(self._weights_beside_file)
        self.weights.update({name: limits.weight for name, limits in tables.items()})

    def _keep_others(self, default: QuotaLimits | None, now: float) -> None:
        """Keep the callers that no table names, where there still are default limits for them."""
        others, self._others = self._others, {}
        for name, tenant in others.items():
            if default is None or not self._is_other(name):
                tenant.forget()
                continue
            self._others[name] = tenant
            tenant.name = self._apart(name)
            tenant.limit(default, now)


def _by_identity(tables: Mapping[str, QuotaLimits]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The tenants' names by identity, and by identities with * in them. Raises ValueError where two have the same."""
    identities: dict[str, str] = {}
    patterns: list[tuple[str, str]] = []
    for name, limits in tables.items():
        for identity in limits.identities or (name,):
            if "*" in identity:
                patterns.append((identity, name))
            elif identities.setdefault(identity, name) != name:
                raise ValueError(f"tenants.{name}.identities: {identity!r} also belongs to another tenant")
    return identities, patterns


def _read(content: bytes) -> tuple[QuotaLimits | None, dict[str, QuotaLimits]]:
    """The default limits of a file, and the limits of each tenant. Raises ValueError."""
    try:
        said = tomllib.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"not valid TOML: {error}") from None
    if unknown := said.keys() - {"default", "tenants"}:
        raise ValueError(f"unknown table [{min(unknown)}]; wanted [default] or [tenants.NAME]")
    tables = said.get("tenants", {})
    if not isinstance(tables, dict) or len(tables) > _MAX_TABLES:
        raise ValueError(f"tenants: wanted tables [tenants.NAME], {_MAX_TABLES} at most")
    for name in tables:
        # The names of callers without a table, and the label that metrics give them.
        if name.startswith(_OTHERS) or name == OTHER:
            raise ValueError(f"tenants.{name}: a tenant's name is not {OTHER!r}, and does not begin with {_OTHERS}")
    default = _limits("default", said["default"]) if "default" in said else None
    return default, {name: _limits(f"tenants.{name}", table) for name, table in tables.items()}


def _limits(where: str, table: Any) -> QuotaLimits:
    try:
        return QuotaLimits.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in (where, *problem["loc"]))
        raise ValueError(f"{field}: {_told(problem)}") from None


def _told(problem: ErrorDetails) -> str:
    """Return what is wrong with a table, or with one of its fields."""
    if problem["type"] == "extra_forbidden":
        return f"unknown field{near(str(problem['loc'][-1]), QuotaLimits.model_fields)}"
    wanted = _WANTED.get(problem["type"])
    return problem["msg"] if wanted is None else f"wanted {wanted}, got {shown(problem['input'])}"
