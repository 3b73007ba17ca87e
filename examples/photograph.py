"""A photograph, blurred and searched for edges on all workers: `make demo`.

The photograph is cut into strips, each with the rows beside it that the kernel looks at. Workers take strips as they
have room, and the results, put together, are the whole picture's.
"""

import json
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from urllib.request import urlopen

import matplotlib.image as images
import numpy as np
from matplotlib import cbook

from unlatch import BlockingClient

ROWS, SIGMA, MARGIN = 8, 4.0, 16
ANY_PORTS = [
    f"--{door}listen=127.0.0.1:0" for door in ("", "metrics-", "health-", "compute-metrics-", "compute-health-")
]


def strips(image: np.ndarray) -> list[np.ndarray]:
    """The image in strips of ROWS rows and up to MARGIN more on each side."""
    return [image[max(0, start - MARGIN) : start + ROWS + MARGIN] for start in range(0, len(image), ROWS)]


def together(results: list[np.ndarray]) -> np.ndarray:
    """The strips' results without their margins, as one image."""
    above = [min(number * ROWS, MARGIN) for number in range(len(results))]
    return np.concatenate([strip[more : more + ROWS] for strip, more in zip(results, above, strict=True)])


def main(directory: Path) -> None:
    """Start a mesh on ports that are free, send it the photograph, save what it makes of it, say who took part."""
    photo = images.imread(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    command = [str(Path(sys.executable).with_name("unlatch")), "serve", *ANY_PORTS]
    with Popen(command, stderr=PIPE, text=True) as server:
        log = {}
        while ("gateway", "serving") not in log or ("gateway", "replica is ready") not in log:
            entry = json.loads(server.stderr.readline()) if server.stderr else {}
            log[entry["process"], entry["event"]] = entry
        with BlockingClient(log["gateway", "serving"]["listen"]) as mesh:
            blurred = together(list(mesh.map("gaussian_blur", strips(photo), sigma=SIGMA)))
            edges = together(list(mesh.map("sobel", strips(photo)))).max(axis=2)
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in (("before", photo), ("blurred", blurred), ("edges", np.clip(edges, 0, 255) / 255)):
            images.imsave(directory / f"{name}.png", picture, cmap="gray")
            print(f"saved {directory / name}.png")
        with urlopen(f"http://{log['front', 'serving']['metrics_listen']}/metrics") as metrics:
            lines = metrics.read().decode().splitlines()
        print("\n".join(line for line in lines if line.startswith("unlatch_worker_calls_total")))
        server.terminate()
        server.communicate()


main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
