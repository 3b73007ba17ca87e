"""Kernels as methods of a client: what `dir`, `help`, tab completion and a notebook's `?` show."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import Parameter, Signature
from typing import Any, Generic, TypeVar

from unlatch.common.kernel.spec import ArraySpec, KernelSpec, ScalarSpec

R = TypeVar("R")

_OF_EVERY_CALL = (
    Parameter("timeout", Parameter.KEYWORD_ONLY, default=None, annotation=float),
    Parameter("priority", Parameter.KEYWORD_ONLY, default="normal", annotation=str),
)


class KernelMethod(partial[Any]):
    """A kernel as a method. Its docstring and signature are the kernel's, once the client has heard of them."""

    known_kernels: Callable[[], Mapping[str, KernelSpec]]

    @property
    def __name__(self) -> str:
        return str(self.args[0])

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]  # each has its own
        spec = self._spec()
        return None if spec is None else spec.doc

    @property
    def __signature__(self) -> Signature:
        spec = self._spec()
        if spec is None:
            raise AttributeError("__signature__")
        arrays = [
            Parameter(
                array.name,
                Parameter.POSITIONAL_OR_KEYWORD,
                default=None if array.optional else Parameter.empty,
                annotation=text(array),
            )
            for array in spec.inputs
        ]
        scalars = [_parameter(scalar) for scalar in spec.scalars]
        return Signature([*arrays, *scalars, *_OF_EVERY_CALL], return_annotation=", ".join(map(text, spec.outputs)))

    def _spec(self) -> KernelSpec | None:
        return self.known_kernels().get(self.__name__)


class KernelMethods(Generic[R]):
    """A client whose methods are the kernels of its gateway, besides its own."""

    call: Callable[..., R]

    def __getattr__(self, name: str) -> Callable[..., R]:
        if name.startswith("_"):
            raise AttributeError(name)
        method = KernelMethod(self.call, name)
        method.known_kernels = self._known_kernels
        return method

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._known_kernels()]

    def _known_kernels(self) -> Mapping[str, KernelSpec]:
        """The kernels that the client has heard of, by name."""
        raise NotImplementedError


def text(array: ArraySpec) -> str:
    """The dtypes and axes of an array: float64|float32[rows cols]; of an optional one: … | None."""
    none = " | None" if array.optional else ""
    return f"{'|'.join(array.kinds) or 'any'}[{' '.join(array.dims)}]{none}"


def _parameter(scalar: ScalarSpec) -> Parameter:
    default = Parameter.empty if scalar.required else scalar.default
    return Parameter(scalar.name, Parameter.KEYWORD_ONLY, default=default, annotation=scalar.kind)
