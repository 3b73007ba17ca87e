"""Authentication of callers: by a token, or else by the certificate of the connection.

If a caller sends a token, only the token identifies the caller: a certificate does not replace an invalid token. A
gateway with neither keys for tokens nor a CA for certificates does not authenticate.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import grpc.aio

from unlatch.gateway.tenants.identity import CredentialError, Identity

if TYPE_CHECKING:
    from unlatch.gateway.tenants.tokens import Tokens

AUTHORIZATION = "authorization"
_SCHEME = "bearer "
# gRPC's keys for the names in a certificate, the preferred one first. Common names are not used.
_NAMES = ("peer_spiffe_id", "peer_uri", "peer_dns")

ANYBODY = Identity(name="")


Context = grpc.aio.ServicerContext[Any, Any]


class Authentication:
    """`tokens` is None if no tokens are accepted. `refused` is called with the reason of each refusal, a code.

    Connections in plaintext have no certificate. Without `encrypted` it is not looked for, which would cost 4 µs.
    """

    def __init__(self, tokens: "Tokens | None", refused: Callable[[str], None], *, encrypted: bool) -> None:
        self._tokens = tokens
        self._refused = refused
        self._encrypted = encrypted

    def identify(self, context: Context) -> tuple[Identity, str]:
        """Return the caller of an RPC, and its token if the token identified it. Raises Unauthenticated."""
        try:
            return self._identify(context)
        except CredentialError as error:
            self._refused(error.reason)
            raise

    def renew(self, token: str) -> Identity:
        """Return the caller of a token that replaces the token of an open lane. Raises Unauthenticated."""
        if self._tokens is None:
            raise CredentialError("tokens_not_accepted", "this gateway accepts no tokens")
        return self._tokens.identify(token)

    def _identify(self, context: Context) -> tuple[Identity, str]:
        token = _bearer(context.invocation_metadata() or ()) if self._tokens is not None else None
        if token is not None:
            return self.renew(token), token
        of_certificate = _certified(context.auth_context()) if self._encrypted else None
        if of_certificate is not None:
            return of_certificate, ""
        if self._tokens is not None:
            raise CredentialError(
                "missing_token", "there is no token: send it in the metadata, authorization: Bearer …"
            )
        return ANYBODY, ""


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the token in an RPC's metadata; None without one. Raises Unauthenticated."""
    said = [value for key, value in metadata if key == AUTHORIZATION]
    if not said:
        return None
    if len(said) > 1:
        raise CredentialError("repeated_authorization", "the metadata has more than one authorization")
    text = said[0] if isinstance(said[0], str) else said[0].decode(errors="replace")
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise CredentialError(
            "not_a_bearer_token", "the authorization has no Bearer token: send authorization: Bearer …"
        )
    return text[len(_SCHEME) :].strip()


def _certified(peer: Mapping[str, Iterable[bytes]]) -> Identity | None:
    """Return the caller that a connection's certificate names. gRPC has verified it. Raises Unauthenticated."""
    if "x509_pem_cert" not in peer:
        return None
    for kind in _NAMES:
        for name in peer.get(kind, ()):
            return Identity(name=name.decode(errors="replace"))
    raise CredentialError(
        "unnamed_certificate",
        "the certificate has neither a URI nor a DNS name (subject alternative name)",
    )
