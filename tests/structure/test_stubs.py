"""The stubs in protos/, and the descriptors that Envoy reads, are what protoc makes of the contracts."""

import subprocess
from pathlib import Path

from tests.support.mesh import ROOT


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    """`make protos` into an empty directory gives the very files that are here."""
    made = subprocess.run(
        ["make", "--no-print-directory", "protos", f"OUT={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    fresh = {path.name: path.read_text() for path in (tmp_path / "unlatch" / "protos").iterdir()}
    here = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2*.py*")}
    assert fresh.keys() == here.keys()
    for name, text in fresh.items():
        assert text == here[name], f"protos/{name} is not what its .proto says: run `make protos`"
    descriptors = Path("deploy", "envoy", "inference.binpb")
    made_now, committed = (tmp_path / descriptors).read_bytes(), (ROOT / descriptors).read_bytes()
    assert made_now == committed, f"{descriptors} is not what the .proto says: run `make protos`"
