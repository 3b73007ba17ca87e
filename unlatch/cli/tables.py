"""Tables of numbers as CSV files: each number is read as it is, or refused with its line and column."""

import csv
from pathlib import Path
from typing import IO

import numpy as np

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.numbers import number
from unlatch.common.kernel.spec import ArraySpec
from unlatch.common.kernel.tensors import Array
from unlatch.conversion import refusal, to_array


def read(path: str, wanted: ArraySpec) -> Array:
    """Read a table with two axes, in a dtype that the kernel takes. Raises InvalidArgument, or ValueError.

    A first line without numbers is skipped. An empty cell is NaN, and so is an empty line in a single column, unless
    it is at the end of the file.
    """
    lines, rows = _rows(path)
    if not rows:
        raise refusal(wanted, f"{path} has no numbers")
    table = np.empty((len(rows), len(rows[0])), dtype=object)
    for line, row, numbers in zip(lines, rows, table, strict=True):
        if len(row) != len(numbers):
            raise ValueError(f"line {line}: wanted {len(numbers)} columns, got {len(row)}")
        for column, cell in enumerate(row):
            place = f"line {line}, column {column + 1}"
            try:
                numbers[column] = number(cell) if cell.strip() else np.nan
            except OverflowError as error:
                raise ValueError(f"{place}: {error}") from None
            except ValueError as error:
                raise ValueError(f"{place}: {error}; wanted numbers separated by commas") from None
    try:
        return to_array(wanted, table)
    except InvalidArgument as error:
        raise _placed(error, path, lines, table, wanted) from None


def _rows(path: str) -> tuple[list[int], list[list[str]]]:
    """The cells of each row of numbers, with the numbers of the lines."""
    with Path(path).open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened)
        rows = [(reader.line_num, row or [""]) for row in reader]
    while rows and rows[-1][1] == [""]:
        rows.pop()
    first = [cell for cell in rows[0][1] if cell.strip()] if rows else []
    if first and not any(map(_is_number, first)):
        rows = rows[1:]
    return [line for line, _ in rows], [row for _, row in rows]


def _placed(error: InvalidArgument, path: str, lines: list[int], table: Array, wanted: ArraySpec) -> InvalidArgument:
    """The error for a table, with the place of the first cell that the kernel would not take by itself either."""
    for (row, column), cell in np.ndenumerate(table):
        try:
            to_array(wanted, cell)
        except InvalidArgument as its_own:
            told = its_own.message.removeprefix(f"{wanted.name}: ")
            return refusal(wanted, f"{path}: line {lines[row]}, column {column + 1}: {told}")
    return error


def write(file: IO[bytes], numbers: Array) -> None:
    """Write a table; an array with one axis as a column, as it is read."""
    for row in numbers.reshape(-1, 1) if numbers.ndim < 2 else numbers:
        file.write((",".join(map(str, row)) + "\n").encode())


def _is_number(cell: str) -> bool:
    try:
        number(cell)
    except OverflowError:
        return True
    except ValueError:
        return False
    return True
