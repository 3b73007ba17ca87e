"""The TLS settings of a client."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unlatch.common.security.tls import load

if TYPE_CHECKING:
    from unlatch.common.security.certificates import Certificates


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """The PEM files of a client's TLS. They are checked every second, and read again when they change.

    `ca` holds the authorities of the gateway's certificate, by default the public ones. `cert` and `key` are the
    client's own, for gateways that require them. `name` is the name in the gateway's certificate, if that does not
    contain the gateway's address.
    """

    ca: str | Path = ""
    cert: str | Path = ""
    key: str | Path = ""
    name: str = ""

    def certificates(self) -> "Certificates":
        """Read the files. Raises CertificateError."""
        return load(str(self.cert), str(self.key), str(self.ca), names=("tls.cert", "tls.key", "tls.ca"))
