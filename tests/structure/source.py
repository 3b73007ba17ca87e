"""The product's source as syntax trees, and places in it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("unlatch", "gateway", "compute", "common")

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the source: `figure` is what was measured there."""

    path: str
    line: int
    name: str
    figure: int = 0

    def __str__(self) -> str:
        shown = f"{self.path}:{self.line} {self.name}"
        return shown if not self.figure else f"{shown}: {self.figure}"


@cache
def trees(*folders: str) -> dict[str, ast.Module]:
    """The syntax tree of each module in these folders, by its path. Generated stubs are left out."""
    paths = (path for folder in folders or PRODUCT for path in sorted((ROOT / folder).rglob("*.py")))
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(), str(path)) for path in paths if "_pb2" not in path.name
    }


def classes(*folders: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class, with the path of its module."""
    for path, tree in trees(*folders).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield path, node


def functions(*folders: str) -> Iterator[tuple[str, str, Function]]:
    """Every function and method, nested ones too, with the path of its module and its qualified name."""
    for path, tree in trees(*folders).items():
        for name, node in _functions(tree, ""):
            yield path, name, node


def _functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, FUNCTIONS):
            yield prefix + node.name, node
        yield from _functions(node, f"{prefix}{node.name}." if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else prefix)
