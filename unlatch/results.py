"""The result of a call: one array, or a named tuple of arrays."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from unlatch.common.kernel.tensors import Array

Result = Any


def result(kernel: str, names: Sequence[str], outputs: list[Array]) -> Result:
    """A kernel's outputs in the form in which its caller gets them."""
    return outputs[0] if len(outputs) == 1 else _tuple(kernel, tuple(names))(*outputs)


@cache
def _tuple(kernel: str, names: tuple[str, ...]) -> Callable[..., Any]:
    return namedtuple(kernel, names)  # noqa: PYI024 (the names come from the server)
