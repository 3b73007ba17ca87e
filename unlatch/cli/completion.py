"""`unlatch completion bash`: a script that completes commands, flags, and served kernels with their arguments."""

import argparse
from collections.abc import Iterator, Sequence
from importlib import import_module

import shtab

from unlatch.cli import COMMANDS
from unlatch.cli.options import Parser
from unlatch.common.net.settings import Settings

_SETTINGS = {
    "serve": ("unlatch.unit.settings", "ServeSettings"),
    "gateway": ("unlatch.gateway.settings", "GatewaySettings"),
    "compute": ("unlatch.compute.settings", "ComputeSettings"),
}
# With a short timeout, so that Tab does not hang if there is no gateway.
_NAMES = shtab.cmd("unlatch kernels --names --timeout 1 2>/dev/null")
# Names of arguments and choices for the word under the cursor, `kind=li`, and files. Bash breaks words at "=", so only
# what follows it is replaced. Choices with spaces are left out.
_BASH_ARGUMENTS = """
_unlatch_arguments() {
  local line=${COMP_LINE:0:COMP_POINT} each
  local word=${line##* }
  for each in $(unlatch kernels "${COMP_WORDS[2]}" --names --timeout 1 2>/dev/null | grep -v ' '); do
    [[ $each == "$word"* ]] && if [[ $1 == "$word" ]]; then echo "$each"; else echo "${each#*=}"; fi
  done
  compgen -f -- "$1"
}"""
_ARGUMENTS = {**shtab.FILE, "bash": "_unlatch_arguments", "preamble": {"bash": _BASH_ARGUMENTS}}


def parser() -> Parser:
    """The parser of the command's flags."""
    made = Parser("completion", 'Print a completion script. For bash: eval "$(unlatch completion bash)"')
    made.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="name of the shell")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch completion`; returns the exit code."""
    print(shtab.complete(_every_command(), parser().parse(arguments).shell))
    return 0


def _every_command() -> argparse.ArgumentParser:
    """All commands as one parser, which is read but never used to parse."""
    root = argparse.ArgumentParser("unlatch")
    commands = root.add_subparsers()
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, add_help=False)
        for action in _flags(name, module):
            if action.dest == "kernel":
                action.complete = _NAMES  # type: ignore[attr-defined]  # the attribute that shtab reads
            elif action.dest == "arguments":
                action.complete = _ARGUMENTS  # type: ignore[attr-defined]
            elif action.dest == "output":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            command._add_action(action)  # noqa: SLF001 (argparse's `parents` would copy help and groups too)
    return root


def _flags(name: str, module: str) -> Iterator[argparse.Action]:
    if name in _SETTINGS:
        made = argparse.ArgumentParser()
        home, kind = _SETTINGS[name]
        settings: type[Settings] = getattr(import_module(home), kind)
        for field, about in settings.model_fields.items():
            made.add_argument(f"--{field.replace('_', '-')}", help=(about.description or "").replace("%", "%%"))
    else:
        made = getattr(import_module(module), "parser", argparse.ArgumentParser)()
    yield from made._actions  # noqa: SLF001 (argparse has no other way to list a parser's flags)
