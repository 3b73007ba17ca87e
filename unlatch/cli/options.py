"""What the client's commands have in common: their flags, and how wrong ones are refused."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from unlatch.common.errors import Unauthenticated, Unavailable, near, no_kernel
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.waiting.priority import NAMES
from unlatch.security import TLS

if TYPE_CHECKING:
    # It brings gRPC, which `top` does without.
    from unlatch.link import Token

N = TypeVar("N", int, float)


class Parser(argparse.ArgumentParser):
    """Takes flags in full and anywhere on the line. A wrong one ends with code 2, the near ones named."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"unlatch {command}", description=description, allow_abbrev=False)
        self._as_json = False

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options, or SystemExit."""
        self._as_json = "--json" in arguments
        options, unknown = self.parse_known_intermixed_args(list(arguments))
        for word in unknown:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(f"there is no option {word}{near(word.partition('=')[0], known)}")
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
    "ca": "a file (PEM): who issues the gateway's certificate; else the public authorities",
    "cert": "a file (PEM): the certificate to show to the gateway",
    "key": "a file (PEM): its private key",
    "name": "the name in the gateway's certificate where it is not the address",
}
_METAVARS = {"ca": "FILE", "cert": "FILE", "key": "FILE", "name": "NAME"}


def client_parser(command: str, description: str) -> Parser:
    """A parser with the flags of every command that calls a gateway."""
    parser = Parser(command, description)
    parser.add_argument("--server", default="127.0.0.1:8001", help="the gateway, host:port (default: %(default)s)")
    parser.add_argument("--tls", action="store_true", help="speak TLS; so does each of the next four")
    for name, what in _TLS_FLAGS.items():
        variable = f"UNLATCH_TLS_{name.upper()}"
        default = os.environ.get(variable, "")
        parser.add_argument(f"--tls-{name}", default=default, metavar=_METAVARS[name], help=f"{what} (else {variable})")
    parser.add_argument("--timeout", type=seconds, default=60.0, help="seconds that a call may take (default: 60)")
    parser.add_argument(
        "--token-file",
        default=os.environ.get("UNLATCH_TOKEN_FILE"),
        help="a file with the token that says who calls, where a gateway asks (default: UNLATCH_TOKEN_FILE)",
    )
    parser.add_argument("--json", action="store_true", help="speak JSON: results on stdout, errors on stderr")
    return parser


def token(options: argparse.Namespace) -> "Token | None":
    """What gives a client its token: the file, read each time, since whoever issues tokens may write it anew."""
    path = options.token_file

    def read() -> str:
        try:
            return Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text of a token"
            raise Unauthenticated(f"--token-file {path}: {why}") from None

    return read if path else None


def secured(options: argparse.Namespace) -> TLS | bool:
    """The TLS that these flags ask for, if they do."""
    given = {name: getattr(options, f"tls_{name}") for name in _TLS_FLAGS}
    return TLS(**given) if any(given.values()) else bool(options.tls)


def add_priority(parser: Parser) -> None:
    """The flag of commands whose calls may have to wait for a worker."""
    parser.add_argument(
        "--priority", choices=list(NAMES), default="normal", help="who goes first where calls wait (default: normal)"
    )


def seconds(text: str) -> float:
    """A flag's seconds. Raises what argparse turns into a refusal."""
    return number(text, float, 0.001, 1e9, "a number of seconds")


def number(text: str, kind: Callable[[str], N], least: N, most: N, what: str) -> N:
    """A flag's number within bounds. Raises what argparse turns into a refusal."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise argparse.ArgumentTypeError(f"wanted {what} from {least:g} to {most:g}, not {text!r}")
    return value


def find(served: Iterable[KernelSpec], name: str) -> KernelSpec:
    """A kernel by its name. Raises NotFound with near names, Unavailable where none is served at all."""
    kernels = {spec.name: spec for spec in served}
    if not kernels:
        raise Unavailable("the gateway has no replica that takes calls now")
    if name not in kernels:
        raise no_kernel(name, "", {served.name: served.version for served in kernels.values()})
    return kernels[name]
