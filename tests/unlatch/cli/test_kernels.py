"""`unlatch kernels`, `unlatch completion`, and which modules a command loads."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mesh import ROOT, Mesh
from tests.unlatch.cli.conftest import Unlatch
from unlatch.cli import COMMANDS, EXIT_CODES, run

# Any numbers of the right shape will do for these kernels.
SIMPLE = (
    *("batches", "conjugate", "default_scalars", "fft", "fixed_axes", "gaussian_blur", "halve", "histogram"),
    *("choices", "lists", "optional_arrays", "shifted", "upper_case"),
    *("identity", "matmul", "monte_carlo_option", "process_id", "required_scalars", "shared_axes", "sobel", "svd"),
)


def test_table_and_names(unlatch: Unlatch) -> None:
    """The table has a kernel's name, signature and first sentence; --names prints the names alone."""
    names = unlatch("kernels", "--names").out.split()
    assert names == sorted(names)
    table = unlatch("kernels").out
    assert all(name in table for name in names)
    assert "Compute the matrix" in table


def test_one_kernel_in_full(unlatch: Unlatch, mesh: Mesh) -> None:
    """A kernel's page has every argument with its dtypes and axes, the whole docstring, the options, and a command."""
    out = unlatch("kernels", "fixed_axes").out
    assert "pixels: uint8[height width 3]" in out
    assert "Return the largest of a fixed number of channels." in out
    assert "version 1\nnot pure: is run at most once" in out
    values = "[[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]"
    assert out.endswith(f"\nunlatch call fixed_axes 'pixels={values}' --server {mesh.gateway}\n")
    assert "sigma: float = 1.0" in unlatch("kernels", "gaussian_blur").out
    assert "did you mean gaussian_blur?" in unlatch("kernels", "gausian_blur").err


def test_json(unlatch: Unlatch) -> None:
    """All kernels are a list, one is an object. A value that JSON has no number for is a string."""
    listed = unlatch("kernels", "--json").json
    one = unlatch("kernels", "histogram", "--json").json
    assert one in listed
    assert one["inputs"][0]["dims"] == ["..."]
    low = {scalar["name"]: scalar for scalar in one["scalars"]}["low"]
    assert low == {
        "name": "low",
        "type": "float",
        "required": False,
        "default": "NaN",
        "choices": [],
        "many": False,
    }
    assert math.isnan(float(low["default"]))


def test_page_shows_what_may_be_left_out_and_the_choices(unlatch: Unlatch) -> None:
    """Each form of a signature is written as in Python, and is plain data in JSON."""
    assert "    y: float64[n] | None = None,\n" in unlatch("kernels", "optional_arrays").out
    assert "    counts: list[int] = [1, 2],\n" in unlatch("kernels", "lists").out
    assert "    kind: 'linear'|'cubic',\n    degree: 1|2 = 1,\n" in unlatch("kernels", "choices").out
    assert "x: str[*any]" in unlatch("kernels", "upper_case").out
    described = unlatch("kernels", "choices", "--json").json["scalars"]
    assert described[0] | {"choices": ["linear", "cubic"], "many": False, "default": None} == described[0]
    assert described[4] | {"choices": ["by mean", "by maximum"], "many": True, "default": []} == described[4]
    arrays = unlatch("kernels", "optional_arrays", "--json").json["inputs"]
    assert [(array["optional"], array["text"]) for array in arrays] == [(False, False), (True, False), (True, False)]


@pytest.mark.parametrize("kernel", SIMPLE)
def test_example_works_as_printed(unlatch: Unlatch, kernel: str) -> None:
    """A shell runs the examples of many kernels: any axes, fixed ones, several arrays, scalars of all types."""
    example = unlatch("kernels", kernel).out.splitlines()[-1]
    script = "\n".join(["unlatch() { " + sys.executable + ' -m unlatch "$@"; }', "set -e", example])
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_help_lists_commands_and_exit_codes(unlatch: Unlatch) -> None:
    """`unlatch`, `--help`, and the help of each command end with 0."""
    out = unlatch("--help").out
    assert out == unlatch("-h").out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert EXIT_CODES in out
    for name in COMMANDS:
        helped = unlatch(name, "--help")
        assert helped.code == 0
        assert helped.out.startswith(f"usage: unlatch {name}")


