"""The command line: `unlatch serve | gateway | compute | kernels | call`.

Exit codes: 0 done, 1 the call failed, 2 wrong usage or a service that cannot start, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import NAMES, InvalidArgument, UnlatchError, near
from common.spec import ArraySpec, KernelSpec, ScalarSpec

_DEFAULT_SERVER = "127.0.0.1:8001"
_USAGE = """\
usage: unlatch COMMAND [options]      (unlatch COMMAND --help tells more)

  serve      gateway and compute on this machine, all cores
  gateway    the door to a fleet of replicas
  compute    one replica: a pool of workers
  kernels    what a gateway serves
  call       call a kernel: unlatch call gaussian_blur image=@photo.npy sigma=2 -o out.npy
"""


def run(arguments: Sequence[str]) -> int:
    """Run a command; its exit code."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if name in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    command = _COMMANDS.get(name)
    if command is None:
        print(f"unlatch: there is no command {name!r}{near(name, _COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return command(rest)
    except UnlatchError as error:
        print(f"unlatch {name}: {NAMES.get(error.code, 'UNKNOWN')}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _serve(arguments: Sequence[str]) -> int:
    from unlatch.supervisor import main

    return main(arguments)


def _gateway(arguments: Sequence[str]) -> int:
    from gateway.__main__ import main

    return main(arguments)


def _compute(arguments: Sequence[str]) -> int:
    from compute.__main__ import main

    return main(arguments)


def _kernels(arguments: Sequence[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from unlatch.blocking import BlockingClient

    options = _client_parser("kernels", "What a gateway serves.").parse_args(arguments)
    with BlockingClient(options.server, timeout=options.timeout) as mesh:
        kernels = mesh.kernels()
    table = Table("kernel", "signature", "what it does", box=None, header_style="bold", pad_edge=False)
    for spec in kernels:
        table.add_row(spec.name, signature(spec), spec.doc.partition("\n")[0])
    Console().print(table)
    return 0


def _call(arguments: Sequence[str]) -> int:
    from unlatch.blocking import BlockingClient

    parser = _client_parser("call", "Call a kernel.")
    parser.add_argument("kernel", help="its name")
    parser.add_argument("arguments", nargs="*", metavar="name=value", help="an array as @file.npy or JSON, or a scalar")
    parser.add_argument("-o", "--output", type=Path, help="where to write the result, as .npy; else it is printed")
    options = parser.parse_args(arguments)
    with BlockingClient(options.server, timeout=options.timeout) as mesh:
        kernels = {spec.name: spec for spec in mesh.kernels()}
        spec = kernels.get(options.kernel)
        # An unknown name is the server's to refuse, as it refuses every other caller's.
        given = {} if spec is None else dict(_argument(spec, argument) for argument in options.arguments)
        outcome = mesh.call(options.kernel, timeout=options.timeout, **given)
    _deliver(outcome, options.output)
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "gateway": _gateway,
    "compute": _compute,
    "kernels": _kernels,
    "call": _call,
}


def signature(spec: KernelSpec) -> str:
    """A kernel's signature for people: (image: float64|float32[h w], *, sigma: float = 1.0) -> output0: …"""
    arguments = [_array_text(array) for array in spec.inputs]
    if spec.scalars:
        arguments += ["*", *map(_scalar_text, spec.scalars)]
    return f"({', '.join(arguments)}) -> {', '.join(map(_array_text, spec.outputs))}"


def _array_text(array: ArraySpec) -> str:
    dtypes = array.dtypes
    text = "any" if not dtypes else "|".join(dtypes) if len(dtypes) <= 2 else f"{dtypes[0]}|…"
    return f"{array.name}: {text}\\[{' '.join(array.dims)}]"


def _scalar_text(scalar: ScalarSpec) -> str:
    return f"{scalar.name}: {scalar.type}" + ("" if scalar.required else f" = {scalar.default}")


def _client_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"unlatch {command}", description=description)
    parser.add_argument("--server", default=_DEFAULT_SERVER, help="the gateway, host:port (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that the call may take")
    return parser


def _argument(spec: KernelSpec, argument: str) -> tuple[str, Any]:
    """`name=value` as the kernel wants it. Raises InvalidArgument."""
    name, equals, text = argument.partition("=")
    if not equals:
        raise InvalidArgument(f"{argument}: an argument is given as name=value")
    if any(array.name == name for array in spec.inputs):
        return name, _array_argument(name, text)
    for scalar in spec.scalars:
        if scalar.name == name:
            return name, _scalar_argument(scalar, text)
    known = [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars]
    raise InvalidArgument(f"{name}: kernel {spec.name} has no such argument{near(name, known)}", field=name)


def _array_argument(name: str, text: str) -> Any:
    import numpy as np

    try:
        return np.load(text[1:], allow_pickle=False) if text.startswith("@") else json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{name}: wanted @file.npy or an array in JSON: {error}", field=name) from None


def _scalar_argument(scalar: ScalarSpec, text: str) -> bool | int | float | str:
    try:
        if scalar.type == "bool":
            return {"true": True, "false": False}[text.lower()]
        kinds: dict[str, Callable[[str], int | float | str]] = {"int": int, "float": float, "str": str}
        return kinds[scalar.type](text)
    except (KeyError, ValueError):
        raise InvalidArgument(f"{scalar.name}: wanted a {scalar.type}, got {text!r}", field=scalar.name) from None


def _deliver(outcome: Any, output: Path | None) -> None:
    """Write or print a result; of several outputs each gets a file of its own."""
    import numpy as np

    named = outcome._asdict() if hasattr(outcome, "_asdict") else {"": outcome}
    for name, array in named.items():
        if output is not None:
            np.save(output.with_name(f"{output.stem}-{name}{output.suffix}") if name else output, array)
        else:
            print(f"{name or 'result'}: {array.dtype} {array.shape}\n{np.array2string(array, threshold=200)}")
