"""k-means on the handwritten digits that scikit-learn ships: several starts at once, and a picture of the best.

Starts differ in their seed, a scalar. A map varies arrays only, so each start is a call from a thread of its own.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from served import arguments, served
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

CLUSTERS, STARTS = 10, 8


def main(output: Path, server: str) -> None:
    """Cluster the digits, save pictures of the centers, and print how well the clusters separate digits."""
    digits = load_digits()
    with served(server) as at, ThreadPoolExecutor(STARTS) as threads:
        calls = [threads.submit(at.mesh.kmeans, digits.data, clusters=CLUSTERS, seed=seed) for seed in range(STARTS)]
        found = min((call.result() for call in calls), key=lambda clusters: float(clusters.inertia))
    agreement = adjusted_rand_score(digits.target, found.labels)
    print(f"best of {STARTS} starts: inertia {float(found.inertia):.0f}, agreement with the digits {agreement:.2f}")
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    for label, (axes, center) in enumerate(zip(figure.subplots(2, 5).flat, found.centers, strict=True)):
        members = digits.target[found.labels == label]
        axes.imshow(center.reshape(8, 8), cmap="gray_r")
        axes.set_title(f"mostly {np.bincount(members).argmax()}", fontsize=9)
        axes.set_axis_off()
    figure.savefig(output)
    print(f"saved {output}")


given = arguments(__doc__, "digits.png")
main(given.output, given.server)
