"""Stand-ins for other libraries' arrays, which mean more than their numbers. The tests do not install them."""

from typing import Any

import numpy as np


class _Foreign:
    """An object of another library. Its text has no address, so that each process of tests gives a test one name."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Dimensional(_Foreign):
    """A number with a unit, as pint makes them."""

    def __init__(self, magnitude: float) -> None:
        self.magnitude = magnitude

    @property
    def units(self) -> str:
        return "kilometre"

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.magnitude, dtype=dtype)


class Sparse(_Foreign):
    """A matrix that NumPy takes for an object."""

    def toarray(self) -> Any:
        return np.zeros((2, 2))


class Nullable(_Foreign):
    """A column with a missing value, in a dtype of its own, as pandas makes them."""

    dtype = "Int64"

    def isna(self) -> Any:
        return np.array([False, True])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array([2**53 + 1, np.nan])


class Annotated(np.ndarray[Any, Any]):
    """An array whose elements a further attribute gives another meaning, as those of unyt and astropy."""

    @classmethod
    def of(cls, **attributes: Any) -> Any:
        array = np.arange(2.0).view(cls)
        array.__dict__.update(attributes)
        return array
