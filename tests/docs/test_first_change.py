"""The commands of docs/first-change.md name what exists."""

import re
from importlib import import_module

from tests.support.mesh import ROOT

PAGE = (ROOT / "docs" / "first-change.md").read_text()
DEBUGGED = re.compile(r'-m pdb -c "from ([\w.]+) import (\w+)" -c "b (\w+)\.(\w+)" -c c -m unlatch (\w+)')


def test_breakpoints_name_functions_that_exist() -> None:
    """Each breakpoint is a function of the class that its command imports."""
    found = DEBUGGED.findall(PAGE)
    assert len(found) == PAGE.count("-m pdb") == 3
    for module, imported, owner, function, _ in found:
        assert imported == owner
        assert callable(getattr(getattr(import_module(module), owner), function))


def test_files_that_the_page_names_exist() -> None:
    """Each path in code marks is a file of the repository, except the one that the reader creates."""
    named = set(re.findall(r"`(\w+/[\w/]+\.py)`", PAGE))
    assert {path for path in named if not (ROOT / path).is_file()} == {"tests/gateway/test_metrics.py"}
