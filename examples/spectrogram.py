"""The spectrogram of a chirp: overlapping windows through `fft`, several windows in each call.

The chirp's frequency grows evenly, with noise. The ridge of the spectrogram is compared with the true frequency.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from served import arguments, served

RATE_HERTZ, SECONDS = 8000, 4.0
FIRST_HERTZ, LAST_HERTZ = 200.0, 3500.0
WINDOW, HOP, WINDOWS_A_CALL = 512, 64, 32


def chirp(seconds: np.ndarray) -> np.ndarray:
    """A sine whose frequency goes from the first to the last, with noise of a fifth of its amplitude."""
    phase = 2 * np.pi * (FIRST_HERTZ * seconds + (LAST_HERTZ - FIRST_HERTZ) / (2 * SECONDS) * seconds**2)
    return np.asarray(np.sin(phase) + np.random.default_rng(1).normal(0, 0.2, len(seconds)))


def main(output: Path, server: str) -> None:
    """Transform the windows, save the picture, and print how close the ridge is."""
    seconds = np.arange(0, SECONDS, 1 / RATE_HERTZ)
    windows = np.lib.stride_tricks.sliding_window_view(chirp(seconds), WINDOW)[::HOP] * np.hanning(WINDOW)
    blocks = [windows[first : first + WINDOWS_A_CALL] for first in range(0, len(windows), WINDOWS_A_CALL)]
    with served(server) as at:
        spectra = np.concatenate(list(at.mesh.map("fft", blocks)))[:, : WINDOW // 2]
    decibels = 20 * np.log10(np.abs(spectra) / np.abs(spectra).max())

    middles = (np.arange(len(windows)) * HOP + WINDOW / 2) / RATE_HERTZ
    bin_hertz = RATE_HERTZ / WINDOW
    ridge = decibels.argmax(axis=1) * bin_hertz
    wanted = FIRST_HERTZ + (LAST_HERTZ - FIRST_HERTZ) * middles / SECONDS
    off = np.abs(ridge - wanted).max()
    print(f"{len(windows)} windows in {len(blocks)} calls, ridge within {off:.1f} Hz (a bin is {bin_hertz:.1f} Hz)")

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="hertz", title="a chirp in noise")
    extent = (float(middles[0]), float(middles[-1]), 0.0, RATE_HERTZ / 2)
    picture = axes.imshow(decibels.T, origin="lower", aspect="auto", extent=extent, vmin=-50, cmap="magma")
    figure.colorbar(picture, label="decibels")
    figure.savefig(output)
    print(f"saved {output}")


given = arguments(__doc__, "spectrogram.png")
main(given.output, given.server)
