"""A replica with kernels that cannot be served does not start."""

import re
from pathlib import Path

import pytest

from tests.compute.worker.test_catalogue import WRONG
from tests.support.mesh import Service


@pytest.mark.parametrize("kind", ["syntax", "raises", "exits", "twice", "no annotation"])
def test_replica_does_not_start_with_wrong_kernels(kind: str, tmp_path: Path) -> None:
    """`python -m unlatch.compute` ends with exit code 2, has file and line on stderr, and leaves no process."""
    text, line, says = WRONG[kind]
    path = tmp_path / "wrong_kernels.py"
    path.write_text(text)
    flags = ["--listen", f"unix:{tmp_path}/s", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]
    with Service("compute", *flags, "--workers", "2", "--kernels", str(path)) as replica:
        assert replica.wait() == 2, replica
        said = "\n".join(replica.lines)
        assert re.search(rf"{re.escape(str(path))}:{line}: .*{says}", said), replica
        assert "Traceback" not in said, replica
