"""Transforms of sampled signals."""

import numpy as np
from jaxtyping import Complex, Inexact

from unlatch import kernel

# Rows are transformed in blocks of about this many samples: a block and its spectrum fit the cache of one core.
_BLOCK_SAMPLES = 32_768


@kernel(pure=True)
def fft(x: Inexact[np.ndarray, "*batch n"]) -> Complex[np.ndarray, "*batch n"]:
    """The discrete Fourier transform of every row: along the last axis, all n frequencies, unscaled.

    `x` is real or complex; axes before the last are a batch. float64 and complex128 give complex128, smaller floats and
    complex64 give complex64 (computed in double precision, rounded once). An empty `x` gives an empty result. A NaN or
    an infinity spoils its own row only. Nothing is raised: work and memory follow the size of `x`, for prime n too.
    Source: pocketfft, with Bluestein's algorithm for large primes (`scipy.fft.fft`).
    """
    double = x.dtype in (np.float64, np.complex128)
    spectrum = np.empty(x.shape, np.complex128 if double else np.complex64)
    if x.size == 0:
        return spectrum
    samples = x.shape[-1]
    rows, transformed = x.reshape(-1, samples), spectrum.reshape(-1, samples)
    transform = _transform_complex if x.dtype.kind == "c" else _transform_real
    block_rows = max(1, _BLOCK_SAMPLES // samples)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(rows), block_rows):
            block = slice(first, first + block_rows)
            transform(rows[block], transformed[block])
    return spectrum


def _transform_complex(rows: np.ndarray, out: np.ndarray) -> None:
    # NumPy's own single-precision transform takes longer than its double-precision one (NumPy 2.4).
    out[...] = np.fft.fft(rows.astype(np.complex128, copy=False))


def _transform_real(rows: np.ndarray, out: np.ndarray) -> None:
    # Half of a real signal's spectrum is the conjugate of the other: half of the work, too.
    samples = rows.shape[1]
    half = np.fft.rfft(rows.astype(np.float64, copy=False))
    out[:, : samples // 2 + 1] = half
    np.conjugate(half[:, (samples - 1) // 2 : 0 : -1], out=out[:, samples // 2 + 1 :], casting="same_kind")
