"""Arrays on the command line: from a file by its suffix, from stdin, or from JSON."""

import json
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from unlatch.cli import images, tables
from unlatch.common.errors import near
from unlatch.common.kernel.numbers import number
from unlatch.common.kernel.spec import ELLIPSIS, ArraySpec
from unlatch.common.kernel.tensors import Array
from unlatch.conversion import refusal

# Errors of NumPy, zipfile and zlib for files that are damaged, or that claim to be larger than memory.
_UNREADABLE = (OSError, ValueError, EOFError, MemoryError, NotImplementedError, BadZipFile, zlib.error)
_FORMATS = ".npy, .npz, .csv, an image such as .png, or @- for .npy on stdin"


def array(text: str, wanted: ArraySpec) -> Any:
    """Read an array argument: @file, @file.npz:member, @- or JSON. Raises InvalidArgument naming the argument."""
    if text.startswith("@"):
        return file(text[1:], wanted)
    try:
        return json.loads(text, parse_float=number)
    except (json.JSONDecodeError, RecursionError) as error:
        raise refusal(wanted, f"wanted @file or a JSON array: {error}") from None
    except OverflowError as error:
        raise refusal(wanted, str(error)) from None
    except ValueError:
        raise refusal(wanted, "wanted numbers of at most 4,300 digits") from None


def file(name: str, wanted: ArraySpec) -> Array:
    """Read an array from a file. Raises InvalidArgument naming the argument."""
    try:
        return _read(name, wanted)
    except _UNREADABLE as error:
        raise refusal(wanted, f"{name or 'no file'}: {getattr(error, 'strerror', None) or error}") from None


def _read(name: str, wanted: ArraySpec) -> Array:
    if name == "-":
        # Read whole, since NumPy asks for the file's position, which a pipe does not have.
        return np.lib.format.read_array(BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    path, archive, member = name.rpartition(".npz:")
    if archive:
        return _member(f"{path}.npz", member, wanted)
    suffix = Path(name).suffix.lower()
    if suffix == ".npy":
        loaded: Array = np.load(name, allow_pickle=False)
        return loaded
    if suffix == ".npz":
        return _member(name, "", wanted)
    if suffix == ".csv":
        return _with_wanted_axes(tables.read(name, wanted), wanted)
    if suffix in images.SUFFIXES:
        return images.read(name, wanted.name)
    raise refusal(wanted, f"{name}: unknown suffix; wanted {_FORMATS}")


def _member(path: str, member: str, wanted: ArraySpec) -> Array:
    with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        members = list(archive)
        chosen = member or (members[0] if len(members) == 1 else wanted.name)
        if chosen not in members:
            raise refusal(wanted, f"{path} has no member {chosen!r}{near(chosen, members)}")
        loaded: Array = archive[chosen]
        return loaded


def _with_wanted_axes(table: Array, wanted: ArraySpec) -> Array:
    """A table with one axis rather than two, if the kernel wants that, or if the table is a single column."""
    axes = None if any(dim == ELLIPSIS or dim.startswith("*") for dim in wanted.dims) else len(wanted.dims)
    if axes != 2 and table.shape[1] == 1:
        table = table[:, 0]
    elif axes == 1 and table.shape[0] == 1:
        table = table[0]
    return table
