"""Arrays on the command line: from a file by its suffix, from stdin, or from JSON."""

import json
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from unlatch.cli import images
from unlatch.cli.fit import typed, untyped
from unlatch.common.errors import InvalidArgument, near
from unlatch.common.kernel.spec import ELLIPSIS, ArraySpec
from unlatch.common.kernel.tensors import Array

# Errors of NumPy, zipfile and zlib for files that are damaged, or that claim to be larger than memory.
_UNREADABLE = (OSError, ValueError, EOFError, MemoryError, NotImplementedError, BadZipFile, zlib.error)
_FORMATS = ".npy, .npz, .csv, an image such as .png, or @- for .npy on stdin"


def array(text: str, wanted: ArraySpec) -> Array:
    """Read an array argument: @file, @file.npz:member, @- or JSON. Raises InvalidArgument naming the argument."""
    if text.startswith("@"):
        return file(text[1:], wanted)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(wanted, f"wanted @file or a JSON array: {error}") from None
    return untyped(values, wanted)


def file(name: str, wanted: ArraySpec) -> Array:
    """Read an array from a file. Raises InvalidArgument naming the argument."""
    try:
        return _read(name, wanted)
    except _UNREADABLE as error:
        raise _refusal(wanted, f"{name or 'no file'}: {getattr(error, 'strerror', None) or error}") from None


def _read(name: str, wanted: ArraySpec) -> Array:
    if name == "-":
        # Read whole, since NumPy asks for the file's position, which a pipe does not have.
        return typed(np.lib.format.read_array(BytesIO(sys.stdin.buffer.read()), allow_pickle=False), wanted)
    path, archive, member = name.rpartition(".npz:")
    if archive:
        return _member(f"{path}.npz", member, wanted)
    suffix = Path(name).suffix.lower()
    if suffix == ".npy":
        return typed(np.load(name, allow_pickle=False), wanted)
    if suffix == ".npz":
        return _member(name, "", wanted)
    if suffix == ".csv":
        return _table(name, wanted)
    if suffix in images.SUFFIXES:
        return typed(images.read(name, wanted.name), wanted)
    raise _refusal(wanted, f"{name}: unknown suffix; wanted {_FORMATS}")


def _member(path: str, member: str, wanted: ArraySpec) -> Array:
    with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        members = list(archive)
        chosen = member or (members[0] if len(members) == 1 else wanted.name)
        if chosen not in members:
            raise _refusal(wanted, f"{path} has no member {chosen!r}{near(chosen, members)}")
        return typed(archive[chosen], wanted)


def _table(path: str, wanted: ArraySpec) -> Array:
    """Read the numbers of a CSV file, exactly if the kernel takes only whole numbers. One column gives one axis."""
    skipped = 0 if _is_numbers(path) else 1
    exact = wanted.dtypes and not any(np.dtype(dtype).kind in "fc" for dtype in wanted.dtypes)
    load: dict[str, Any] = {"delimiter": ",", "skiprows": skipped, "ndmin": 2, "encoding": "utf-8-sig"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty files, which get an error below
        try:
            table = np.loadtxt(path, np.int64 if exact else np.float64, **load)
        except ValueError:
            table = np.loadtxt(path, np.float64, **load)
    if not table.size:
        raise _refusal(wanted, f"{path} has no numbers")
    return untyped(_with_wanted_axes(table, wanted), wanted)


def _with_wanted_axes(table: Array, wanted: ArraySpec) -> Array:
    """A table with one axis rather than two, if the kernel wants that, or if the table is a single column."""
    axes = None if any(dim == ELLIPSIS or dim.startswith("*") for dim in wanted.dims) else len(wanted.dims)
    if axes != 2 and table.shape[1] == 1:
        table = table[:, 0]
    elif axes == 1 and table.shape[0] == 1:
        table = table[0]
    return table


def _is_numbers(path: str) -> bool:
    with Path(path).open(encoding="utf-8-sig") as opened:
        first = opened.readline()
    try:
        [float(cell) for cell in first.split(",")]
    except ValueError:
        return False
    return True


def _refusal(wanted: ArraySpec, why: str) -> InvalidArgument:
    return InvalidArgument(f"{wanted.name}: {why}", field=wanted.name)
