"""Key files of a gateway: which are accepted, and refusals that never quote them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from tests.support.issuer import AUDIENCE, ISSUER, Issuer
from tests.support.mesh import ROOT
from unlatch.common.errors import Unauthenticated
from unlatch.common.security.watched import FileError
from unlatch.gateway.settings import ASYMMETRIC
from unlatch.gateway.tenants import tokens as tokens_module
from unlatch.gateway.tenants.tokens import Tokens

SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"  # a key for HMAC
CURVE = ec.generate_private_key(ec.SECP384R1())
LARGE = rsa.generate_private_key(65537, 2048)
SMALL = rsa.generate_private_key(65537, 1024)


def tokens(directory: Path, content: str, algorithms: tuple[str, ...] = ASYMMETRIC) -> Tokens:
    """Make a verifier of tokens with this file's keys. Raises FileError."""
    file = directory / "keys.json"
    file.write_text(content)
    made = Tokens(str(file), issuer=ISSUER, audience=AUDIENCE, algorithms=algorithms, leeway_seconds=0.0, claim="sub")
    made.file.load()
    return made


def keys(*listed: Any) -> str:
    return json.dumps({"keys": listed})


def signed(key: Any, algorithm: str) -> str:
    claims = {"sub": "alice", "iss": ISSUER, "aud": AUDIENCE, "exp": 4_000_000_000}
    return jwt.encode(claims, key, algorithm)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 10_000,
        '{"keys": {}}',
        '{"keys": []}',
        '{"keys": [1]}',
        '{"keys": [{"kty": []}]}',
        keys({"kty": "oct", "k": SECRET}),
        keys({"kty": "EC", "crv": "P-256", "x": SECRET, "y": SECRET, "alg": ["ES256"]}),
        keys(RSAAlgorithm.to_jwk(SMALL.public_key(), as_dict=True)),
        keys(ECAlgorithm.to_jwk(CURVE, as_dict=True)),
        keys(RSAAlgorithm.to_jwk(LARGE.public_key(), as_dict=True) | {"use": "enc"}),
        keys(*[ECAlgorithm.to_jwk(CURVE.public_key(), as_dict=True) | {"kid": "same"}] * 2),
    ],
    ids=[
        *("nothing", "a list", "very deep", "no list", "no key", "a number", "a kind that is none", "symmetric"),
        *("nonsense", "too short", "private", "for encryption", "two of a name"),
    ],
)
def test_keys_that_are_not_taken(tmp_path: Path, content: str) -> None:
    """The message names the file, and not its contents."""
    with pytest.raises(FileError, match=r"keys\.json: ") as raised:
        tokens(tmp_path, content)
    assert SECRET not in str(raised.value)


def test_key_is_used_for_what_fits_it(tmp_path: Path) -> None:
    """An RSA key without `alg` verifies all RSA algorithms, a key with `alg` that one, a curve its own."""
    public = RSAAlgorithm.to_jwk(LARGE.public_key(), as_dict=True)
    assert tokens(tmp_path, keys(public)).identify(signed(LARGE, "PS384")).name == "alice"
    bound = tokens(tmp_path, keys(public | {"alg": "RS256"}))
    assert bound.identify(signed(LARGE, "RS256")).name == "alice"
    with pytest.raises(Unauthenticated, match="algorithm"):
        bound.identify(signed(LARGE, "RS512"))
    curve = tokens(tmp_path, keys(ECAlgorithm.to_jwk(CURVE.public_key(), as_dict=True)))
    assert curve.identify(signed(CURVE, "ES384")).name == "alice"


def test_symmetric_keys_are_for_who_asks(tmp_path: Path) -> None:
    """Symmetric keys are used only if their algorithm is named."""
    asked = tokens(tmp_path, keys({"kty": "oct", "k": SECRET}), ("HS256",))
    assert asked.identify(signed(jwt.utils.base64url_decode(SECRET), "HS256")).name == "alice"


def test_token_that_seemed_expired_is_accepted_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is expired or not by the present clock, whatever was found before the clock was set."""
    issuer = Issuer(tmp_path)
    made = tokens(tmp_path, issuer.file.read_text())
    token = issuer.token(seconds=-5)
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="expired"):
            made.identify(token)
    monkeypatch.setattr(tokens_module, "time", lambda: time.time() - 3600)
    assert made.identify(token).name == "research"
    monkeypatch.setattr(tokens_module, "time", time.time)
    with pytest.raises(Unauthenticated, match="expired"):
        made.identify(token)


@pytest.mark.parametrize("end", ["soon", [], {}, float("nan"), float("inf"), -float("inf"), 10**400])
def test_end_of_a_token_is_a_number(tmp_path: Path, end: Any) -> None:
    """A token whose end is no number, or not a finite one, is refused."""
    issuer = Issuer(tmp_path)
    made = tokens(tmp_path, issuer.file.read_text())
    with pytest.raises(Unauthenticated, match="not a JWT that can be read"):
        made.identify(issuer.token(exp=end))


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    """The memory of bad tokens has a bound, however many come."""
    issuer = Issuer(tmp_path)
    made = tokens(tmp_path, issuer.file.read_text())
    good = issuer.token()
    assert made.identify(good).name == "research"
    for number in range(5000):
        with pytest.raises(Unauthenticated):
            made.identify(f"not.a.token{number}")
    assert len(made._bad) <= 4096
    assert list(made._good.values()) == [made.identify(good)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--token-keys", "keys.json"], "--token-issuer and --token-audience"),
        (
            ["--token-keys", "/nowhere/keys.json", "--token-issuer", "i", "--token-audience", "a"],
            "/nowhere/keys.json: No",
        ),
        (["--tenants", "/nowhere/tenants.toml"], "/nowhere/tenants.toml: No"),
        (["--token-algorithms", "none"], "unknown algorithm 'none'"),
    ],
)
def test_gateway_that_could_ask_nobody_does_not_start(flags: list[str], says: str) -> None:
    """The start ends with code 2, and a line that names the file or flag."""
    ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
    command = [sys.executable, "-m", "unlatch.gateway", *ports, *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 2
    assert says in ran.stderr
