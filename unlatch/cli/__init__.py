"""The command line: a table of commands. Each is a module that is imported when its command is used.

A server needs nothing that `top` draws with.
"""

import io
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import unlatch
from unlatch.common.errors import CertificateError, DirectoryError, UnlatchError, near
from unlatch.common.service.early import take_over

# name -> the module whose main(arguments) runs the command, and the command's description
COMMANDS = {
    "serve": ("unlatch.supervisor.supervisor", "serve kernels on all cores of this machine: gateway and compute"),
    "gateway": ("unlatch.gateway.__main__", "run a gateway: the entry to a fleet of replicas"),
    "compute": ("unlatch.compute.__main__", "run one replica: a pool of worker processes"),
    "check": ("unlatch.check.command", "find faults in kernels before you serve them: unlatch check my_kernels.py"),
    "kernels": ("unlatch.cli.kernels", "list the kernels of a gateway, or describe one of them"),
    "call": ("unlatch.cli.call", "call a kernel: unlatch call gaussian_blur image=@photo.png sigma=2 -o out.png"),
    "map": ("unlatch.cli.map", "call a kernel for many files, or for each row of an array"),
    "top": ("unlatch.cli.top", "show the load of every process, live"),
    "completion": ("unlatch.cli.completion", "print a completion script for your shell"),
}
EXIT_CODES = """\
exit codes:
  0    success
  1    the call failed, or some calls of a map; or `check` found a fault
  2    wrong usage, or a service that cannot start
  130  interrupted
"""


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A docstring or a name with letters that this terminal cannot show must not fail the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if name in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if name == "--version":
        print(f"unlatch {unlatch.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"unlatch: unknown command {name!r}{near(name, COMMANDS)}", file=sys.stderr)
        return 2
    if name in ("serve", "gateway", "compute"):
        take_over()
    try:
        return _ran(name, rest)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # A broken pipe: the reader of our output wanted no more of it. Otherwise the output cannot be written.
        if not isinstance(error, BrokenPipeError):
            print(f"unlatch {name}: {error.strerror or error}", file=sys.stderr)
        # Otherwise Python would report the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _ran(name: str, rest: Sequence[str]) -> int:
    """Run a command, report its error on stderr, and return its exit code."""
    try:
        code: int = import_module(COMMANDS[name][0]).main(rest)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UnlatchError as error:
        _report(name, error, as_json="--json" in rest)
        return 1
    except (CertificateError, DirectoryError) as error:
        print(f"unlatch {name}: {error}", file=sys.stderr)
        return 2


def plain(text: str) -> str:
    """Text from a server or a user, without control characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def error_object(error: UnlatchError) -> dict[str, str]:
    """An error in the form of --json."""
    return {"code": error.status, "message": error.message, "field": error.field}


def _report(command: str, error: UnlatchError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error_object(error)}), file=sys.stderr)
    else:
        print(f"unlatch {command}: {error.status}: {plain(error.message)}", file=sys.stderr)


def _help() -> str:
    commands = "".join(f"  {name:<12}{what}\n" for name, (_, what) in COMMANDS.items())
    usage = "usage: unlatch COMMAND [options]      (unlatch COMMAND --help for more)\n       unlatch --version\n"
    return f"{usage}\n{commands}\n{EXIT_CODES}"
