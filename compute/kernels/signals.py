"""Transforms of sampled signals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Complex, Inexact

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import working_dtype
from unlatch.compute.kernels.refusals import require_choice, require_finite, require_result_bytes

# Rows are transformed in blocks of about this many samples, so that data between passes stays in the caches. Smaller
# blocks would compute the tables of a large prime length again and again.
_BLOCK_SAMPLES = 131_072

# From 256 taps in float32, 128 in float64 and complex64, 64 in complex128, transforms are faster than products.
_FFT_TAP_BYTES = 1024

# With fewer outputs a product wastes the overhead of BLAS; with more it multiplies zeros.
_BLOCK_OUTPUTS = 32

# With a transform this many times longer than the taps, little is wasted on the overlap.
_FFT_PER_TAP = 8
_MIN_FFT_SAMPLES = 1024


class _Step(NamedTuple):
    """A way to convolve: it gives the last `hop` outputs of each window of `length` samples."""

    dtype: np.dtype[Any]
    length: int
    hop: int
    outputs: Callable[[np.ndarray], np.ndarray]


@kernel(pure=True)
def fft(x: Inexact[np.ndarray, "*batch n"]) -> Complex[np.ndarray, "*batch n"]:
    """Compute the discrete Fourier transform of every row: along the last axis, all n frequencies, unscaled.

    `x` is real or complex; axes before the last are a batch. float64 and complex128 give complex128, smaller floats and
    complex64 give complex64 (computed in double precision, rounded once). An empty `x` gives an empty result. A NaN or
    an infinity affects its own row only. Nothing is raised: work and memory follow the size of `x`, also for prime n.
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


@kernel(pure=True)
def convolve(
    x: Inexact[np.ndarray, "*batch n"], taps: Inexact[np.ndarray, "m"], *, mode: str = "full"
) -> Inexact[np.ndarray, "*batch samples"]:
    """Convolve every row with a filter's taps, along the last axis.

    `x` has shape (…, n), `taps` (m,). The last axis of the result has n + m - 1 samples with `mode` "full", the middle
    n of them with "same", and with "valid" the n - m + 1 that need no samples beyond the ends. The dtype is the common
    one of both; float16 gives float32. Many taps (from 64 to 256 on, by dtype) are computed by transforms in double
    precision, with errors relative to a row's largest values. A NaN or an infinity gives NaN in the m samples that
    depend on it only. Without samples or taps the result is zeros, or empty.

    Raises `KernelError` for another mode, for taps that are not finite, for "valid" with more taps than samples, and
    when the result would be larger than 64 MiB and than 16 times its arguments. Source: overlap-save, as in A.
    Oppenheim and R. Schafer, "Discrete-Time Signal Processing" (`scipy.signal.convolve`).
    """
    samples, reach = x.shape[-1], len(taps)
    require_choice("mode", mode, ("full", "same", "valid"))
    require_finite("taps", taps)
    if mode == "valid" and reach > samples:
        raise KernelError(f"taps: wanted at most the {samples} samples of x with mode valid, got {reach}")
    dtype = working_dtype(x, taps)
    first, count = _part(mode, samples, reach)
    require_result_bytes("x, taps", (*x.shape[:-1], count), dtype, x.nbytes + taps.nbytes)
    if x.size == 0 or reach == 0 or count == 0:
        return np.zeros((*x.shape[:-1], count), dtype)
    # Taps that affect none of the requested samples are left out.
    out_of_reach = max(0, first - samples + 1)
    taps = taps[out_of_reach : first + count]
    first, reach = first - out_of_reach, len(taps)
    rows = x.reshape(-1, samples)
    bad = ~np.isfinite(rows)
    spoiled = bad.any()
    if spoiled:
        rows = np.where(bad, 0, rows)
    with np.errstate(over="ignore", invalid="ignore"):
        by = _by_transforms if reach * dtype.itemsize >= _FFT_TAP_BYTES else _by_products
        convolved = _save(rows, by(taps.astype(dtype), count), reach - 1 - first, count, dtype)
    if spoiled:
        convolved[_reached(bad, reach, first, count)] = np.nan
    return convolved.reshape(*x.shape[:-1], count)


def _transform_complex(rows: np.ndarray, out: np.ndarray) -> None:
    # NumPy's single-precision transform is slower than its double-precision one (NumPy 2.4).
    if out.dtype == np.complex128:
        np.fft.fft(rows, out=out)
    else:
        out[...] = np.fft.fft(rows.astype(np.complex128))


