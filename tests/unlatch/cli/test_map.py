"""`unlatch map`: many files, or rows. Existing results are skipped, and a failure affects its own item alone."""

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.mesh import Mesh, Service, running_dispatcher, running_mesh
from tests.support.watching import wait_until
from tests.unlatch.cli.conftest import Unlatch, process


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Twelve files, two of them in a subdirectory."""
    directory = tmp_path / "in"
    (directory / "more").mkdir(parents=True)
    for number in range(12):
        parent = directory / "more" if number >= 10 else directory
        np.save(parent / f"{number:02}.npy", np.full(3, float(number)))
    return directory


def test_every_file_of_a_pattern(unlatch: Unlatch, inputs: Path, tmp_path: Path) -> None:
    """Results are named after their inputs, with directories below the pattern's root, and equal what `call` gives."""
    ran = unlatch("map", "halve", f"x=@{inputs}/**/*.npy", "-o", str(tmp_path / "out"))
    assert (ran.code, ran.out) == (0, "")
    assert "12 done, 0 already there, 0 failed" in ran.err
    for number in range(12):
        result = tmp_path / "out" / ("more" if number >= 10 else "") / f"{number:02}.npy"
        np.testing.assert_array_equal(np.load(result), np.full(3, number / 2))


def test_what_is_there_is_skipped(unlatch: Unlatch, inputs: Path, tmp_path: Path) -> None:
    """Only missing results are made. A half-written one under another name does not count."""
    out = tmp_path / "out"
    command = ["map", "halve", f"x=@{inputs}/*.npy", "-o", str(out), "--json"]
    first = [json.loads(line) for line in unlatch(*command).out.splitlines()]
    assert {line["status"] for line in first} == {"done"}
    assert sorted(line["files"][0] for line in first) == [str(out / f"{number:02}.npy") for number in range(10)]
    (out / "03.npy").unlink()
    (out / "04.npy").rename(out / ".04.npy.1.part")
    kept = (out / "05.npy").stat().st_mtime_ns
    again = {line["item"]: line["status"] for line in map(json.loads, unlatch(*command).out.splitlines())}
    assert {item for item, status in again.items() if status == "done"} == {"03", "04"}
    assert len(again) == 10
    assert (out / "05.npy").stat().st_mtime_ns == kept


def test_results_are_no_inputs(unlatch: Unlatch, inputs: Path) -> None:
    """A pattern that also matches the output directory gives the same items the second time."""
    command = ("map", "halve", f"x=@{inputs}/**/*.npy", "-o", str(inputs / "out"))
    assert "12 done, 0 already there" in unlatch(*command).err
    assert "0 done, 12 already there" in unlatch(*command).err


def test_pictures_with_a_constant_beside(unlatch: Unlatch, tmp_path: Path) -> None:
    """A pattern of images, scalars and constant arrays; --to chooses the format, and several outputs make an .npz."""
    for number in range(3):
        Image.fromarray(np.full((4, 6, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    pattern = f"=@{tmp_path}/*.png"
    assert unlatch("map", "gaussian_blur", f"image{pattern}", "sigma=1", "-o", f"{tmp_path}/a", "--to", "png").code == 0
    assert np.asarray(Image.open(tmp_path / "a" / "2.png")).max() == 160
    assert unlatch("map", "histogram", f"x{pattern}", "bins=2", "-o", f"{tmp_path}/b").code == 0
    with np.load(tmp_path / "b" / "1.npz") as archive:
        assert list(archive) == ["counts", "edges"]
    b = "b=[[1, 2], [3, 4]]"
    np.save(tmp_path / "one.npy", np.eye(2))
    assert unlatch("map", "matmul", f"a=@{tmp_path}/*.npy", b, "-o", f"{tmp_path}/c").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "c" / "one.npy"), [[1, 2], [3, 4]])


def test_rows_of_an_array(unlatch: Unlatch, tmp_path: Path) -> None:
    """Each row is a call. Its result is named by its number, with as many digits as the last one has."""
    np.save(tmp_path / "points.npy", np.arange(36, dtype=np.float32).reshape(12, 3))
    np.savetxt(tmp_path / "points.csv", np.arange(36).reshape(12, 3), delimiter=",")
    for name in ("points.npy", "points.csv"):
        out = tmp_path / f"out-{name}"
        ran = unlatch("map", "summarise", f"x=@{tmp_path / name}", "--rows", "-o", str(out))
        assert ran.code == 0, ran.err
        assert sorted(path.name for path in out.iterdir()) == [f"{row:02}.npz" for row in range(12)]
        with np.load(out / "11.npz") as archive:
            assert archive["mean"] == 34.0


def test_rows_of_a_table_take_the_kernels_dtype(unlatch: Unlatch, tmp_path: Path) -> None:
    """Whole numbers of a CSV are uint8 to a kernel that takes nothing else."""
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n")
    flags = (f"x=@{tmp_path}/rows.csv", "--rows", "-o", str(tmp_path / "out"))
    assert unlatch("map", "tripled", *flags).code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "1.npy"), np.array([9, 12], np.uint8))


def test_one_failure_is_reported_and_the_rest_goes_on(unlatch: Unlatch, inputs: Path, tmp_path: Path) -> None:
    """An unreadable file and one that the kernel refuses: the code is 1, with a count, and all other results exist."""
    (inputs / "05.npy").write_text("nonsense")
    np.save(inputs / "06.npy", np.ones((2, 2)))
    out = tmp_path / "out"
    ran = unlatch("map", "summarise", f"x=@{inputs}/*.npy", "-o", str(out), "--in-flight", "2")
    assert (ran.code, ran.out) == (1, "")
    assert "05: INVALID_ARGUMENT: x: " in ran.err
    assert f"shape (2, 2) ({inputs}/06.npy)" in ran.err
    assert "06: INVALID_ARGUMENT: x: wanted float64 of shape (n), got float64 of shape (2, 2)" in ran.err
    assert "8 done, 0 already there, 2 failed" in ran.err
    assert len(list(out.iterdir())) == 8
    again = unlatch("map", "summarise", f"x=@{inputs}/*.npy", "-o", str(out), "--json")
    failed = [line for line in map(json.loads, again.out.splitlines()) if line["status"] == "failed"]
    assert [line["item"] for line in failed if line["error"]["field"] == "x"] == ["05", "06"]
    assert [line["source"] for line in failed] == [f"{inputs}/05.npy", f"{inputs}/06.npy"]
    assert (again.code, again.err) == (1, "")


WRONG = [
    (["x=@{}/none*.npy"], "no file matches"),
    (["x=@{}/00.npy"], "wanted one array as a pattern"),
    (["x=[1]", "--rows"], "wanted x=@file"),
    (["x=@{}/00.npy", "--rows", "--to", "txt"], "unknown suffix; wanted one of"),
    (["x=@{}/zero.npy", "--rows"], "has no rows"),
    (["x=@{}/0[0-9].*"], "would both write 00"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_what_cannot_begin_does_nothing(
    unlatch: Unlatch, inputs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Wrong usage is refused before any call, and leaves no directory."""
    np.save(inputs / "zero.npy", np.array(1.0))
    (inputs / "00.csv").write_text("1\n")
    ran = unlatch("map", "halve", *(word.format(inputs) for word in arguments), "-o", str(tmp_path / "out"))
    assert ran.code == 1
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_what_is_finished(mesh: Mesh, tmp_path: Path) -> None:
    """SIGINT in the middle ends with 130 and leaves whole files only.

    The same command again does the rest and no more.
    """
    images = tmp_path / "images.npy"
    np.save(images, np.random.default_rng(1).normal(size=(40, 400, 400)))
    out = tmp_path / "out"
    command = ["map", "gaussian_blur", f"image=@{images}", "sigma=20", "--rows", "-o", str(out)]
    command += ["--in-flight", "2", "--server", mesh.gateway]
    first = process(*command, stderr=subprocess.PIPE)
    wait_until(lambda: out.is_dir() and len(finished(out)) >= 3, "three results are there")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=10)
    assert first.returncode == 130, said
    assert b"run the same command again" in said
    assert b"Traceback" not in said
    done = finished(out)
    assert 3 <= len(done) < 40
    assert set(os.listdir(out)) == {path.name for path in done}
    assert all(np.load(path).shape == (400, 400) for path in done)
    times = {path: path.stat().st_mtime_ns for path in done}
    second = process(*command, stderr=subprocess.PIPE)
    _, said = second.communicate(timeout=50)
    assert second.returncode == 0, said
    assert f"{40 - len(done)} done, {len(done)} already there, 0 failed" in said.decode()
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert len(finished(out)) == 40


def finished(directory: Path) -> set[Path]:
    return set(directory.glob("[0-9]*.npy"))


def test_a_gateway_that_is_away_for_a_moment_costs_nothing(tmp_path: Path) -> None:
    """Calls of a pure kernel are tried again until another gateway answers at the address. No item fails."""
    image = tmp_path / "images.npy"
    np.save(image, np.random.default_rng(1).normal(size=(30, 200, 200)))
    addresses = here, other = tmp_path / "here.sock", tmp_path / "other.sock"
    any_ports = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
    flags = (*any_ports, "--replicas", f"unix:{tmp_path}/dispatcher.sock")
    out = tmp_path / "out"
    with running_dispatcher(tmp_path / "dispatcher.sock"), ExitStack() as stack:
        gateways = [stack.enter_context(Service("gateway", *flags, "--listen", f"unix:{at}")) for at in addresses]
        for gateway in gateways:
            gateway.wait_for("serving")
            gateway.wait_for("replica is ready")
        command = ("map", "gaussian_blur", f"image=@{image}", "sigma=20", "--rows", "-o", str(out))
        mapping = process(*command, "--in-flight", "1", "--server", f"unix:{here}", stderr=subprocess.PIPE)
        wait_until(lambda: out.is_dir() and len(finished(out)) >= 3, "three results are there")
        gateways[0].kill()
        # The start of a gateway may take longer than `map` tries, so the other one has started before.
        other.rename(here)
        _, said = mapping.communicate(timeout=40)
        assert mapping.returncode == 0, said
    assert len(finished(out)) == 30


def test_a_gateway_that_stays_away_ends_the_map(tmp_path: Path) -> None:
    """Without a gateway `map` does not go through thousands of items: it says how many are left, and ends with 1."""
    x = tmp_path / "x.npy"
    np.save(x, np.ones((5000, 3)))
    out = tmp_path / "out"
    with running_mesh(tmp_path) as mesh:
        command = ("map", "halve", f"x=@{x}", "--rows", "-o", str(out), "--in-flight", "2", "--server", mesh.gateway)
        mapping = process(*command, stderr=subprocess.PIPE)
        wait_until(lambda: out.is_dir() and len(finished(out)) >= 3, "three results are there")
        mesh.gateway_service.stop()
        _, said = mapping.communicate(timeout=40)
    assert mapping.returncode == 1
    assert said.count(b"UNAVAILABLE") < 10, said
    assert b"left: run the same command again" in said
