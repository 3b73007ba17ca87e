"""An issuer of tokens for tests: its keys, its JWKS file, its tokens, and the secrets that must never be logged."""

import base64
import hashlib
import hmac
import json
import os
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm

from tests.support.doors import Metadata

ISSUER, AUDIENCE = "https://issuer.test", "unlatch"


class Issuer:
    """An issuer, which signs tokens with its newest key unless told otherwise."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "keys.json"
        # Tokens that were signed, and secrets. None of them may be in any log or error.
        self.secrets: list[str] = []
        self._keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.new_key("first")
        self.publish("first")

    @property
    def flags(self) -> list[str]:
        """Flags that make a gateway ask for this issuer's tokens."""
        return [
            *("--token-keys", str(self.file), "--token-issuer", ISSUER, "--token-audience", AUDIENCE),
            *("--token-leeway-seconds", "0"),
        ]

    def new_key(self, name: str) -> None:
        self._keys[name] = ec.generate_private_key(ec.SECP256R1())

    def publish(self, *names: str) -> None:
        """Write a JWKS file with these keys and no others."""
        keys = [ECAlgorithm.to_jwk(self._keys[name].public_key(), as_dict=True) | {"kid": name} for name in names]
        self.replace(json.dumps({"keys": keys}))

    def replace(self, content: str) -> None:
        """Replace the JWKS file by this text, atomically."""
        beside = self.file.with_suffix(".new")
        beside.write_text(content)
        os.replace(beside, self.file)

    def public_pem(self, name: str) -> bytes:
        return self._keys[name].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def token(
        self, sub: str | None = "research", *, key: str = "", kid: str = "", seconds: float = 60.0, **claims: Any
    ) -> str:
        """Make a valid token, which tests then spoil. A claim that is None is left out."""
        name = key or list(self._keys)[-1]
        said = {"sub": sub, "iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time() + seconds), **claims}
        kept = {claim: value for claim, value in said.items() if value is not None}
        return self.remember(jwt.encode(kept, self._keys[name], "ES256", headers={"kid": kid or name}))

    def forged(self, header: dict[str, Any], secret: bytes | None = None) -> str:
        """Make a token with a valid token's claims and this header, signed with this secret or not at all."""
        said = {"sub": "admin", "iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time() + 60)}
        text = f"{_part(json.dumps(header).encode())}.{_part(json.dumps(said).encode())}"
        signature = b"" if secret is None else hmac.new(secret, text.encode(), hashlib.sha256).digest()
        return self.remember(f"{text}.{_part(signature)}")

    def remember(self, token: str) -> str:
        self.secrets += [part for part in token.split(".") if len(part) > 8]
        return token


def bearer(token: str) -> Metadata:
    """Make the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


def ends(token: str) -> float:
    """Return when a token expires, in seconds since the epoch."""
    return float(jwt.decode(token, options={"verify_signature": False})["exp"])


def _part(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