def _transform_real(rows: np.ndarray, out: np.ndarray) -> None:
    # One half of a real signal's spectrum is the conjugate of the other, which saves half of the work.
    samples = rows.shape[1]
    half = out[:, : samples // 2 + 1]
    if out.dtype == np.complex128:
        np.fft.rfft(rows, out=half)
    else:
        half[...] = np.fft.rfft(rows.astype(np.float64))
    np.conjugate(half[:, (samples - 1) // 2 : 0 : -1], out=out[:, samples // 2 + 1 :])


def _part(mode: str, samples: int, reach: int) -> tuple[int, int]:
    """The samples of the full convolution that a mode selects: the first, and their number."""
    if mode == "same":
        return max(reach - 1, 0) // 2, samples
    if mode == "valid":
        return max(reach - 1, 0), samples - max(reach - 1, 0)
    return 0, max(samples + reach - 1, 0)


def _by_products(taps: np.ndarray, count: int) -> _Step:
    """Compute blocks of outputs as a banded matrix times samples: the zeros cost less than a pass for each tap."""
    reach = len(taps)
    hop = min(max(_BLOCK_OUTPUTS, reach), count)
    band = np.zeros((hop + reach - 1, hop), taps.dtype)
    outputs = np.arange(hop)
    for shift, tap in enumerate(taps[::-1]):
        band[outputs + shift, outputs] = tap
    return _Step(taps.dtype, hop + reach - 1, hop, lambda windows: windows @ band)


def _by_transforms(taps: np.ndarray, count: int) -> _Step:
    """Compute `hop` outputs by a transform of `length` samples; the others are spoiled by wrapping around."""
    reach = len(taps)
    length = _fast_length(min(max(_FFT_PER_TAP * reach, _MIN_FFT_SAMPLES), count + reach - 1))
    is_complex = taps.dtype.kind == "c"
    forward, backward = (np.fft.fft, np.fft.ifft) if is_complex else (np.fft.rfft, np.fft.irfft)
    dtype = np.dtype(np.complex128 if is_complex else np.float64)
    response = forward(taps.astype(dtype), length)

    def step(windows: np.ndarray) -> np.ndarray:
        spectrum = forward(windows)
        spectrum *= response
        return np.asarray(backward(spectrum, length))[..., reach - 1 :]

    return _Step(dtype, length, length - reach + 1, step)


def _save(rows: np.ndarray, step: _Step, lead: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Overlap-save: split rows into overlapping windows, and put the outputs of all windows side by side."""
    hops = -(-count // step.hop)
    convolved = np.empty((len(rows), hops * step.hop), dtype)
    row_length = (hops - 1) * step.hop + step.length
    block_rows = max(1, _BLOCK_SAMPLES // row_length)
    block_hops = max(1, _BLOCK_SAMPLES // (step.length * block_rows))
    for start in range(0, len(rows), block_rows):
        block = convolved[start : start + block_rows]
        windows = _windows(rows[start : start + block_rows], step, lead, row_length)
        for left in range(0, hops, block_hops):
            kept = step.outputs(windows[:, left : left + block_hops])
            block[:, left * step.hop : (left + kept.shape[1]) * step.hop] = kept.reshape(len(kept), -1)
    return convolved[:, :count]


def _windows(rows: np.ndarray, step: _Step, lead: int, row_length: int) -> np.ndarray:
    padded = np.zeros((len(rows), row_length), step.dtype)
    kept = min(rows.shape[1], row_length - lead)
    padded[:, lead : lead + kept] = rows[:, :kept]
    return np.lib.stride_tricks.sliding_window_view(padded, step.length, axis=1)[:, :: step.hop]


def _fast_length(least: int) -> int:
    """The shortest length, of at least `least`, with small prime factors."""
    return min(factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5, 9, 15))


def _reached(bad: np.ndarray, reach: int, first: int, count: int) -> np.ndarray:
    """Samples of the convolution that depend on a bad one."""
    until = np.zeros((len(bad), bad.shape[1] + 2 * reach - 1), np.intp)
    np.cumsum(bad, axis=1, out=until[:, reach : reach + bad.shape[1]])
    until[:, reach + bad.shape[1] :] = until[:, reach + bad.shape[1] - 1, np.newaxis]
    last = np.arange(first, first + count) + reach
    reached: np.ndarray = until[:, last] > until[:, last - reach]
    return reached
