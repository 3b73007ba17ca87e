"""The command line: a table of commands, each a module that is loaded when it is asked for.

multiprocessing's children import the entry point again, and a server needs none of what `top` draws with.
"""

import io
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from unlatch.common.errors import CertificateError, UnlatchError, near

# name -> the module whose main(arguments) is the command, and what it does
COMMANDS = {
    "serve": ("unlatch.supervisor", "gateway and compute on this machine, all cores"),
    "gateway": ("unlatch.gateway.__main__", "the door to a fleet of replicas"),
    "compute": ("unlatch.compute.__main__", "one replica: a pool of workers"),
    "check": ("unlatch.check.command", "find what your kernels do that they should not: unlatch check my_kernels.py"),
    "kernels": ("unlatch.cli.kernels", "what a gateway serves; of one kernel all that callers need"),
    "call": ("unlatch.cli.call", "call a kernel: unlatch call gaussian_blur image=@photo.png sigma=2 -o out.png"),
    "map": ("unlatch.cli.map", "call a kernel for many files, or for every row of one"),
    "top": ("unlatch.cli.top", "what every process does now, live"),
    "completion": ("unlatch.cli.completion", "a script that completes these for a shell"),
}
EXIT_CODES = """\
exit codes:
  0    done
  1    the call failed, or some of a map's; or `check` found a fault
  2    wrong usage, or a service that cannot start
  130  interrupted
"""


def run(arguments: Sequence[str]) -> int:
    """Run a command; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A docstring or a name in letters that this terminal lacks is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if name in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if name not in COMMANDS:
        print(f"unlatch: there is no command {name!r}{near(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return _ran(name, rest)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Whoever read our output has seen enough, or nothing can be written where it goes.
        if not isinstance(error, BrokenPipeError):
            print(f"unlatch {name}: {error.strerror or error}", file=sys.stderr)
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _ran(name: str, rest: Sequence[str]) -> int:
    """A command's exit code; what it failed of is told on stderr."""
    try:
        code: int = import_module(COMMANDS[name][0]).main(rest)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UnlatchError as error:
        _report(name, error, as_json="--json" in rest)
        return 1
    except CertificateError as error:
        print(f"unlatch {name}: {error}", file=sys.stderr)
        return 2


def plain(text: str) -> str:
    """A text that a server or a user chose, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def error_object(error: UnlatchError) -> dict[str, str]:
    """An error as --json tells it."""
    return {"code": error.status, "message": error.message, "field": error.field}


def _report(command: str, error: UnlatchError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error_object(error)}), file=sys.stderr)
    else:
        print(f"unlatch {command}: {error.status}: {plain(error.message)}", file=sys.stderr)


def _help() -> str:
    commands = "".join(f"  {name:<12}{what}\n" for name, (_, what) in COMMANDS.items())
    return f"usage: unlatch COMMAND [options]      (unlatch COMMAND --help tells more)\n\n{commands}\n{EXIT_CODES}"
