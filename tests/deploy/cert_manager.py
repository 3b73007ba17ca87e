"""A stand-in for cert-manager: it makes the certificates that the manifests' Certificates and Issuers ask for."""

from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.deploy.manifests import Manifests

_EXTENDED = {"server auth": ExtendedKeyUsageOID.SERVER_AUTH, "client auth": ExtendedKeyUsageOID.CLIENT_AUTH}
Secret = dict[str, bytes]


class CertManager:
    """Issues what a rendering asks for. Authorities are made once, everything else anew each time."""

    def __init__(self, manifests: Manifests) -> None:
        self._certificates = {one["spec"]["secretName"]: one["spec"] for one in manifests.of("Certificate")}
        self._authorities: dict[str, tuple[ec.EllipticCurvePrivateKey, x509.Certificate]] = {}
        for issuer in manifests.of("Issuer"):
            if "ca" in issuer["spec"]:
                spec = self._certificates[issuer["spec"]["ca"]["secretName"]]
                assert spec["isCA"]
                self._authorities[issuer["metadata"]["name"]] = _issue(spec, None)

    def secret(self, name: str) -> Secret:
        """Return the secret that a Certificate of the manifests asks for."""
        return self.issued(self._certificates[name])

    def issued(self, spec: dict[str, Any]) -> Secret:
        """Return the contents of the secret of a Certificate with this spec."""
        authority = self._authorities[spec["issuerRef"]["name"]]
        key, certificate = _issue(spec, authority)
        return {
            "tls.crt": certificate.public_bytes(Encoding.PEM),
            "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "ca.crt": authority[1].public_bytes(Encoding.PEM),
        }


def _issue(
    spec: dict[str, Any], by: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a key and its certificate, signed by itself if there is no issuer."""
    assert (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) == ("ECDSA", 256)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    common = [x509.NameAttribute(NameOID.COMMON_NAME, spec["commonName"])] if "commonName" in spec else []
    subject = x509.Name(common)
    signing_key, issuer = (key, subject) if by is None else (by[0], by[1].subject)
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=float(spec.get("duration", "2160h").removesuffix("h"))))
        .add_extension(x509.BasicConstraints(ca=spec.get("isCA", False), path_length=None), critical=True)
        .add_extension(_key_usage(spec["usages"]), critical=True)
    )
    if names := [*map(x509.DNSName, spec.get("dnsNames", [])), *_uris(spec)]:
        # The extension is critical where the subject is empty (RFC 5280, 4.2.1.6).
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not common)
    if purposes := [_EXTENDED[usage] for usage in spec["usages"] if usage in _EXTENDED]:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return key, builder.sign(signing_key, hashes.SHA256())


def _uris(spec: dict[str, Any]) -> list[x509.UniformResourceIdentifier]:
    return [x509.UniformResourceIdentifier(uri) for uri in spec.get("uris", [])]


def _key_usage(usages: list[str]) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature="digital signature" in usages,
        key_cert_sign="cert sign" in usages,
        crl_sign="crl sign" in usages,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
