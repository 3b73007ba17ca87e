"""How docstrings begin: with the name of what they are about, or with what it does."""

import ast

from tests.structure.source import FUNCTIONS, Site, trees

# Each stands for something that the reader has not been told of yet.
REFUSED = {"It", "One", "Who", "What", "So"}
FOLDERS = ("unlatch", "gateway", "compute", "common", "bench", "deploy", "examples", "tests")


def refused_docstrings() -> list[str]:
    """Every docstring that begins with one of the refused words, with its place."""
    found = []
    for path, tree in trees(*FOLDERS).items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
                first = "".join(letter if letter.isalpha() else " " for letter in text).split()[0]
                if first in REFUSED:
                    found.append(str(Site(path, getattr(node, "lineno", 1), text.partition("\n")[0])))
    return found


def test_docstrings_name_what_they_are_about() -> None:
    """None begins with It, One, Who, What or So."""
    assert refused_docstrings() == []
