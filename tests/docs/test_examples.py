"""The examples, each on a mesh of its own, as a user would run it: printed figures are checked, pictures are pictures.

examples/photograph.py has its own test, tests/docs/test_demo.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image as images
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from examples.own_kernels import escape_times
from tests.conftest import StartMesh
from tests.support.mesh import ROOT, Mesh
from unlatch import KernelError
from unlatch.compute.worker.catalogue import load

EXAMPLES = ROOT / "examples"


def told_by(example: str, directory: Path, *flags: str) -> tuple[str, np.ndarray]:
    """Return what an example prints, and the picture that it saves."""
    picture = directory / "picture.png"
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), str(picture), *flags]
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=50, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"saved {picture}" in ran.stdout
    return ran.stdout, images.imread(picture)[..., :3]


def number(pattern: str, told: str) -> float:
    found = re.search(pattern, told)
    assert found, told
    return float(found[1])


def test_option_surface_is_that_of_black_and_scholes(tmp_path: Path) -> None:
    """The example prints 759 prices, each by simulation, the worst within four standard errors of the exact one."""
    told, picture = told_by("option_surface", tmp_path)
    assert number(r"^(\d+) prices", told) == 759
    assert number(r"\(([\d.]+) standard errors\)", told) < 4
    assert 0 < number(r"largest error ([\d.]+)", told) < 0.5
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # a surface's colours, not its frame alone


@pytest.mark.parametrize("own_mesh", [True, False], ids=["own mesh", "--server"])
def test_spectrogram_shows_the_chirp(own_mesh: bool, mesh: Mesh, tmp_path: Path) -> None:  # noqa: FBT001 (a case)
    """The ridge is the chirp's frequency to within one bin, on a mesh of its own and on an existing one."""
    told, picture = told_by("spectrogram", tmp_path, *([] if own_mesh else ["--server", mesh.gateway]))
    assert number(r"within ([\d.]+) Hz", told) < number(r"a bin is ([\d.]+) Hz", told)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_digits_are_told_apart(tmp_path: Path) -> None:
    """The clusters are as tight as scikit-learn's, to two percent, and most contain one digit."""
    told, picture = told_by("digits", tmp_path)
    reference = KMeans(10, n_init=8, random_state=0).fit(load_digits().data)
    assert number(r"inertia (\d+)", told) < 1.02 * reference.inertia_
    assert number(r"agreement with the digits ([\d.]+)", told) > 0.5  # 0 for chance, 1 for the same
    assert picture.std() > 0.1


def test_own_kernel_draws_the_mandelbrot_set(tmp_path: Path) -> None:
    """The set's area is 1.507, and a count of points that stayed for 300 steps is a little larger."""
    told, picture = told_by("mandelbrot", tmp_path)
    assert 1.50 < number(r"area ([\d.]+)", told) < 1.53
    assert (picture == picture[::-1]).mean() > 0.95  # the set is its own mirror image
    assert picture.std() > 0.1


def test_own_kernels_load_beside_the_built_in_ones() -> None:
    """`--kernels examples/own_kernels.py` serves the file's kernels, and no name is taken already."""
    served = load((str(EXAMPLES / "own_kernels.py"),)).specs
    assert set(served) == {*load(()).specs, "escape_times"}


def test_own_kernel_is_called_from_the_shell(start_mesh: StartMesh, tmp_path: Path) -> None:
    """The kernel is called as its module's first lines say, with a file for its array and another for its result."""
    gateway = start_mesh(dispatcher=["--kernels", str(EXAMPLES / "own_kernels.py")]).gateway
    c = np.array([[0, 2, 1j], [-1, 0.26, -2]])
    np.save(tmp_path / "points.npy", c)
    call = ["call", "escape_times", "c=@points.npy", "limit=500", "-o", "steps.npy", "--server", gateway]
    ran = subprocess.run(
        [sys.executable, "-m", "unlatch", *call], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert np.load(tmp_path / "steps.npy").tolist() == escape_times(c, limit=500).tolist()


def test_escape_times_are_those_of_the_definition() -> None:
    """Each point's count is the one that iterating this point alone gives."""
    c = np.array([[0, 2, 1], [-1, 0.26, -2 + 0.001j]], complex)

    def steps(point: complex, limit: int) -> int:
        z = 0j
        for step in range(limit):
            z = z * z + point
            if abs(z) > 2:
                return step
        return limit

    assert escape_times(c, limit=100).tolist() == [[steps(point, 100) for point in row] for row in c.tolist()]


@pytest.mark.parametrize("limit", [0, -1, 10**9])
def test_escape_times_refuse_what_would_take_hours(limit: int) -> None:
    """No steps, or too many for the points, are refused."""
    with pytest.raises(KernelError, match="limit: wanted"):
        escape_times(np.zeros((2, 2), complex), limit=limit)


def test_examples_are_short() -> None:
    """Each example has under sixty lines, without the code that they share."""
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name for name, count in lines.items() if count >= 60} == {"served.py"}
