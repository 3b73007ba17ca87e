"""The caller that a token or a certificate names, and the refusal of one that names none."""

import math
from dataclasses import dataclass

from unlatch.common.errors import Unauthenticated


class CredentialError(Unauthenticated):
    """A caller's token or certificate is missing or not valid. `reason` is a snake_case code, for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The name of a caller, and the time until which it is valid, in seconds since the epoch."""

    name: str
    until: float = math.inf
