"""Bytes that callers make a service hold: counted until they are gone, against bounds.

Requests and replies of calls, what describes them, and messages that wait for a caller who reads slowly all count.
"""

import math

from unlatch.common.errors import ResourceExhausted

_RETRY_MILLISECONDS = 100


def share(most: float, held: float, own: float) -> float:
    """Return how much of a common bound one tenant may take: half of what the other tenants leave of it.

    `most` is the bound, `held` is what all tenants have of it, and `own` is this tenant's part of that. A tenant alone
    may take a half. Two that take all they may have a third each, and a third is free for the next one.
    """
    return (most - (held - own)) / 2


class HeldBytes:
    """Count the bytes that are held for some callers, up to `max_bytes`. `bound` is the setting that says how many.

    Where `max_bytes` is None they may take their share of what `within` may hold.

    A count may be a part of another: a lane's of its tenant's, a tenant's of the whole service's. Bytes that are held
    here are held in `within` too, and against its bound. `quota` names the tenant that has the bound, if one has it.
    """

    __slots__ = ("bound", "counts", "held", "max_bytes", "quota")

    def __init__(
        self, bound: str = "", max_bytes: float | None = math.inf, within: "HeldBytes | None" = None, *, quota: str = ""
    ) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self.bound = bound
        self.quota = quota
        # This count, and those that it is a part of.
        self.counts: tuple[HeldBytes, ...] = (self,) if within is None else (self, *within.counts)

    def check(self, size: int) -> None:
        """Raise ResourceExhausted where `size` more bytes would be too many."""
        for count in self.counts:
            if count.held + size > count.most:
                raise ResourceExhausted(
                    f"{size} bytes do not fit: calls hold {count.use}",
                    retry_after_milliseconds=_RETRY_MILLISECONDS,
                    quota=count.quota,
                )

    def charge(self, size: int, instead_of: int = 0) -> None:
        """Hold `size` bytes in place of `instead_of`. Raises ResourceExhausted where they would be too many."""
        if size > instead_of:
            self.check(size - instead_of)
        self.hold(size - instead_of)

    def hold(self, size: int) -> None:
        """Hold `size` bytes more, whatever the bound: they are here already, and cannot be refused."""
        for count in self.counts:
            count.held += size

    def free(self, size: int) -> None:
        """Hold `size` bytes less."""
        self.hold(-size)

    @property
    def most(self) -> float:
        """The bytes that may be held here, as things are now."""
        if self.max_bytes is not None:
            return self.max_bytes
        within = self.counts[1]
        return share(within.most, within.held, self.held)

    @property
    def use(self) -> str:
        """How much is held, and of what, as an error says it."""
        return f"{self.held} of {self.bound}={self.most:.0f}"

    @property
    def is_full(self) -> bool:
        """Whether as much is held as may be, here or in a count that this is a part of."""
        return any(count.held >= count.most for count in self.counts)
