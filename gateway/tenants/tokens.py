"""Callers' tokens: JSON Web Tokens (RFC 7519), held against keys from a file (RFC 7517) that is read again.

A token is looked at once: what it was found to be is remembered by its digest, as long as it and the keys hold. What a
token was refused for is said in words of ours. PyJWT's may quote what they complain about, and that is a secret.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import time
from typing import Any

import jwt

from unlatch.common.errors import Unauthenticated
from unlatch.common.security.watched import WatchedFile

# Valid and invalid tokens are kept apart, so that a flood of invalid tokens evicts no valid ones.
_MOST_REMEMBERED = 4096
_MOST_KEYS = 64
_MOST_TOKEN_BYTES = 8192
_MOST_NAME_CHARACTERS = 256

# A reason and a message.
_Why = tuple[str, str]
_WHY: Mapping[type[Exception], _Why] = {
    jwt.ExpiredSignatureError: ("token_expired", "the token has expired"),
    jwt.ImmatureSignatureError: ("token_not_yet_valid", "the token is not valid yet"),
    jwt.InvalidIssuedAtError: ("token_not_yet_valid", "the token is not valid yet"),
    jwt.InvalidAudienceError: ("wrong_audience", "the token is for another audience"),
    jwt.InvalidIssuerError: ("wrong_issuer", "the token is of another issuer"),
    jwt.InvalidSignatureError: ("wrong_signature", "the token's signature is not its key's"),
    jwt.InvalidAlgorithmError: ("wrong_algorithm", "the token's algorithm is not its key's"),
}
_UNREADABLE: _Why = ("unreadable_token", "this is no token that can be read")


class CredentialError(Unauthenticated):
    """A caller's token or certificate is missing or does not hold. `reason` is a snake_case code, for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The name of a caller, and the time until which it is valid, in seconds since the epoch."""

    name: str
    until: float = math.inf


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
        self.file = WatchedFile(keys_file, self._take)
        # Told when the keys are others: what they let in before may not hold any more.
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
        """Whose token it is. Raises Unauthenticated."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        known = self._good.get(digest)
        if known is not None:
            if known.until <= time():
                raise CredentialError(*_WHY[jwt.ExpiredSignatureError])
            return known
        if why := self._bad.get(digest):
            raise CredentialError(*why)
        try:
            identity = self._verified(token)
        except CredentialError as error:
            # One that is not valid yet may be so later.
            if (error.reason, error.message) != _WHY[jwt.ImmatureSignatureError]:
                _remember(self._bad, digest, (error.reason, error.message))
            raise
        _remember(self._good, digest, identity)
        return identity

    def _verified(self, token: str) -> Identity:
        if len(token) > _MOST_TOKEN_BYTES:
            raise CredentialError("token_too_long", f"the token is longer than {_MOST_TOKEN_BYTES} bytes")
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._key(jwt.get_unverified_header(token)),
                self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_seconds,
                options={"require": ["exp", "iss", "aud", self._claim]},
            )
            until = float(claims["exp"]) + self._leeway_seconds
        except jwt.MissingRequiredClaimError as error:
            raise CredentialError("missing_claim", f"the token has no claim {error.claim!r}") from None
        except CredentialError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever it is about it: it is not let in)
            raise CredentialError(*_WHY.get(type(error), _UNREADABLE)) from None
        name = claims[self._claim]
        if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME_CHARACTERS or not name.isprintable():
            raise CredentialError("invalid_caller_name", f"the token's claim {self._claim!r} is no caller's name")
        return Identity(name=name, until=until)

    def _key(self, header: Mapping[str, Any]) -> jwt.PyJWK:
        """The key that a token says it is signed with. Raises Unauthenticated."""
        algorithm, name = header.get("alg"), header.get("kid")
        if algorithm not in self._algorithms:
            allowed = ", ".join(self._algorithms)
            raise CredentialError("algorithm_not_allowed", f"the token's algorithm is none of {allowed}")
        if name is None and len(self._keys) == 1:
            (keys,) = self._keys.values()
        elif name is None:
            raise CredentialError("missing_key_id", "the token names no key (kid), and there are several")
        elif name in self._keys:
            keys = self._keys[name]
        else:
            raise CredentialError("unknown_key_id", "the token's key (kid) is not among ours")
        if algorithm not in keys:
            raise CredentialError(*_WHY[jwt.InvalidAlgorithmError])
        return keys[algorithm]

    def _take(self, content: bytes) -> None:
        """The keys of a file. Raises ValueError."""
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
        raise ValueError('it is no JSON object with a list "keys"') from None
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_KEYS:
        raise ValueError(f'"keys" is no list of 1 to {_MOST_KEYS} keys')
    keys: dict[str, dict[str, jwt.PyJWK]] = {}
    for number, key in enumerate(listed):
        if not isinstance(key, dict):
            raise ValueError(f"key {number} is no object")  # noqa: TRY004 (of the file: what is in it is a value)
        if "d" in key:
            raise ValueError(f"key {number} is a private key: who only verifies needs the public half")
        # What is for encryption, or of a kind that is not asked for, may be in the same set.
        fits = _by_algorithm(key, algorithms) if key.get("use", "sig") == "sig" else {}
        name = key.get("kid", "")
        if not isinstance(name, str) or name in keys:
            raise ValueError(f"key {number} has a name (kid) that is no string, or another key's")
        if fits:
            keys[name] = fits
    if not keys:
        raise ValueError(f"none of its keys fits {', '.join(algorithms)}")
    return keys


def _by_algorithm(key: dict[str, Any], algorithms: tuple[str, ...]) -> dict[str, jwt.PyJWK]:
    """Return the algorithms of a key: the one that it names, or else all requested ones that fit its type."""
    fits = {}
    named = key.get("alg")
    for algorithm in (one for one in algorithms if named in (None, one)):
        try:
            made = jwt.PyJWK.from_dict(key, algorithm)
            made.Algorithm.prepare_key(made.key)
        except Exception:  # noqa: BLE001, S112 (there are other keys; and what the error says may quote this one)
            continue
        # A key too short to be safe is none.
        if made.Algorithm.check_key_length(made.key) is None:
            fits[algorithm] = made
    return fits


def _remember(known: dict[bytes, Any], digest: bytes, what: Identity | _Why) -> None:
    if len(known) >= _MOST_REMEMBERED:
        # The oldest: who still comes with it is looked at again.
        del known[next(iter(known))]
    known[digest] = what
