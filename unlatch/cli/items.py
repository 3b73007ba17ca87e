"""The items of a `map`: files that match a pattern, or rows of an array. Each is read when its turn comes."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from unlatch.cli import reading
from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.spec import ArraySpec
from unlatch.common.kernel.tensors import Array


@dataclass(frozen=True, slots=True)
class Item:
    """A file or row. `name` is the path of its results in the output directory, without suffix. `read` may raise."""

    name: str
    source: str
    read: Callable[[], Array]


Items = Sequence[Item]


def files(text: str, wanted: ArraySpec, results: Path) -> Items:
    """Find the files of @'photos/*.png', each named by its path after the pattern's fixed part. ** is any directories.

    Files in `results` are left out, since the pattern may match files that an earlier map wrote.
    """
    pattern = text.removeprefix("@")
    root = Path(*_before(Path(pattern).parts, "*?["))
    # glob, since Path.glob accepts no pattern that begins at the root or with "..".
    like = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    found = [name for name in like if Path(name).is_file() and not _lies_in(results, name)]
    if not found:
        raise InvalidArgument(f"{wanted.name}: no file matches {pattern}", field=wanted.name)
    return [
        Item(str(Path(name).relative_to(root).with_suffix("")), name, partial(reading.file, name, wanted))
        for name in found
    ]


def rows(text: str, wanted: ArraySpec) -> Items:
    """Entries of @points.npy along the first axis, each named by its number. An .npy is mapped, not loaded."""
    if not text.startswith("@"):
        raise InvalidArgument(f"{wanted.name}: wanted {wanted.name}=@file for --rows", field=wanted.name)
    # Read with the file's own shape, since the kernel's is that of a row.
    whole = ArraySpec(name=wanted.name, dtypes=wanted.dtypes, dims=("...",))
    array = _mapped(text[1:], wanted) if text.endswith(".npy") else reading.file(text[1:], whole)
    if array.ndim == 0:
        raise InvalidArgument(f"{wanted.name}: {text[1:]} is one number and has no rows", field=wanted.name)
    digits = len(str(max(len(array) - 1, 0)))
    return [Item(f"{row:0{digits}}", f"row {row}", partial(_row, array, row)) for row in range(len(array))]


def _lies_in(directory: Path, name: str) -> bool:
    return Path(name).resolve().is_relative_to(directory.resolve())


def _mapped(path: str, wanted: ArraySpec) -> Array:
    try:
        mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidArgument(f"{wanted.name}: {path}: {error}", field=wanted.name) from None
    return mapped


def _row(array: Array, row: int) -> Array:
    return np.array(array[row])


def _before(parts: Sequence[str], signs: str) -> Sequence[str]:
    """The parts of a pattern's path before the first wildcard, without the last part, which is a file's name."""
    for at, part in enumerate(parts[:-1]):
        if any(sign in part for sign in signs):
            return parts[:at]
    return parts[:-1]