@pytest.mark.parametrize("name", ["serve", "gateway", "compute"])
def test_help_of_services_shows_no_python(unlatch: Unlatch, name: str) -> None:
    """Values and defaults are shown as one writes them, and the variables are named."""
    out = " ".join(unlatch(name, "--help").out.split())
    for wrong in (
        " str",
        " int]",
        " float",
        "tuple[",
        "dict[",
        "default: )",
        "default: None",
        "('",
        "{}",
        "gethostname",
    ):
        assert wrong not in out
    assert "--drain-seconds NUMBER" in out
    assert "--kernels LIST" in out or name == "gateway"
    assert "a variable UNLATCH_A_NAME" in out
    assert {"serve": "set by their variables here", "gateway": "(default: 127.0.0.1:8011)"}.get(name, "") in out


def test_docs_say_the_same() -> None:
    """The page docs/cli.md lists every command, and the exit codes as `--help` has them."""
    page = (ROOT / "docs" / "cli.md").read_text()
    table = page[page.index("| command | does |") : page.index("`kernels`, `call` and `map` take")]
    assert all(f"`{name}" in table for name in COMMANDS)
    told = dict(line.split(maxsplit=1) for line in EXIT_CODES.splitlines()[1:])
    assert dict(re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)) == told


def test_a_command_loads_only_itself() -> None:
    """Neither a server's children nor `unlatch --help` import what only a client, a table or an image needs."""
    for code in ("import unlatch.__main__", "import unlatch.cli; unlatch.cli.run(['--help'])"):
        program = f"import sys; {code}; print(*sys.modules)"
        ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = set(ran.stdout.split())
        assert not loaded & {"numpy", "grpc", "rich", "PIL", "shtab", "prometheus_client", "unlatch.client"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_script_is_valid(unlatch: Unlatch, tmp_path: Path, shell: str) -> None:
    """The script names every command, and each shell on this machine reads it without complaint."""
    script = tmp_path / "completion"
    script.write_text(unlatch("completion", shell).out)
    assert all(name in script.read_text() for name in COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n", str(script)], check=True)


def test_bash_completes(unlatch: Unlatch, tmp_path: Path) -> None:
    """A real bash completes commands, flags, the names of kernels, and their arguments and choices."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    (tmp_path / "completion").write_text(unlatch("completion", "bash").out)
    # The names come from the gateway at the default address, which is not this test's.
    names = ["gaussian_blur", "histogram"]
    arguments = unlatch("kernels", "choices", "--names").out.splitlines()
    assert arguments[:5] == ["kind=linear", "kind=cubic", "degree=1", "degree=2", "mode=by mean"]
    told = [f"printf '%s\\n' {' '.join(map(repr, lines))}" for lines in (arguments, names)]
    (tmp_path / "unlatch").write_text(f'#!/bin/sh\nif [ "$2" = choices ]; then {told[0]}; else {told[1]}; fi\n')
    (tmp_path / "unlatch").chmod(0o755)

    def completed(*words: str) -> set[str]:
        line = " ".join(words).replace(" = ", "=")
        asked = f"""
            source {tmp_path}/completion
            COMP_WORDS=({" ".join(map(json.dumps, words))}) COMP_CWORD={len(words) - 1}
            COMP_LINE={json.dumps(line)} COMP_POINT={len(line)}
            _shtab_unlatch unlatch {json.dumps(words[-1])} {json.dumps(words[-2])}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        ran = subprocess.run(["bash", "-c", asked], env=environment, capture_output=True, text=True, check=True)
        return set(ran.stdout.split())

    assert completed("unlatch", "") >= set(COMMANDS)
    assert completed("unlatch", "ca") == {"call"}
    assert completed("unlatch", "call", "") >= {"gaussian_blur", "histogram"}
    assert completed("unlatch", "call", "choices", "ki") >= {"kind=linear", "kind=cubic"}
    assert "degree=1" not in completed("unlatch", "call", "choices", "ki")
    assert completed("unlatch", "call", "choices", "kind=cu") >= {"kind=cubic"}
    # As bash itself breaks the line.
    assert "cubic" in completed("unlatch", "call", "choices", "kind", "=", "cu")
    assert completed("unlatch", "call", "choices", "degree=2", "mod") >= {"modes="}
    assert completed("unlatch", "kernels", "gau") == {"gaussian_blur"}
    assert completed("unlatch", "serve", "--wor") == {"--workers", "--worker-python"}
    assert completed("unlatch", "top", "--on") == {"--once"}


def test_server_from_a_variable(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --server, client commands call the gateway that UNLATCH_SERVER names."""
    monkeypatch.setenv("UNLATCH_SERVER", mesh.gateway)
    assert run(["kernels", "--json"]) == 0
    assert "identity" in capsys.readouterr().out
    monkeypatch.setenv("UNLATCH_SERVER", "127.0.0.1:1")
    assert run(["kernels", "--server", mesh.gateway, "--json"]) == 0
