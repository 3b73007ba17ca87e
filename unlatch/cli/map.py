"""`unlatch map`: call a kernel for every file of a pattern, or every row of an array, and write results to a directory.

An item is done when its files exist under their own names. So the same command, given again after Ctrl-C or a failure,
goes on where it ended. At most --in-flight items are in memory at a time.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from unlatch.cli.arguments import named, values
from unlatch.cli.call import by_name, outputs
from unlatch.cli.items import Item, Items, files, rows
from unlatch.cli.options import Parser, add_priority, client_parser, find, secured, token
from unlatch.cli.progress import ItemOutcome, Progress, progress
from unlatch.cli.writing import SUFFIXES, Destination
from unlatch.client import Client
from unlatch.common.errors import InvalidArgument, Unavailable, UnlatchError
from unlatch.common.flags import bounded_number
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.waiting.priority import PARAMETER
from unlatch.results import Result

# Pauses between tries, so that a worker's death or a gateway's restart need not cost an item of a pure kernel.
_PAUSES_SECONDS = (0.25, 1.0, 2.0, 4.0)


def parser() -> Parser:
    """The parser of the command's flags."""
    made = client_parser("map", "Call a kernel for many files, or for each row of an array.")
    made.add_argument("kernel", help="name of the kernel")
    made.add_argument(
        "arguments",
        nargs="+",
        metavar="name=value",
        help="as for call; one array is a pattern of files, such as image=@'photos/*.png'",
    )
    add_priority(made)
    made.add_argument("-o", "--output", required=True, help="directory for results, which get their inputs' names")
    made.add_argument("--rows", action="store_true", help="the first array is one file, and each of its rows an item")
    kinds = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
    made.add_argument("--to", help=f"format of results: {kinds} (default: npy; npz for several outputs)")
    made.add_argument("--in-flight", type=_count, default=16, help="maximum items at a time (default: 16)")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch map`; returns the exit code."""
    options = parser().parse(arguments)
    return asyncio.run(_run(options))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The values that are the same for all items."""

    mesh: Client
    spec: KernelSpec
    name: str
    constants: dict[str, Any]
    directory: Path
    suffix: str

    def destination(self, item: Item) -> Destination:
        return Destination(str(self.directory / f"{item.name}{self.suffix}"), outputs(self.spec))

    async def do(self, item: Item) -> list[Path]:
        """Read an item, call the kernel, write the results. Raises UnlatchError."""
        destination = self.destination(item)
        given: dict[str, Any] = {self.name: await asyncio.to_thread(item.read), **self.constants}
        result = await self._called(given)
        await asyncio.to_thread(destination.write, by_name(self.spec, result))
        return destination.paths

    async def _called(self, given: dict[str, Any]) -> Result:
        for pause_seconds in _PAUSES_SECONDS if self.spec.pure else ():
            try:
                return await self.mesh.call(self.spec.name, **given)
            except Unavailable:
                await asyncio.sleep(pause_seconds)
        return await self.mesh.call(self.spec.name, **given)


async def _run(options: Any) -> int:
    async with Client(options.server, tls=secured(options), timeout=options.timeout, token=token(options)) as mesh:
        spec = find(await mesh.kernels(), options.kernel)
        name, items, constants = _prepared(spec, options)
        work = _Work(
            mesh=mesh,
            spec=spec,
            name=name,
            constants=constants | {PARAMETER: options.priority},
            directory=Path(options.output),
            suffix=_suffix(spec, options.to),
        )
        todo, done = _split(work, items)
        with progress(len(items), as_json=options.json) as shown:
            for item in done:
                shown.told(ItemOutcome(item.name, item.source, "skipped"))
            await _work(work, iter(todo), shown, options.in_flight)
    return 0 if shown.complete else 1


def _prepared(spec: KernelSpec, options: Any) -> tuple[str, Items, dict[str, Any]]:
    """The name of the varying argument, its items, and all other arguments. Raises InvalidArgument."""
    texts = named(spec, options.arguments)
    arrays = {array.name: array for array in spec.inputs}
    given = [name for name in texts if name in arrays]
    varying = given[:1] if options.rows else [name for name in given if _is_pattern(texts[name])]
    if len(varying) != 1:
        wanted = "wanted one array as a pattern of files, name=@'directory/*.npy', or as a file with --rows"
        raise InvalidArgument(f"{wanted}; got {len(varying)}")
    (name,) = varying
    constants = values(spec, {other: text for other, text in texts.items() if other != name})
    text, array = texts[name], arrays[name]
    items = rows(text, array) if options.rows else files(text, array, Path(options.output))
    return name, items, constants


def _suffix(spec: KernelSpec, to: str | None) -> str:
    return f".{to.removeprefix('.')}" if to else ".npy" if len(spec.outputs) == 1 else ".npz"


def _is_pattern(text: str) -> bool:
    return text.startswith("@") and any(sign in text for sign in "*?[")


def _split(work: _Work, items: Items) -> tuple[list[Item], list[Item]]:
    """Items to do, and items already done. Raises InvalidArgument if two items would write the same file."""
    names: dict[str, Item] = {}
    for item in items:
        other = names.setdefault(item.name, item)
        if other is not item:
            raise InvalidArgument(f"{work.name}: {other.source} and {item.source} would both write {item.name}")
    todo: list[Item] = []
    done: list[Item] = []
    for item in items:
        exists = all(path.exists() for path in work.destination(item).paths)
        (done if exists else todo).append(item)
    for directory in {path.parent for item in todo for path in work.destination(item).paths}:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(f"output: {directory}: {error.strerror}", field="output") from None
    return todo, done


async def _work(work: _Work, todo: Iterator[Item], shown: Progress, in_flight: int) -> None:
    """Work on items in `in_flight` tasks. All tasks end early if the gateway stays unavailable."""
    unavailable = 0

    async def take() -> None:
        nonlocal unavailable
        for item in todo:
            began = monotonic()
            try:
                paths = await work.do(item)
            except UnlatchError as error:
                unavailable = unavailable + 1 if isinstance(error, Unavailable) else 0
                shown.told(ItemOutcome(item.name, item.source, "failed", error=error))
                if unavailable >= 2 * in_flight:
                    return
            else:
                unavailable = 0
                shown.told(ItemOutcome(item.name, item.source, "done", paths, monotonic() - began))

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(take())


def _count(text: str) -> int:
    return bounded_number(text, int, 1, 1024, "a number of items")
