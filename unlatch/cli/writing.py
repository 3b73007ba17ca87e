"""Results written to files: format by suffix, and whole or not at all."""

import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from unlatch.cli import images, tables
from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.tensors import Array

SUFFIXES = (".npy", ".npz", ".csv", *images.SUFFIXES)
_FIELD = "output"


class Destination:
    """The files for a kernel's outputs. A path that cannot be used is refused before the call is made.

    An .npz holds all outputs by name. With any other suffix each output gets its own file: OUT.npy if there is one,
    OUT-name.npy if there are several. "-" is .npy on stdout, for one output.
    """

    def __init__(self, path: str, outputs: Sequence[str]) -> None:
        self._stdout = path == "-"
        self._path = Path(path)
        self._outputs = outputs
        self._suffix = self._path.suffix.lower()
        if self._stdout:
            if len(outputs) != 1:
                raise _refusal(f"stdout takes one array, but there are {', '.join(outputs)}: write an .npz file")
        elif self._suffix not in SUFFIXES:
            raise _refusal(f"{path}: unknown suffix; wanted one of {', '.join(SUFFIXES)}")
        elif self._suffix in images.SUFFIXES:
            images.pillow(_FIELD)

    @property
    def paths(self) -> list[Path]:
        """The files that will be written."""
        if self._stdout:
            return []
        if len(self._outputs) == 1 or self._suffix == ".npz":
            return [self._path]
        return [self._path.with_name(f"{self._path.stem}-{name}{self._path.suffix}") for name in self._outputs]

    def write(self, arrays: Mapping[str, Array]) -> None:
        """Write every output. Raises InvalidArgument for an array that the format cannot hold, or for a full disk."""
        if self._stdout:
            # Written whole, since NumPy asks for the file's position, which a pipe does not have.
            whole = BytesIO()
            np.lib.format.write_array(whole, _storable(*arrays.values()), allow_pickle=False)
            sys.stdout.buffer.write(whole.getbuffer())
        elif self._suffix == ".npz":
            self._write(self._path, arrays)
        else:
            for path, (name, array) in zip(self.paths, arrays.items(), strict=True):
                self._write(path, {name: array})

    def _write(self, path: Path, arrays: Mapping[str, Array]) -> None:
        # A file under its own name is always complete, even after an interruption: `map` relies on that to continue.
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                self._fill(file, arrays)
            partial.replace(path)
        except OSError as error:
            raise _refusal(f"{path}: {error.strerror or error}") from None
        finally:
            with suppress(OSError):
                partial.unlink()

    def _fill(self, file: IO[bytes], arrays: Mapping[str, Array]) -> None:
        if self._suffix == ".npz":
            # Not numpy.savez, which would take an output named "file" for its own argument.
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, _storable(array), allow_pickle=False)
            return
        (array,) = arrays.values()
        if self._suffix == ".npy":
            np.lib.format.write_array(file, _storable(array), allow_pickle=False)
        elif self._suffix == ".csv":
            if array.ndim > 2 or array.dtype.kind not in "biuf":
                raise _refusal(
                    f"a .csv holds real numbers on one or two axes, not {array.dtype} of shape {array.shape}"
                )
            tables.write(file, array.astype(np.uint8) if array.dtype.kind == "b" else array)
        elif array.dtype.kind == "O" and array.size == 1:
            # A picture that the kernel itself has encoded.
            file.write(array.item())
        else:
            images.write(file, array, self._suffix, _FIELD)


def _storable(array: Array) -> Array:
    """Convert BYTES, which are objects that no .npy holds without pickling, to strings. Raises if they are not text."""
    if array.dtype.kind != "O":
        return array
    try:
        texts = [element.decode() for element in array.reshape(-1)]
    except UnicodeDecodeError:
        raise _refusal("bytes that are not text cannot be written to any of these formats") from None
    return np.array(texts, dtype=np.str_).reshape(array.shape)


def _refusal(why: str) -> InvalidArgument:
    return InvalidArgument(f"{_FIELD}: {why}", field=_FIELD)
