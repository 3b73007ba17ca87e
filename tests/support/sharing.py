"""Sharing of tests between the processes of pytest-xdist."""

from pathlib import Path
from typing import Any

from xdist.scheduler import LoadFileScheduling

_ROOT = Path(__file__).resolve().parents[2]
# Folders of tests that need no mesh. Each file takes seconds at most.
_QUICK = ("tests/bench/", "tests/common/", "tests/compute/", "tests/gateway/", "tests/structure/")


class LoadPackageScheduling(LoadFileScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """Give a file to one process, and all files of a package (a folder with `__init__.py`) to one process.

    The files of a package share a mesh that is expensive: one process starts it, and ends it after its last test.
    Quick files come last. So no process works on a slow file after the others have ended.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        folder = Path(file).parent
        return str(folder) if (_ROOT / folder / "__init__.py").exists() else file

    def _assign_work_unit(self, node: Any) -> None:
        slow = next((files for files in self.workqueue if not files.startswith(_QUICK)), None)
        if slow is not None:
            self.workqueue.move_to_end(slow, last=False)
        super()._assign_work_unit(node)
