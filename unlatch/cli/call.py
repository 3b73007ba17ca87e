"""`unlatch call`: one call, with arrays from files or the command line, and results to a file or the screen."""

import json
from collections.abc import Sequence

from unlatch.blocking import BlockingClient
from unlatch.cli import showing
from unlatch.cli.arguments import named, values
from unlatch.cli.options import Parser, add_priority, client_parser, find, secured, token
from unlatch.cli.writing import Destination
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.kernel.tensors import Array
from unlatch.results import Result


def parser() -> Parser:
    """The parser of the command's flags."""
    made = client_parser("call", "Call a kernel.")
    made.add_argument("kernel", help="name of the kernel")
    made.add_argument(
        "arguments",
        nargs="*",
        metavar="name=value",
        help="an array as @file (.npy, .npz, .npz:member, .csv, an image), @- (.npy on stdin) or JSON; or a scalar",
    )
    add_priority(made)
    made.add_argument(
        "-o", "--output", help="file for the result, format by suffix; - is .npy on stdout; without it, printed"
    )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch call`; returns the exit code."""
    flags = parser()
    options = flags.parse(arguments)
    if options.json and options.output == "-":
        flags.error("--json and -o - cannot be combined: both write to stdout")
    with BlockingClient(options.server, tls=secured(options), timeout=options.timeout, token=token(options)) as mesh:
        spec = find(mesh.kernels(), options.kernel)
        texts = named(spec, options.arguments)
        destination = None if options.output is None else Destination(options.output, outputs(spec))
        result = by_name(spec, mesh.call(options.kernel, priority=options.priority, **values(spec, texts)))
    if destination is not None:
        destination.write(result)
    if options.json:
        print(json.dumps(_told(spec, result, destination)))
    elif destination is None:
        print("\n".join(showing.text(name, array) for name, array in result.items()))
    return 0


def outputs(spec: KernelSpec) -> list[str]:
    """The names of a kernel's outputs."""
    return [output.name for output in spec.outputs]


def by_name(spec: KernelSpec, result: Result) -> dict[str, Array]:
    """A call's result as arrays by output name."""
    names = outputs(spec)
    return {names[0]: result} if len(names) == 1 else dict(zip(names, result, strict=True))


def _told(spec: KernelSpec, result: dict[str, Array], destination: Destination | None) -> dict[str, object]:
    show = showing.as_json if destination is None else showing.description
    outputs = [show(output.name, result[output.name], text=output.text) for output in spec.outputs]
    if destination is None:
        return {"kernel": spec.name, "outputs": outputs}
    return {
        "kernel": spec.name,
        "outputs": outputs,
        "files": [str(path) for path in destination.paths],
    }
