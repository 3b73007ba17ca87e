"""A photograph, blurred and searched for edges on all workers: `make demo`.

The photograph is cut into strips, each with the neighbouring rows that the kernel needs. Workers take strips when they
are free, and the joined results equal the result for the whole picture.
"""

from pathlib import Path
from urllib.request import urlopen

import matplotlib.image as images
import numpy as np
from matplotlib import cbook
from served import arguments, served

ROWS, SIGMA, MARGIN = 8, 4.0, 16


def strips(image: np.ndarray) -> list[np.ndarray]:
    """Cut the image into strips of ROWS rows, with up to MARGIN more on each side."""
    return [image[max(0, start - MARGIN) : start + ROWS + MARGIN] for start in range(0, len(image), ROWS)]


def together(results: list[np.ndarray]) -> np.ndarray:
    """Join the strips' results, without their margins."""
    above = [min(number * ROWS, MARGIN) for number in range(len(results))]
    return np.concatenate([strip[more : more + ROWS] for strip, more in zip(results, above, strict=True)])


def main(directory: Path, server: str) -> None:
    """Send the photograph to a mesh, save the results, and print which of its own workers took part."""
    photo = images.imread(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    with served(server) as at:
        blurred = together(list(at.mesh.map("gaussian_blur", strips(photo), sigma=SIGMA)))
        edges = together(list(at.mesh.map("sobel", strips(photo)))).max(axis=2)
        if at.metrics:
            with urlopen(f"http://{at.metrics}/metrics") as metrics:
                lines = metrics.read().decode().splitlines()
            print("\n".join(line for line in lines if line.startswith("unlatch_worker_calls_total")))
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in (("before", photo), ("blurred", blurred), ("edges", np.clip(edges, 0, 255) / 255)):
        images.imsave(directory / f"{name}.png", picture, cmap="gray")
        print(f"saved {directory / name}.png")


given = arguments(__doc__, "demo")
main(given.output, given.server)
