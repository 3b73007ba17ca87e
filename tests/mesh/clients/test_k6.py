"""k6 drives ModelInfer for some seconds: UNLATCH_K6_SECONDS, 3 unless told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mesh import ROOT, Mesh

SECONDS = int(os.environ.get("UNLATCH_K6_SECONDS", "3"))
K6 = shutil.which("k6", path=str(Path(sys.executable).parent)) or shutil.which("k6")


@pytest.mark.skipif(K6 is None, reason="k6 is not on this machine")
@pytest.mark.timeout(SECONDS + 60)
def test_k6_finds_no_fault(mesh: Mesh, tmp_path: Path) -> None:
    """In a load of calls each answer has its status, its id and its bytes, and none is missing."""
    assert K6 is not None
    summary = tmp_path / "summary.json"
    ran = subprocess.run(
        [
            *(K6, "run", "--quiet", "--summary-export", str(summary)),
            *("-e", f"TARGET={mesh.gateway}", "-e", f"SECONDS={SECONDS}"),
            str(ROOT / "tests" / "mesh" / "clients" / "infer.js"),
        ],
        env={**os.environ, "K6_NO_USAGE_REPORT": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS + 50,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}\n{mesh}"
    told = json.loads(summary.read_text())
    calls, took = told["metrics"]["iterations"], told["metrics"]["grpc_req_duration"]
    checks = {name: (check["passes"], check["fails"]) for name, check in told["root_group"]["checks"].items()}
    assert calls["count"] > 0
    names = ("status is OK", "id is the request's", "bytes are the product's")
    assert checks == dict.fromkeys(names, (calls["count"], 0))
    print(f"k6: {calls['count']} calls in {SECONDS} s, median {took['med']:.1f} ms, p95 {took['p(95)']:.1f} ms")
