"""Authentication by tokens: which are accepted and which are refused, at both doors, while others are served."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mesh.security.conftest import Guarded
from tests.support.doors import Oip, vector
from tests.support.issuer import Issuer, bearer, ends
from tests.support.mesh import ROOT
from tests.support.watching import wait_until
from unlatch.protos.inference_pb2 import RepositoryIndexRequest


def _tampered(issuer: Issuer) -> str:
    head, _, signature = issuer.token("research").split(".")
    return issuer.remember(f"{head}.{issuer.token('admin').split('.')[1]}.{signature}")


def _wrong_key(issuer: Issuer) -> str:
    elsewhere = issuer.file.parent / "other"
    elsewhere.mkdir(exist_ok=True)
    other = Issuer(elsewhere)
    return issuer.remember(other.token("research", kid="first"))


# Values of `authorization`, and a word of the reason for the refusal.
BAD: dict[str, tuple[Callable[[Issuer], str | None], str]] = {
    "none at all": (lambda _: None, "no token"),
    "another scheme": (lambda _: "Basic cmVzZWFyY2g6c2VjcmV0", "no Bearer token"),
    "nothing after the scheme": (lambda _: "Bearer ", "can be read"),
    "no token": (lambda _: "Bearer hello", "can be read"),
    "three parts of nonsense": (lambda _: "Bearer aaaaaaaaaaaa.bbbbbbbbbbbb.cccccccccccc", "can be read"),
    "very long": (lambda _: "Bearer " + "a" * 9000, "longer"),
    "expired": (lambda issuer: "Bearer " + issuer.token(seconds=-5), "expired"),
    "no expiry": (lambda issuer: "Bearer " + issuer.token(exp=None), "'exp'"),
    "not valid yet": (lambda issuer: "Bearer " + issuer.token(nbf=int(time.time() + 600)), "not valid yet"),
    "wrong audience": (lambda issuer: "Bearer " + issuer.token(aud="others"), "audience"),
    "no audience": (lambda issuer: "Bearer " + issuer.token(aud=None), "'aud'"),
    "wrong issuer": (lambda issuer: "Bearer " + issuer.token(iss="https://elsewhere.test"), "issuer"),
    "no issuer": (lambda issuer: "Bearer " + issuer.token(iss=None), "'iss'"),
    "no name": (lambda issuer: "Bearer " + issuer.token(None), "'sub'"),
    "an empty name": (lambda issuer: "Bearer " + issuer.token(""), "name"),
    "alg none": (lambda issuer: "Bearer " + issuer.forged({"alg": "none", "typ": "JWT"}), "algorithm"),
    "alg None": (lambda issuer: "Bearer " + issuer.forged({"alg": "None", "kid": "first"}), "algorithm"),
    "HS256 signed with the public key": (
        lambda issuer: "Bearer " + issuer.forged({"alg": "HS256", "kid": "first"}, issuer.public_pem("first")),
        "algorithm",
    ),
    "another algorithm than the key's": (
        lambda issuer: "Bearer " + issuer.forged({"alg": "RS256", "kid": "first"}, b"x" * 32),
        "algorithm",
    ),
    "another key under the same name": (lambda issuer: "Bearer " + _wrong_key(issuer), "signature"),
    "a key that nobody knows": (lambda issuer: "Bearer " + issuer.token(kid="elsewhere"), "kid"),
    "a path for a key's name": (lambda issuer: "Bearer " + issuer.token(kid="../../dev/null"), "kid"),
    "another's claims under a signature": (lambda issuer: "Bearer " + _tampered(issuer), "signature"),
    "a critical extension": (
        lambda issuer: "Bearer " + issuer.forged({"alg": "ES256", "kid": "first", "crit": ["x"], "x": 1}),
        "can be read",
    ),
}


@pytest.mark.parametrize("door", ["oip", "lane"])
@pytest.mark.parametrize("case", BAD)
def test_bad_token_is_refused(guarded: Guarded, case: str, door: str) -> None:
    """A bad token is UNAUTHENTICATED at either door, with the reason and nothing of the token; the second time too."""
    make, word = BAD[case]
    value = make(guarded.issuer)
    metadata = (("authorization", value),) if value is not None else ()
    for _ in range(2):
        refusal = guarded.refused(door, metadata)
        assert (refusal.code, word in refusal.message) == ("UNAUTHENTICATED", True), refusal
        parts = [part for part in (value or "").removeprefix("Bearer ").split(".") if len(part) > 8]
        assert not any(part in refusal.message for part in parts)


def test_two_tokens_are_refused(guarded: Guarded) -> None:
    """A good token beside another is refused: the position of an added one must not matter."""
    both = (*bearer(guarded.issuer.token()), *bearer(guarded.issuer.token("modest")))
    for door in ("oip", "lane"):
        assert guarded.refused(door, both).code == "UNAUTHENTICATED"


def test_good_token_is_let_in(guarded: Guarded) -> None:
    """A good token is accepted at both doors, with its scheme in any case."""
    token = guarded.issuer.token()
    assert guarded.oip(token).serves()
    assert Oip(guarded.channel, (("authorization", f"bearer {token}"),)).serves()
    with guarded.lane(token) as lane:
        assert lane.serves(1)


def test_questions_about_kernels_need_a_token_too(guarded: Guarded) -> None:
    """Questions about kernels need a token as calls do."""
    message = RepositoryIndexRequest().SerializeToString()
    assert Oip(guarded.channel).refusal(message, "RepositoryIndex").code == "UNAUTHENTICATED"
    assert guarded.oip(guarded.issuer.token()).send(message, "RepositoryIndex")


def test_known_caller_who_is_no_tenant_is_refused(guarded: Guarded) -> None:
    """The status is PERMISSION_DENIED: the file has no table for other callers."""
    for door in ("oip", "lane"):
        refusal = guarded.refused(door, tuple(bearer(guarded.issuer.token("stranger"))))
        assert (refusal.code, "belongs to no tenant" in refusal.message) == ("PERMISSION_DENIED", True), refusal


def test_stream_ends_with_its_token(guarded: Guarded) -> None:
    """Each request of a stream is checked when it comes: those after the token's end are refused."""
    token = guarded.issuer.token(seconds=2)
    message = vector("identity", 1.0).SerializeToString()

    def requests() -> Iterator[bytes]:
        yield message
        first_answered.wait(10)
        wait_until(lambda: time.time() >= ends(token), "the token has ended")
        yield message

    first_answered = threading.Event()
    call: Any = guarded.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    answers = call(requests(), metadata=bearer(token), timeout=10)
    assert b"UNAUTHENTICATED" not in next(answers)
    first_answered.set()
    assert b"UNAUTHENTICATED: the token has expired" in next(answers)


def test_command_line_brings_a_token_from_a_file(guarded: Guarded, tmp_path: Path) -> None:
    """The token's file is given by flag or variable. A missing file is named, and a token is never printed."""
    file = tmp_path / "token"
    call = [sys.executable, "-m", "unlatch", "call", "identity", "x=[1, 2]", "--json", "--server", guarded.mesh.gateway]

    def ran(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **variables}
        command = [*call, *flags]
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )

    missing = ran("--token-file", str(file))
    assert (missing.returncode, f"{file}: No such file" in missing.stderr) == (1, True), missing.stderr
    file.write_text(guarded.issuer.token() + "\n")
    assert ran("--token-file", str(file)).returncode == 0
    file.write_text(guarded.issuer.token(seconds=-5))
    expired = ran(UNLATCH_TOKEN_FILE=str(file))
    assert json.loads(expired.stderr)["error"]["code"] == "UNAUTHENTICATED"
    assert not any(secret in expired.stderr for secret in guarded.issuer.secrets)
