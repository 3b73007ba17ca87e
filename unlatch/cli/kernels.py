"""`unlatch kernels`: the kernels that a gateway serves, and how to call one of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from unlatch.blocking import BlockingClient
from unlatch.cli import plain
from unlatch.cli.options import Parser, client_parser, find, secured, token
from unlatch.cli.showing import number
from unlatch.cli.signatures import example, lines, signature, written
from unlatch.common.kernel.spec import KernelSpec

_SERVER = "127.0.0.1:8001"


def parser() -> Parser:
    """The parser of the command's flags."""
    made = client_parser("kernels", "List the kernels of a gateway, or describe one with all that its callers need.")
    made.add_argument("kernel", nargs="?", help="show this kernel's signature, text, options and an example")
    made.add_argument(
        "--names",
        action="store_true",
        help="print only names, one a line: of the kernels, or of a kernel's arguments, with their choices",
    )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch kernels`; returns the exit code."""
    options = parser().parse(arguments)
    with BlockingClient(options.server, tls=secured(options), timeout=options.timeout, token=token(options)) as mesh:
        chosen = [find(mesh.kernels(), options.kernel)] if options.kernel else mesh.kernels()
    if options.names:
        print("\n".join(_arguments(chosen[0]) if options.kernel else [spec.name for spec in chosen]))
    elif options.json:
        told = [_told(spec) for spec in chosen]
        print(json.dumps(told[0] if options.kernel else told))
    elif options.kernel:
        _show(chosen[0], options.server)
    else:
        _list(chosen)
    return 0


def _arguments(spec: KernelSpec) -> list[str]:
    """The arguments as a call writes them, `name=`; one of choices once with each, unless it is a list."""
    told = [f"{array.name}=" for array in spec.inputs]
    for scalar in spec.scalars:
        values = [written(value) for value in scalar.choices] if scalar.choices and not scalar.many else [""]
        told += [f"{scalar.name}={value}" for value in values]
    return told


def _list(kernels: Sequence[KernelSpec]) -> None:
    name = Column("kernel", no_wrap=True)
    table = Table(name, "signature", "what it does", box=None, header_style="bold", pad_edge=False)
    for spec in kernels:
        table.add_row(*(Text(plain(text)) for text in (spec.name, signature(spec), spec.doc.partition("\n")[0])))
    Console().print(table)


def _show(spec: KernelSpec, server: str) -> None:
    # Printed without a table and without wrapping, so that the example at the end can be copied.
    parts = [lines(spec), spec.doc, "\n".join(_options(spec)), example(spec, "" if server == _SERVER else server)]
    print(plain("\n\n".join(part for part in parts if part)))


def _options(spec: KernelSpec) -> list[str]:
    told = [f"version {spec.version}", "pure: may be run again" if spec.pure else "not pure: is run at most once"]
    if spec.batch:
        told.append(f"batches of up to {spec.max_batch_size}")
    if spec.nonempty:
        told.append("no empty arrays")
    if spec.timeout_seconds is not None:
        told.append(f"at most {spec.timeout_seconds:g} s")
    if spec.memory_bytes is not None:
        told.append(f"at most {spec.memory_bytes} bytes of memory")
    return told


def _told(spec: KernelSpec) -> dict[str, Any]:
    told = asdict(spec)
    for scalar in told["scalars"]:
        default = scalar["default"]
        scalar["default"] = [_plain(one) for one in default] if isinstance(default, tuple) else _plain(default)
        scalar["choices"] = [_plain(one) for one in scalar["choices"]]
    return told


def _plain(value: Any) -> Any:
    return number(value) if isinstance(value, float) else value
