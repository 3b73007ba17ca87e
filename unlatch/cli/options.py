"""Flags that the client commands share, and errors for wrong flags."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from unlatch.common.errors import NotFound, Unauthenticated, Unavailable, near
from unlatch.common.flags import seconds
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.waiting.priority import NAMES
from unlatch.security import TLS

if TYPE_CHECKING:
    # Only for types: the import brings gRPC, which `top` does not need.
    from unlatch.link import Token


class Parser(argparse.ArgumentParser):
    """A parser that takes flags in full and anywhere. A wrong flag exits with code 2 and suggests a similar one."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"unlatch {command}", description=description, allow_abbrev=False)
        self._as_json = False

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the options. Raises SystemExit for wrong ones."""
        self._as_json = "--json" in arguments
        options, unknown = self.parse_known_intermixed_args(list(arguments))
        for word in unknown:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(f"unknown option {word}{near(word.partition('=')[0], known)}")
        return options

    def error(self, message: str) -> NoReturn:
        if self._as_json:
            wrong = {"code": "INVALID_ARGUMENT", "message": message, "field": ""}
            print(json.dumps({"error": wrong}), file=sys.stderr)
        else:
            self.print_usage(sys.stderr)
            print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


_TLS_FLAGS = {
    "ca": "PEM file: authorities of the gateway's certificate; without it, the public ones",
    "cert": "PEM file: certificate shown to the gateway",
    "key": "PEM file: private key of --tls-cert",
    "name": "host name in the gateway's certificate; without it, its address",
}
_METAVARS = {"ca": "FILE", "cert": "FILE", "key": "FILE", "name": "NAME"}


def client_parser(command: str, description: str) -> Parser:
    """A parser with the flags of every command that calls a gateway."""
    parser = Parser(command, description)
    server = os.environ.get("UNLATCH_SERVER", "127.0.0.1:8001")
    parser.add_argument(
        "--server", default=server, help="address of the gateway (default: UNLATCH_SERVER, or 127.0.0.1:8001)"
    )
    parser.add_argument("--tls", action="store_true", help="use TLS; implied by each of the next four")
    for name, what in _TLS_FLAGS.items():
        variable = f"UNLATCH_TLS_{name.upper()}"
        default = os.environ.get(variable, "")
        parser.add_argument(f"--tls-{name}", default=default, metavar=_METAVARS[name], help=f"{what} (or {variable})")
    parser.add_argument("--timeout", type=seconds, default=60.0, help="timeout in seconds of each call (default: 60)")
    parser.add_argument(
        "--token-file",
        default=os.environ.get("UNLATCH_TOKEN_FILE"),
        help="file with the caller's token, for gateways that require one (default: UNLATCH_TOKEN_FILE)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: results on stdout, errors on stderr")
    return parser


def token(options: argparse.Namespace) -> "Token | None":
    """A function that reads the token file on each call, since tokens are renewed. None without --token-file."""
    path = options.token_file

    def read() -> str:
        try:
            return Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not a text file"
            raise Unauthenticated(f"--token-file {path}: {why}") from None

    return read if path else None


def secured(options: argparse.Namespace) -> TLS | bool:
    """The client's `tls` argument, from these flags."""
    given = {name: getattr(options, f"tls_{name}") for name in _TLS_FLAGS}
    return TLS(**given) if any(given.values()) else bool(options.tls)


def add_priority(parser: Parser) -> None:
    """Add the flag of commands whose calls may wait for a worker."""
    parser.add_argument(
        "--priority", choices=list(NAMES), default="normal", help="priority of waiting calls (default: normal)"
    )


def find(served: Iterable[KernelSpec], name: str) -> KernelSpec:
    """Find a kernel by name. Raises NotFound with similar names, Unavailable if no kernel is served."""
    kernels = {spec.name: spec for spec in served}
    if not kernels:
        raise Unavailable("the gateway has no ready replica")
    if name not in kernels:
        raise NotFound(f"there is no kernel {name[:64]!r}{near(name, kernels)}", field="model_name")
    return kernels[name]
