"""`name=value` on the command line, as a kernel wants it."""

from collections.abc import Iterable
from typing import Any

from unlatch.cli import reading
from unlatch.common.errors import InvalidArgument, near
from unlatch.common.kernel.spec import KernelSpec


def named(spec: KernelSpec, given: Iterable[str]) -> dict[str, str]:
    """Each argument's text by its name. Raises InvalidArgument for a name the kernel lacks, one twice, one missing."""
    known = [*(array.name for array in spec.inputs), *(scalar.name for scalar in spec.scalars)]
    texts: dict[str, str] = {}
    for argument in given:
        name, equals, text = argument.partition("=")
        if not equals:
            raise InvalidArgument(f"{argument[:64]}: an argument is given as name=value")
        if name not in known:
            raise InvalidArgument(f"{name}: kernel {spec.name} has no such argument{near(name, known)}", field=name)
        if name in texts:
            raise InvalidArgument(f"{name}: given twice", field=name)
        texts[name] = text
    required = [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars if scalar.required]
    for name in required:
        if name not in texts:
            raise InvalidArgument(f"{name}: kernel {spec.name} needs it: {name}=…", field=name)
    return texts


def values(spec: KernelSpec, texts: dict[str, str]) -> dict[str, Any]:
    """The arguments themselves. Raises InvalidArgument naming the one that cannot be read."""
    arrays = {array.name: array for array in spec.inputs}
    if sum(text == "@-" for name, text in texts.items() if name in arrays) > 1:
        raise InvalidArgument("stdin holds one array: only one argument can be @-")
    scalars = {scalar.name: scalar for scalar in spec.scalars}
    return {
        name: reading.array(text, arrays[name]) if name in arrays else scalars[name].read(text)
        for name, text in texts.items()
    }
