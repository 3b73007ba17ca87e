"""Callers' tokens: JSON Web Tokens (RFC 7519), verified by keys from a file (RFC 7517) that is read again.

A token is verified once. The result is remembered by the token's digest, as long as the token and the keys are valid.
Refusals have texts of our own, because PyJWT's messages may quote a part of the token or key.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from time import time
from typing import Any

import jwt

from unlatch.common.security.watched import WatchedFile
from unlatch.gateway.tenants.identity import CredentialError, Identity

# Valid and invalid tokens are kept apart, so that a flood of invalid tokens evicts no valid ones.
_MAX_REMEMBERED = 4096
_MAX_KEYS = 64
_MAX_TOKEN_BYTES = 8192
_MAX_NAME_CHARACTERS = 256

# A reason and a message.
_Why = tuple[str, str]
_WHY: Mapping[type[Exception], _Why] = {
    jwt.ImmatureSignatureError: ("token_not_yet_valid", "the token is not valid yet"),
    jwt.InvalidIssuedAtError: ("token_not_yet_valid", "the token is not valid yet"),
    jwt.InvalidAudienceError: ("wrong_audience", "the token is for another audience"),
    jwt.InvalidIssuerError: ("wrong_issuer", "the token is from another issuer"),
    jwt.InvalidSignatureError: ("wrong_signature", "the token's signature does not match its key"),
    jwt.InvalidAlgorithmError: ("wrong_algorithm", "the token's algorithm is not one of its key's algorithms"),
}
_UNREADABLE: _Why = ("unreadable_token", "the token is not a JWT that can be read")


class Tokens:
    """The conditions under which a token is valid. `claim` is the claim that names the caller."""

    def __init__(
        self,
        keys_file: str,
        *,
        issuer: str,
        audience: str,
        algorithms: tuple[str, ...],
        leeway_seconds: float,
        claim: str,
    ) -> None:
        self.file = WatchedFile("--token-keys", keys_file, self._take)
        # Called after the keys have changed, because callers that they let in may have to be checked again.
        self.on_change: Callable[[], None] = lambda: None
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._leeway_seconds = leeway_seconds
        self._claim = claim
        # By the key's name, then by algorithm.
        self._keys: dict[str, dict[str, jwt.PyJWK]] = {}
        self._good: dict[bytes, Identity] = {}
        self._bad: dict[bytes, _Why] = {}

    def identify(self, token: str) -> Identity:
        """Return the caller that a token names. Raises Unauthenticated."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        identity = self._good.get(digest) or self._first_verified(token, digest)
        if identity.until <= time():
            raise CredentialError("token_expired", "the token has expired")
        return identity

    def _first_verified(self, token: str, digest: bytes) -> Identity:
        if why := self._bad.get(digest):
            raise CredentialError(*why)
        try:
            identity = self._verified(token)
        except CredentialError as error:
            # A token that is not valid yet may become valid.
            if (error.reason, error.message) != _WHY[jwt.ImmatureSignatureError]:
                _remember(self._bad, digest, (error.reason, error.message))
            raise
        _remember(self._good, digest, identity)
        return identity

    def _verified(self, token: str) -> Identity:
        if len(token) > _MAX_TOKEN_BYTES:
            raise CredentialError("token_too_long", f"the token is longer than {_MAX_TOKEN_BYTES} bytes")
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._key(jwt.get_unverified_header(token)),
                self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_seconds,
                # The end is checked at each use, because the clock goes on and may be set.
                options={"require": ["exp", "iss", "aud", self._claim], "verify_exp": False},
            )
            until = int(claims["exp"]) + self._leeway_seconds
        except jwt.MissingRequiredClaimError as error:
            raise CredentialError("missing_claim", f"the token has no claim {error.claim!r}") from None
        except CredentialError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, the token is refused)
            raise CredentialError(*_WHY.get(type(error), _UNREADABLE)) from None
        name = claims[self._claim]
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_CHARACTERS or not name.isprintable():
            raise CredentialError(
                "invalid_caller_name", f"the token's claim {self._claim!r} is not a valid caller name"
            )
        return Identity(name=name, until=until)

    def _key(self, header: Mapping[str, Any]) -> jwt.PyJWK:
        """Return the key that a token's header names. Raises Unauthenticated."""
        algorithm, name = header.get("alg"), header.get("kid")
        if algorithm not in self._algorithms:
            allowed = ", ".join(self._algorithms)
            raise CredentialError("algorithm_not_allowed", f"the token's algorithm is not one of {allowed}")
        if name is None and len(self._keys) == 1:
            (keys,) = self._keys.values()
        elif name is None:
            raise CredentialError("missing_key_id", "the token names no key (kid), and there are several")
        elif name in self._keys:
            keys = self._keys[name]
        else:
            raise CredentialError("unknown_key_id", "the token's key (kid) is not in the gateway's file of keys")
        if algorithm not in keys:
            raise CredentialError(*_WHY[jwt.InvalidAlgorithmError])
        return keys[algorithm]

    def _take(self, content: bytes) -> None:
        """Replace the keys by those of a file. Raises ValueError."""
        keys = _read_keys(content, self._algorithms)
        self._keys = keys
        self._good.clear()
        self._bad.clear()
        self.on_change()


def _read_keys(content: bytes, algorithms: tuple[str, ...]) -> dict[str, dict[str, jwt.PyJWK]]:
    try:
        said = json.loads(content)
        listed = said["keys"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError('wanted a JSON object with a list "keys"') from None
    if not isinstance(listed, list) or not 0 < len(listed) <= _MAX_KEYS:
        raise ValueError(f'wanted 1 to {_MAX_KEYS} keys in the list "keys"')
    keys: dict[str, dict[str, jwt.PyJWK]] = {}
    for number, key in enumerate(listed):
        if not isinstance(key, dict):
            raise ValueError(f"key {number} is not a JSON object")  # noqa: TRY004 (an error of the file's content)
        if "d" in key:
            raise ValueError(f"key {number} is a private key: the file should have the public key only")
        # Keys for encryption, or for algorithms that are not accepted, may be in the same file.
        fits = _by_algorithm(key, algorithms) if key.get("use", "sig") == "sig" else {}
        name = key.get("kid", "")
        if not isinstance(name, str) or name in keys:
            raise ValueError(f"key {number}: its name (kid) is not a string, or another key has it")
        if fits:
            keys[name] = fits
    if not keys:
        raise ValueError(f"no key fits one of the algorithms {', '.join(algorithms)}")
    return keys


def _by_algorithm(key: dict[str, Any], algorithms: tuple[str, ...]) -> dict[str, jwt.PyJWK]:
    """Return the algorithms of a key: the one that it names, or else all requested ones that fit its type."""
    fits = {}
    named = key.get("alg")
    for algorithm in (one for one in algorithms if named in (None, one)):
        try:
            made = jwt.PyJWK.from_dict(key, algorithm)
            made.Algorithm.prepare_key(made.key)
        except Exception:  # noqa: BLE001, S112 (other keys may fit, and the error may quote this one)
            continue
        # Keys that are too short to be safe are left out.
        if made.Algorithm.check_key_length(made.key) is None:
            fits[algorithm] = made
    return fits


def _remember(known: dict[bytes, Any], digest: bytes, what: Identity | _Why) -> None:
    if len(known) >= _MAX_REMEMBERED:
        # The oldest. If it comes again, it is verified again.
        del known[next(iter(known))]
    known[digest] = what
