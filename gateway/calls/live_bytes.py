"""The bytes of tensors that calls hold in the gateway, against their bound."""

from unlatch.common.errors import ResourceExhausted


class LiveBytes:
    """Counts the bytes of requests and replies together, up to `max_live_bytes`."""

    def __init__(self, max_live_bytes: int) -> None:
        self._max = max_live_bytes
        self._held = 0

    def check(self, size: int) -> None:
        """Raise ResourceExhausted where `size` more bytes would be too many."""
        if self._held + size > self._max:
            raise ResourceExhausted(
                f"{size} bytes do not fit: calls hold {self._held} of max_live_bytes={self._max}",
                retry_after_milliseconds=100,
            )

    def charge(self, size: int, instead_of: int = 0) -> None:
        """Hold `size` bytes in place of `instead_of`. Raises ResourceExhausted where they would be too many."""
        if size > instead_of:
            self.check(size - instead_of)
        self._held += size - instead_of

    def free(self, size: int) -> None:
        """Hold `size` bytes less."""
        self._held -= size
