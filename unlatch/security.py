"""TLS as a client asks for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unlatch.common.security.tls import load

if TYPE_CHECKING:
    from unlatch.common.security.certificates import Certificates


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """The files (PEM) of a client's TLS: looked at every second, and taken anew when they change.

    `ca` is who issues the gateway's certificate, the public authorities unless given; `cert` and `key` are the client's
    own, for gateways that ask for them; `name` is what the gateway's certificate says where its address is not in it.
    """

    ca: str | Path = ""
    cert: str | Path = ""
    key: str | Path = ""
    name: str = ""

    def certificates(self) -> "Certificates":
        """What the files hold. Raises CertificateError."""
        return load(str(self.cert), str(self.key), str(self.ca), names=("tls.cert", "tls.key", "tls.ca"))
