"""`Bytes`: the annotation of arrays of byte strings, which jaxtyping does not have."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Annotated as Bytes
else:
    from jaxtyping import AbstractDtype

    class Bytes(AbstractDtype):
        """An array of byte strings, which a kernel gets as `bytes` objects: BYTES in the Open Inference Protocol."""

        # jaxtyping knows a dtype by the name of its scalar type. A kernel may return any of these.
        dtypes = ("object_", "bytes_", "str_")


__all__ = ["Bytes"]
