"""`unlatch call`: every format in and out, the right dtypes, and errors that name the argument."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.mesh import Mesh
from tests.unlatch.cli.conftest import Unlatch, process
from unlatch.cli import reading
from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.spec import ArraySpec

PIXELS = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ARRAYS: dict[str, Any] = {
    "vector.npy": np.linspace(-1, 1, 7),
    "integers.npy": np.arange(24, dtype=np.int16).reshape(2, 3, 4),
    "complex.npy": np.array([1 + 2j, np.nan], np.complex64),
    "times.npy": np.array(["2026-01-02", "NaT"], "datetime64[D]"),
    "texts.npy": np.array([["größe", ""]]),
    "number.npy": np.array(2.5, np.float32),
    "empty.npy": np.empty((0, 3)),
    "member.npz": np.arange(5.0),
    "column.csv": np.array([0.1, np.inf, -3e300]),
    "table.csv": np.array([[1.0, 0.1], [np.nan, 2.0]]),
    "colour.png": PIXELS,
    "grey.png": PIXELS[..., 0],
    "alpha.png": np.concatenate([PIXELS, PIXELS[..., :1]], axis=2),
    "deep.png": PIXELS[..., 0].astype(np.uint16) * 257,
    "colour.tif": PIXELS,
    "grey.bmp": PIXELS[..., 0],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_each_format_is_written_and_read(unlatch: Unlatch, tmp_path: Path, name: str) -> None:
    """A file that `call` has written can be read by `call`, with the same values, dtype and shape."""
    given, first, second = tmp_path / "given.npy", tmp_path / name, tmp_path / f"again-{name}"
    np.save(given, ARRAYS[name])
    for source, target in ((given, first), (first, second)):
        ran = unlatch("call", "identity", f"x=@{source}", "-o", str(target))
        assert (ran.code, ran.out, ran.err) == (0, "", "")
    read = unlatch("call", "identity", f"x=@{second}", "-o", str(given))
    assert read.code == 0
    back = np.load(given)
    assert back.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(back, ARRAYS[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["given.npy", name, f"again-{name}"])


def test_photographs_are_read_upright(unlatch: Unlatch, tmp_path: Path) -> None:
    """Camera JPEGs, palettes and black and white become uint8, the way up that a viewer shows them."""
    lying = Image.fromarray(np.repeat(np.repeat(PIXELS, 8, axis=0), 8, axis=1))
    exif = lying.getexif()
    exif[0x0112] = 6  # The picture's tag asks for a turn by 90 degrees.
    lying.save(tmp_path / "camera.jpg", exif=exif)
    lying.convert("P").save(tmp_path / "palette.gif")
    lying.convert("1").save(tmp_path / "bits.png")
    shapes = {"camera.jpg": [56, 40, 3], "palette.gif": [40, 56, 3], "bits.png": [40, 56]}
    for name, shape in shapes.items():
        (output,) = unlatch("call", "identity", f"x=@{tmp_path / name}", "--json").json["outputs"]
        assert (output["dtype"], output["shape"]) == ("uint8", shape)


@pytest.mark.parametrize(
    ("result", "pixels"),
    [
        ([[0.0, 0.5, 1.0]], [[0, 128, 255]]),
        ([[-5.0, 0.4, 300.0, 200.6]], [[0, 0, 255, 201]]),
        ([[0.5, float("nan")]], [[128, 0]]),
        ([[True, False]], [[255, 0]]),
        ([[-1, 7, 256]], [[0, 7, 255]]),
    ],
)
def test_results_become_pixels(unlatch: Unlatch, tmp_path: Path, result: list[Any], pixels: list[Any]) -> None:
    """Floats within 0 and 1 are brightness. Other floats and integers are 0 to 255, rounded and clipped."""
    picture = tmp_path / "out.png"
    assert unlatch("call", "identity", f"x={json.dumps(result)}", "-o", str(picture)).code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), pixels)


def test_a_table_may_have_a_header(unlatch: Unlatch, tmp_path: Path) -> None:
    """A first line that is not numbers is skipped. A kernel of one axis takes a row, one of two axes a column."""
    table = tmp_path / "table.csv"
    table.write_text("\ufeffa,b\n1,2\n3,4.5\n")
    (output,) = unlatch("call", "identity", f"x=@{table}", "--json").json["outputs"]
    assert output == {"name": "output0", "dtype": "float64", "shape": [2, 2], "data": [[1.0, 2.0], [3.0, 4.5]]}
    table.write_text("1,2,3\n")
    assert unlatch("call", "summarise", f"x=@{table}", "--json").json["outputs"][0]["data"] == 2.0
    table.write_text("1\n2\n")
    assert unlatch("call", "returns_strided", f"x=@{table}", "--json").json["outputs"][0]["shape"] == [1, 2]


TABLES: list[tuple[str, str, list[Any]]] = [
    ("whole", "9223372036854775807\n-1\n", [9223372036854775807, -1]),
    ("whole", "9007199254740993\n1e3\n", [9007199254740993, 1000]),
    ("whole", '"1"\n 2 \n\n', [1, 2]),
    ("fractions", "1\n\n3\n", [1, None, 3]),
    ("fractions", "1,,3\n", [1, None, 3]),
    ("fractions", ",\n1,2\n", [[None, None], [1, 2]]),
    ("fractions", "x\n1e300\n", [1e300]),
]
WRONG_TABLES = [
    ("whole", "1\n\n3\n", "line 2, column 1: wanted int64, which cannot hold nan"),
    ("whole", "1\n9223372036854775808\n", "line 2, column 1: wanted int64, which cannot hold 9223372036854775808"),
    ("whole", "1,2\n3,4.5\n", "line 2, column 2: wanted int64, which cannot hold 4.5"),
    ("fractions", "n\n1e3\n9007199254740993\n", "line 3, column 1: wanted float64, which cannot hold 9007199254740993"),
    ("fractions", "1\n2#3\n", "line 2, column 1: could not convert string '2#3' to a number"),
    ("whole", f"1\n{'1' * 5000}\n", f"line 2, column 1: could not convert string '{'1' * 63} to a number"),
    ("fractions", "1\n1e400\n", "line 2, column 1: float64 cannot hold '1e400'"),
    ("fractions", "-1e999\n2\n", "line 1, column 1: float64 cannot hold '-1e999'"),
    ("fractions", "1_000\n2\n1_0\n", "line 3, column 1: could not convert string '1_0'"),
    ("fractions", "id,2026\n1,2\n", "line 1, column 1: could not convert string 'id'"),
    ("fractions", "1,2\n3\n", "line 2: wanted 2 columns, got 1"),
    (
        "fractions",
        "1;2\n3;4\n5;6\n",
        "line 2, column 1: could not convert string '3;4' to a number; wanted numbers separated by commas",
    ),
]


@pytest.mark.parametrize(("dtypes", "text", "expected"), TABLES, ids=[case[1] for case in TABLES])
def test_a_table_is_read_as_it_is(tmp_path: Path, dtypes: str, text: str, expected: list[Any]) -> None:
    """Whole numbers keep all their digits, and an empty cell is NaN."""
    table = tmp_path / "table.csv"
    table.write_text(text)
    wanted = ArraySpec(name="x", dtypes=("int64" if dtypes == "whole" else "float64",), dims=("...",))
    expected_array = np.array(expected, dtype=wanted.dtypes[0])
    np.testing.assert_array_equal(reading.file(str(table), wanted).reshape(expected_array.shape), expected_array)


@pytest.mark.parametrize(("dtypes", "text", "message"), WRONG_TABLES, ids=[case[1] for case in WRONG_TABLES])
def test_a_table_that_would_be_changed_is_refused(tmp_path: Path, dtypes: str, text: str, message: str) -> None:
    """The error names the argument, the line and the column."""
    table = tmp_path / "table.csv"
    table.write_text(text)
    wanted = ArraySpec(name="x", dtypes=("int64" if dtypes == "whole" else "float64",), dims=("...",))
    with pytest.raises(InvalidArgument) as refused:
        reading.file(str(table), wanted)
    assert message in refused.value.message
    assert refused.value.message.startswith(f"x: {table}: ")


def test_a_picture_that_a_kernel_has_encoded_is_written_as_it_is(unlatch: Unlatch, tmp_path: Path) -> None:
    """Bytes, if they are one element, go to an image's file unchanged."""
    picture = tmp_path / "figure.png"
    assert unlatch("call", "identity", 'x="\\u0089PNG, or so"', "-o", str(picture)).code == 0
    assert picture.read_bytes() == "\u0089PNG, or so".encode()
    ran = unlatch("call", "identity", 'x=["a", "b"]', "-o", str(tmp_path / "two.png"), "--json")
    assert "wanted an image of shape" in ran.error["message"]


