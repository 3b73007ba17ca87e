"""The Mandelbrot set by a kernel of your own, `escape_times` in own_kernels.py, with its rows on all workers.

Rows differ many times over in their work, and workers take the next ones when they are free. A mesh given by `--server`
must serve own_kernels.py too.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from served import arguments, served

WIDTH, HEIGHT, LIMIT, ROWS_A_CALL = 600, 400, 300, 8


def main(output: Path, server: str) -> None:
    """Count the steps of every point, save their picture, and print the area."""
    real, imaginary = np.meshgrid(np.linspace(-2.25, 0.75, WIDTH), np.linspace(-1, 1, HEIGHT))
    points = real + 1j * imaginary
    blocks = [points[first : first + ROWS_A_CALL] for first in range(0, HEIGHT, ROWS_A_CALL)]
    with served(server, "--kernels", str(Path(__file__).with_name("own_kernels.py"))) as at:
        steps = np.concatenate(list(at.mesh.map("escape_times", blocks, limit=LIMIT)))
    # The set's area is 1.5066: T. Förstemann, "Numerical estimation of the area of the Mandelbrot set" (2012).
    area = (steps == LIMIT).sum() * (3 / (WIDTH - 1)) * (2 / (HEIGHT - 1))
    print(f"{steps.size} points in {len(blocks)} calls, area {area:.3f}")
    figure = Figure(figsize=(6, 4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.log1p(steps), cmap="twilight_shifted", aspect="auto")
    axes.set_axis_off()
    figure.savefig(output)
    print(f"saved {output}")


given = arguments(__doc__, "mandelbrot.png")
main(given.output, given.server)
