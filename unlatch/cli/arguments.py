"""Arguments of a call, given as `name=value` on the command line."""

from collections.abc import Iterable
from typing import Any

from unlatch.cli import reading
from unlatch.common.errors import InvalidArgument, near
from unlatch.common.kernel.spec import KernelSpec


def named(spec: KernelSpec, given: Iterable[str]) -> dict[str, str]:
    """Each argument's text by its name. Raises InvalidArgument for an unknown, repeated or missing name."""
    known = [*(array.name for array in spec.inputs), *(scalar.name for scalar in spec.scalars)]
    texts: dict[str, str] = {}
    for argument in given:
        name, _, text = argument.partition("=")
        if argument.find("=") < 1:
            raise InvalidArgument(f"{argument[:64]}: wanted name=value")
        if name not in known:
            raise InvalidArgument(f"{name}: kernel {spec.name} has no such argument{near(name, known)}", field=name)
        if name in texts:
            raise InvalidArgument(f"{name}: given twice", field=name)
        texts[name] = text
    for name in _required(spec):
        if name not in texts:
            raise InvalidArgument(f"{name}: kernel {spec.name} requires it: {name}=…", field=name)
    return texts


def _required(spec: KernelSpec) -> list[str]:
    arrays = [array.name for array in spec.inputs if not array.optional]
    return arrays + [scalar.name for scalar in spec.scalars if scalar.required]


def values(spec: KernelSpec, texts: dict[str, str]) -> dict[str, Any]:
    """Convert texts to arguments. Raises InvalidArgument naming the argument that cannot be read."""
    arrays = {array.name: array for array in spec.inputs}
    if sum(text == "@-" for name, text in texts.items() if name in arrays) > 1:
        raise InvalidArgument("stdin holds one array, so only one argument can be @-")
    scalars = {scalar.name: scalar for scalar in spec.scalars}
    return {
        name: reading.array(text, arrays[name]) if name in arrays else scalars[name].read(text)
        for name, text in texts.items()
    }