def test_members_of_an_archive(unlatch: Unlatch, tmp_path: Path) -> None:
    """The named member is taken, else the only one, else the one that is named like the argument."""
    archive = tmp_path / "several.npz"
    np.savez(archive, x=np.full(2, 1.0), other=np.full(2, 2.0))
    for text, mean in ((f"@{archive}", 1.0), (f"@{archive}:other", 2.0)):
        assert unlatch("call", "summarise", f"x={text}", "--json").json["outputs"][0]["data"] == mean
    ran = unlatch("call", "summarise", f"x=@{archive}:othr", "--json")
    assert ran.error == {
        "code": "INVALID_ARGUMENT",
        "message": f"x: {archive} has no member 'othr'; did you mean other?",
        "field": "x",
    }


def test_pipes(mesh: Mesh) -> None:
    """`-o -` writes .npy to stdout and `@-` reads it from stdin, also large arrays."""
    server = ("--server", mesh.gateway)
    x = np.arange(300_000.0)
    given = io.BytesIO()
    np.save(given, x)
    first = process("call", "halve", "x=@-", "-o", "-", *server, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = first.communicate(given.getvalue(), timeout=30)
    assert first.returncode == 0
    np.testing.assert_array_equal(np.load(io.BytesIO(out)), x / 2)


DTYPES = [
    ("conjugate", 'z=["1+2j", 3]', "complex128"),
    ("conjugate", "z=[1, 2.5]", "complex128"),
    ("fixed_axes", "pixels=[[[1, 2, 255]]]", "uint8"),
    ("halve", "x=[1, 2]", "float64"),
    ("halve", "x=@uint8.npy", "float64"),
    ("halve", "x=@float32.npy", "float32"),
    ("halve", "x=@int64.npy", "float64"),
    ("summarise", "x=@float32.npy", "float64"),
    ("summarise", 'x=["NaN", "-Infinity"]', "float64"),
    ("summarise", "x=[]", "float64"),
    ("identity", "x=[1, 2]", "int64"),
    ("identity", "x=[true]", "bool"),
    ("identity", 'x="text"', "bytes"),
    ("sobel", "image=[[1, 2]]", "float64"),
]


@pytest.mark.parametrize(("kernel", "argument", "dtype"), DTYPES)
def test_inputs_take_the_dtype_that_is_meant(
    unlatch: Unlatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, argument: str, dtype: str
) -> None:
    """JSON, images and narrower dtypes fit a kernel that takes a wider dtype."""
    monkeypatch.chdir(tmp_path)
    for name in ("uint8", "float32", "int64"):
        np.save(f"{name}.npy", np.array([1, 2], name))
    ran = unlatch("call", kernel, argument, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["outputs"][0]["dtype"] == dtype


WRONG = [
    (["gausian_blur"], "NOT_FOUND", "did you mean gaussian_blur?", "model_name"),
    (["halve"], "INVALID_ARGUMENT", "x: kernel halve requires it", "x"),
    (["required_scalars", "flag=true", "count=1", "ratio=2"], "INVALID_ARGUMENT", "label: ", "label"),
    (["gaussian_blur", "image=[[1]]", "sigm=2"], "INVALID_ARGUMENT", "did you mean sigma?", "sigm"),
    (["halve", "x=[1]", "x=[2]"], "INVALID_ARGUMENT", "given twice", "x"),
    (["halve", "x"], "INVALID_ARGUMENT", "name=value", ""),
    (["halve", "x=[1, 2"], "INVALID_ARGUMENT", "wanted @file or a JSON array", "x"),
    (["halve", "x=[[1], [2, 3]]"], "INVALID_ARGUMENT", "x: ", "x"),
    (["halve", f"x=[{'1' * 5000}]"], "INVALID_ARGUMENT", "x: wanted numbers of at most 4,300 digits", "x"),
    (
        ["required_scalars", "flag=true", "ratio=1", "label=a", f"count={'1' * 5000}"],
        "INVALID_ARGUMENT",
        f"count: wanted a value of type int, got '{'1' * 63}",
        "count",
    ),
    (
        ["required_scalars", "flag=true", "ratio=1", "label=a", f"count={10**25}"],
        "INVALID_ARGUMENT",
        "64 bits",
        "count",
    ),
    (["halve", 'x={"a": 1}'], "INVALID_ARGUMENT", "wanted an array of numbers or strings", "x"),
    (["halve", "x=[1e400]"], "INVALID_ARGUMENT", "x: float64 cannot hold '1e400'", "x"),
    (["halve", "x=[1, -2.5E+999]"], "INVALID_ARGUMENT", "x: float64 cannot hold '-2.5E+999'", "x"),
    (["halve", "=[1]"], "INVALID_ARGUMENT", "=[1]: wanted name=value", ""),
    *(
        (["gaussian_blur", "image=[[1]]", f"sigma={text}"], "INVALID_ARGUMENT", message, "sigma")
        for text, message in (
            ("1e400", "sigma: float64 cannot hold '1e400'"),
            ("9007199254740993", "sigma: float64 cannot hold '9007199254740993'"),
            ("1" * 400, "sigma: float64 cannot hold '111"),
            ("1+2j", "sigma: float64 cannot hold '1+2j'"),
            ("1_0", "sigma: wanted a value of type float, got '1_0'"),
        )
    ),
    (["optional_arrays"], "INVALID_ARGUMENT", "x: kernel optional_arrays requires it: x=…", "x"),
    (["optional_arrays", "x=null"], "INVALID_ARGUMENT", "wanted an array of numbers or strings", "x"),
    (["lists", "weights=1,2"], "INVALID_ARGUMENT", "weights: wanted a JSON list of float: got '1,2'", "weights"),
    (["lists", "weights=[1e400]"], "INVALID_ARGUMENT", "weights: wanted a JSON list of float: float64", "weights"),
    (["lists", "weights=[]", "counts=[1, 0.5]"], "INVALID_ARGUMENT", "counts: element 1: wanted a value of", "counts"),
    (["choices", "kind=quadratic"], "INVALID_ARGUMENT", "kind: wanted one of 'linear', 'cubic', got 'quad", "kind"),
    (["choices", "kind=cubic", "degree=3"], "INVALID_ARGUMENT", "degree: wanted one of 1, 2, got 3", "degree"),
    (["upper_case", "x=[1]"], "INVALID_ARGUMENT", "x: wanted str, which cannot hold 1", "x"),
    (["halve", "x=null"], "INVALID_ARGUMENT", "wanted an array of numbers or strings", "x"),
    (["halve", 'x=["a"]'], "INVALID_ARGUMENT", "cannot hold 'a'", "x"),
    (["fixed_axes", "pixels=[[[1, 2, 256]]]"], "INVALID_ARGUMENT", "uint8, which cannot hold 1, 2, 256", "pixels"),
    (["fixed_axes", "pixels=[[[1, 2, 2.5]]]"], "INVALID_ARGUMENT", "cannot hold", "pixels"),
    (["fixed_axes", "pixels=[[1, 2, 3]]"], "INVALID_ARGUMENT", "of shape (height, width, 3)", "pixels"),
    (["summarise", "x=@complex.npy"], "INVALID_ARGUMENT", "wanted float64", "x"),
    (["halve", "x=@nowhere.npy"], "INVALID_ARGUMENT", "nowhere.npy: No such file", "x"),
    (["halve", "x=@broken.npy"], "INVALID_ARGUMENT", "broken.npy: ", "x"),
    (["halve", "x=@broken.npz"], "INVALID_ARGUMENT", "broken.npz: ", "x"),
    (["halve", "x=@endless.npy"], "INVALID_ARGUMENT", "endless.npy: ", "x"),
    (["halve", "x=@torn.npz"], "INVALID_ARGUMENT", "torn.npz: ", "x"),
    (["halve", f"x={'[' * 60_000}"], "INVALID_ARGUMENT", "wanted @file or a JSON array", "x"),
    (["halve", "x=@broken.png"], "INVALID_ARGUMENT", "broken.png: cannot identify image", "x"),
    (["halve", "x=@objects.npy"], "INVALID_ARGUMENT", "Object arrays cannot be loaded", "x"),
    (["halve", "x=@words.csv"], "INVALID_ARGUMENT", "could not convert string 'b'", "x"),
    (["halve", "x=@empty.csv"], "INVALID_ARGUMENT", "empty.csv has no numbers", "x"),
    (["halve", "x=@notes.txt"], "INVALID_ARGUMENT", "unknown suffix; wanted .npy", "x"),
    (["halve", "x=@"], "INVALID_ARGUMENT", "unknown suffix; wanted", "x"),
    (["matmul", "a=@-", "b=@-"], "INVALID_ARGUMENT", "stdin holds one array", ""),
    (
        ["gaussian_blur", "image=[[1]]", "sigma=wide"],
        "INVALID_ARGUMENT",
        "sigma: wanted a value of type float, got 'wide'",
        "sigma",
    ),
    (["halve", "x=[1]", "-o", "out.txt"], "INVALID_ARGUMENT", "unknown suffix; wanted one of .npy", "output"),
    (["halve", "x=[1]", "-o", "no/directory.npy"], "INVALID_ARGUMENT", "No such file or directory", "output"),
    (["halve", "x=[1]", "-o", "out.png"], "INVALID_ARGUMENT", "wanted an image of shape", "output"),
    (["halve", "x=[[[1]]]", "-o", "out.csv"], "INVALID_ARGUMENT", "one or two axes", "output"),
    (["identity", 'x="text"', "-o", "out.csv"], "INVALID_ARGUMENT", "real numbers", "output"),
    (["identity", "x=@alpha.npy", "-o", "out.jpg"], "INVALID_ARGUMENT", "out.jpg: cannot write mode RGBA", "output"),
    (["raises_kernel_error", "message=no"], "INVALID_ARGUMENT", "no", ""),
    (["raises_value_error", "x=[1]"], "INTERNAL", "the server's log", ""),
    (["sleeps", "seconds=2", "--timeout", "0.2"], "DEADLINE_EXCEEDED", "0.2 s", ""),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message", "field"), WRONG, ids=[" ".join(case[0])[:40] for case in WRONG]
)
def test_what_is_wrong_is_named(
    unlatch: Unlatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: str,
    message: str,
    field: str,
) -> None:
    """The command ends with 1, prints nothing on stdout and leaves no file.

    Stderr has an object with --json, else a line.
    """
    monkeypatch.chdir(tmp_path)
    np.save("complex.npy", np.array([1j]))
    np.save("alpha.npy", np.zeros((2, 2, 4), np.uint8))
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    for name, text in {"words.csv": "a\nb\n", "empty.csv": "a,b\n", "notes.txt": "1"}.items():
        Path(name).write_text(text)
    for suffix in (".npy", ".npz", ".png"):
        Path(f"broken{suffix}").write_text("nonsense")
    header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    with Path("endless.npy").open("wb") as endless:
        np.lib.format.write_array_header_1_0(endless, header)
    Path("torn.npz").write_bytes(b"PK\x03\x04" + bytes(100))
    before = sorted(path.name for path in tmp_path.iterdir())
    told, said = unlatch("call", *arguments, "--json"), unlatch("call", *arguments)
    assert (told.code, told.out, said.code, said.out) == (1, "", 1, "")
    assert told.error["code"] == code
    assert message in told.error["message"]
    assert told.error["field"] == field
    assert said.err.startswith(f"unlatch call: {code}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "dtype", "data"),
    [
        (["optional_arrays", "x=[1]"], "bytes", ["[1.0]", "None", "None"]),
        (["optional_arrays", "x=[1]", "y=null", "z=[]"], "bytes", ["[1.0]", "None", "[]"]),
        (["lists", 'weights=[1, "NaN"]', 'names=["a,b"]'], "bytes", ["[1.0, nan]", "(1, 2)", "('a,b',)", "[True]"]),
        (
            ["choices", "kind=cubic", "degree=2", "mode=by mean", "level=5"],
            "bytes",
            ["'cubic'", "2", "<Mode.MEAN: 'by mean'>", "<Level.HIGH: 5>", "[]"],
        ),
        (["upper_case", 'x=["größe", ""]'], "str", ["GRÖSSE", ""]),
        (["upper_case", "x=[]"], "str", []),
    ],
)
def test_arguments_of_every_form(unlatch: Unlatch, arguments: list[str], dtype: str, data: list[str]) -> None:
    """An array may be left out or be null, a list is JSON, and a choice is written plainly."""
    (output,) = unlatch("call", *arguments, "--json").json["outputs"]
    assert (output["dtype"], output["data"]) == (dtype, data)


def test_images_need_pillow(unlatch: Unlatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Pillow a picture is refused before the call, and the message names the extra to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    for arguments in (["image=@photo.png"], ["image=[[1]]", "-o", "out.png"]):
        ran = unlatch("call", "sobel", *arguments, "--json")
        assert ran.code == 1
        assert "pip install 'unlatch[images]'" in ran.error["message"]


def test_nobody_serves() -> None:
    """A missing gateway is UNAVAILABLE, within the given time."""
    gone = process("kernels", "--server", "127.0.0.1:1", "--timeout", "0.5", "--json", stderr=subprocess.PIPE)
    _, said = gone.communicate(timeout=20)
    assert gone.returncode == 1
    assert json.loads(said)["error"]["code"] == "UNAVAILABLE"


USAGE = [
    (["call"], "the following arguments are required: kernel"),
    (["call", "halve", "x=1", "--outptu", "a.npy"], "unknown option --outptu; did you mean --output"),
    (["call", "halve", "x=1", "--timeout", "0"], "wanted a number of seconds from 0.001"),
    (["call", "halve", "x=1", "--timeout", "soon", "--json"], "wanted a number of seconds from 0.001"),
    (["call", "halve", "x=1", "--json", "-o", "-"], "both write to stdout"),
    (["kernels", "--jsno"], "did you mean --json"),
    (["map", "halve", "x=@*.npy"], "-o/--output"),
    (["map", "halve", "x=@*.npy", "-o", "out", "--in-flight", "0"], "wanted a number of items from 1 to 1024, got '0'"),
    (["top", "--interval", "0"], "from 0.1 to 3600"),
    (["top", "--metrics", "8002"], "wanted host:port"),
    (["top"], "--once"),
    (["serve", "--tenants=t.toml"], "unknown option --tenants; set the variable UNLATCH_TENANTS instead"),
    (["serve", "--worker-count", "2"], "unknown option --worker-count; did you mean --workers"),
    (["gateway", "--lisen=127.0.0.1:0"], "unknown option --lisen; did you mean --listen"),
    (["completion", "ksh"], "invalid choice: 'ksh'"),
    (["cal"], "unknown command 'cal'; did you mean call?"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(case[0]) for case in USAGE])
def test_wrong_usage(unlatch: Unlatch, arguments: list[str], message: str) -> None:
    """Wrong usage ends with 2, and similar names where there are some; with --json as an object."""
    ran = unlatch(*arguments)
    assert (ran.code, ran.out) == (2, "")
    if "--json" in arguments:
        assert message in ran.error["message"]
    else:
        assert message in ran.err


def test_small_results_are_shown_and_large_ones_summarised(unlatch: Unlatch, tmp_path: Path) -> None:
    """Results are shown with dtype, shape and rounded values. Many values are a range, without NaN and infinities."""
    ran = unlatch("call", "summarise", "x=[0.1, 0.2, 0.30000001]")
    assert ran.out == "mean: float64 ()\n0.2\nranks: int64 (3,)\n[0 1 2]\n"
    large = tmp_path / "large.npy"
    np.save(large, np.append(np.arange(100_000.0), np.nan))
    ran = unlatch("call", "identity", f"x=@{large}")
    assert "float64 (100001,)\nmin 0, mean 49999.5, max 99999, 1 not finite\n" in ran.out
    assert len(ran.out) < 300


def test_nothing_that_a_terminal_obeys_is_printed(unlatch: Unlatch) -> None:
    """Escape sequences in a kernel's message or in its strings are printed as harmless characters."""
    assert "\x1b" not in unlatch("call", "raises_kernel_error", "message=\x1b[2J").err
    assert "\x1b" not in unlatch("call", "identity", 'x=["\\u001b[2J"]').out


def test_json_holds_what_json_cannot(unlatch: Unlatch) -> None:
    """NaN and infinities are strings, complex numbers are pairs. Several outputs come by name, files by path."""
    told = unlatch("call", "identity", "x=[1.5, NaN, Infinity, -Infinity]", "--json").json
    assert told == {
        "kernel": "identity",
        "outputs": [
            {"name": "output0", "dtype": "float64", "shape": [4], "data": [1.5, "NaN", "Infinity", "-Infinity"]}
        ],
    }
    assert unlatch("call", "conjugate", 'z=["1+2j"]', "--json").json["outputs"][0]["data"] == [[1.0, -2.0]]


def test_several_outputs(unlatch: Unlatch, tmp_path: Path) -> None:
    """An .npz holds all outputs by name. Other formats get a file for each output, and none goes to stdout."""
    x = "x=[3, 1, 2]"
    ran = unlatch("call", "summarise", x, "-o", str(tmp_path / "all.npz"), "--json")
    assert ran.json["files"] == [str(tmp_path / "all.npz")]
    assert [output["name"] for output in ran.json["outputs"]] == ["mean", "ranks"]
    with np.load(tmp_path / "all.npz") as archive:
        assert archive["mean"] == 2.0
        np.testing.assert_array_equal(archive["ranks"], [2, 0, 1])
    assert unlatch("call", "summarise", x, "-o", str(tmp_path / "each.csv")).code == 0
    assert (tmp_path / "each-mean.csv").read_text() == "2.0\n"
    assert (tmp_path / "each-ranks.csv").read_text() == "2\n0\n1\n"
    assert "mean, ranks" in unlatch("call", "summarise", x, "-o", "-").err


def test_a_reader_that_has_gone(mesh: Mesh) -> None:
    """Output into a closed pipe ends the command without a traceback."""
    piped = f"{sys.executable} -m unlatch kernels --server {mesh.gateway} | true"
    ran = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False, timeout=30)
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr
