"""Identities in certificates: the caller's name in a real certificate, as gRPC presents it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support.doors import Metadata, refusal_of
from tests.support.issuer import AUDIENCE, ISSUER, Issuer, bearer
from unlatch.common.errors import UnlatchError
from unlatch.common.net.rpc import abort, handlers
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.tokens import Tokens

SPIFFE = x509.UniformResourceIdentifier("spiffe://example.org/ns/research/sa/caller")
URI = x509.UniformResourceIdentifier("https://example.org/caller")
DNS = x509.DNSName("caller.example.org")


class Authority:
    """A certificate authority."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate: x509.Certificate | None = None
        self._certificate = self._signed("authority", [], self._key)

    @property
    def pem(self) -> bytes:
        assert self._certificate is not None
        return self._certificate.public_bytes(Encoding.PEM)

    def issue(self, name: str, alternatives: Sequence[x509.GeneralName]) -> tuple[bytes, bytes]:
        """Issue a key and its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return pem, self._signed(name, alternatives, key).public_bytes(Encoding.PEM)

    def _signed(
        self, name: str, alternatives: Sequence[x509.GeneralName], key: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now, day = datetime.now(UTC), timedelta(days=1)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject if self._certificate is not None else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=self._certificate is None, path_length=None), critical=True)
        )
        if alternatives:
            built = built.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return built.sign(self._key, hashes.SHA256())


async def name_of(alternatives: Sequence[x509.GeneralName], tokens: Tokens | None, metadata: Metadata) -> str:
    """Return the identity of a caller with this certificate and metadata, or the status of the refusal."""
    authority = Authority()
    authentication = Authentication(tokens, lambda _: None, encrypted=True)

    async def who(_: object, context: Any) -> bytes:
        try:
            return authentication.identify(context)[0].name.encode()
        except UnlatchError as error:
            await abort(context, error)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers("test.Who", unary={"Who": who}),))
    pair = authority.issue("server", [x509.DNSName("localhost")])
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair], authority.pem, True))
    await server.start()
    credentials = grpc.ssl_channel_credentials(authority.pem, *authority.issue("admin", alternatives))
    try:
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            call: Any = channel.unary_unary("/test.Who/Who")
            answer: bytes = await call(b"", metadata=metadata, timeout=10)
            return answer.decode()
    except grpc.aio.AioRpcError as error:
        return refusal_of(error).code
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("alternatives", "name"),
    [
        ([DNS, URI], URI.value),
        ([DNS, SPIFFE], SPIFFE.value),
        ([DNS, x509.DNSName("other.example.org")], DNS.value),
        ([], "UNAUTHENTICATED"),
        ([x509.RFC822Name("caller@example.org")], "UNAUTHENTICATED"),
    ],
    ids=["a URI", "a SPIFFE ID", "DNS names", "a common name alone", "a mail address"],
)
@pytest.mark.asyncio
async def test_certificate_names_its_caller(alternatives: Sequence[x509.GeneralName], name: str) -> None:
    """SPIFFE comes before other URIs, these before DNS. Other names give no identity."""
    assert await name_of(alternatives, None, ()) == name


@pytest.mark.asyncio
async def test_token_is_who_calls_whatever_the_certificate_says(tmp_path: Path) -> None:
    """A bad token is refused, also beside a good certificate."""
    issuer = Issuer(tmp_path)
    tokens = Tokens(
        str(issuer.file), issuer=ISSUER, audience=AUDIENCE, algorithms=("ES256",), leeway_seconds=0.0, claim="sub"
    )
    tokens.file.load()
    assert await name_of([SPIFFE], tokens, bearer(issuer.token("alice"))) == "alice"
    assert await name_of([SPIFFE], tokens, bearer(issuer.token("alice", seconds=-5))) == "UNAUTHENTICATED"
    assert await name_of([SPIFFE], tokens, ()) == SPIFFE.value
