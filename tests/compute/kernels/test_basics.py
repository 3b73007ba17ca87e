"""`identity`: the output equals the input."""

import numpy as np
import pytest

from unlatch.compute.kernels.basics import identity


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", "f8", "c16", "M8[ns]", "S3", "U3"])
def test_identity_returns_what_came(dtype: str, shape: tuple[int, ...]) -> None:
    """An array of any dtype and any shape comes back unchanged."""
    x = np.zeros(shape, dtype)
    y = identity(x)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.tobytes() == x.tobytes()
