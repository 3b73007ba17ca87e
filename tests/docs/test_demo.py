"""The demo: a real photograph through real kernels, by all workers."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image as images
import numpy as np
from matplotlib import cbook

from tests.support.mesh import ROOT
from unlatch.compute.kernels.images import gaussian_blur, sobel


def test_demo_processes_a_photograph_on_all_workers(tmp_path: Path) -> None:
    """Every worker computes strips of both kernels, and the pictures equal those of the whole image at once."""
    demo = [sys.executable, str(ROOT / "examples" / "photograph.py"), str(tmp_path / "demo")]
    told = subprocess.run(demo, capture_output=True, text=True, timeout=50, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    for kernel in ("gaussian_blur", "sobel"):
        calls = re.findall(rf'kernel="{kernel}",outcome="ok",worker="(\d+)"}} ([\d.]+)', told.stdout)
        assert sum(float(count) for _, count in calls) == 75
        assert {worker for worker, _ in calls} == {str(number) for number in range(_workers(told.stdout))}
    photo = images.imread(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    before, blurred, edges = (_saved(tmp_path / "demo" / name) for name in ("before.png", "blurred.png", "edges.png"))
    assert np.array_equal(before, photo)
    assert np.abs(blurred.astype(int) - gaussian_blur(photo, sigma=4.0)).max() <= 1
    assert np.abs(edges[..., 0] - np.clip(sobel(photo).max(axis=2), 0, 255)).max() <= 2  # levels of grey


def _workers(told: str) -> int:
    return 1 + max(int(number) for number in re.findall(r'worker="(\d+)"', told))


def _saved(path: Path) -> np.ndarray:
    return np.asarray(np.rint(images.imread(path)[..., :3] * 255), np.uint8)
