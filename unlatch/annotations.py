"""`Bytes` and `Str`: the annotations of arrays of byte strings and of texts, which jaxtyping does not have."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Annotated as Bytes
    from typing import Annotated as Str
else:
    from jaxtyping import AbstractDtype

    class Bytes(AbstractDtype):
        """An array of byte strings, which a kernel gets as `bytes` objects: BYTES in the Open Inference Protocol."""

        # jaxtyping knows a dtype by the name of its scalar type. A kernel may return any of these.
        dtypes = ("object_", "bytes_", "str_")

    class Str(AbstractDtype):
        """An array of texts, which a kernel gets as `str` objects: BYTES in UTF-8 in the Open Inference Protocol."""

        # The last one is that of NumPy's StringDType.
        dtypes = ("object_", "str_", "str")


__all__ = ["Bytes", "Str"]
