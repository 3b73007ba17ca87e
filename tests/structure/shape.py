"""Figures of the product's shape, read from its source. `python -m tests.structure.shape` prints them."""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

from tests.structure.protocols import implementations
from tests.structure.source import FUNCTIONS, PRODUCT, ROOT, Function, Site, classes, functions, trees

MAX_COMPLEXITY = 12
_SPACE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# A lane's server calls the first; what holds the call has the other.
CANCEL = {"abandon", "withdraw"}


def import_circle() -> list[str]:
    """Modules that import one another in a circle, at run time: the first circle that is found."""
    graph = grimp.build_graph("unlatch", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def complexity(function: Function) -> int:
    """The cyclomatic complexity of a function as radon counts it; functions nested in it count by themselves."""
    return 1 + sum(_branches(node) for node in _own_nodes(function))


def complex_functions() -> list[Site]:
    """Every function of the product, the most complex first."""
    found = [Site(path, node.lineno, name, complexity(node)) for path, name, node in functions()]
    return sorted(found, key=lambda site: -site.figure)


def thin_protocols() -> dict[Site, list[str]]:
    """Protocols that at most one class of product and bench implements, and these classes."""
    return {site: classes for site, classes in implementations().items() if len(classes) <= 1}


def repeated_class_names() -> dict[str, list[Site]]:
    """Names that more than one class of the product has."""
    named = defaultdict(list)
    for path, node in classes():
        named[node.name].append(Site(path, node.lineno, node.name))
    return {name: sites for name, sites in sorted(named.items()) if len(sites) > 1}


def releases() -> list[Site]:
    """Places outside compute/call.py that give a call's memory back themselves."""
    return [
        Site(path, node.lineno, ast.unparse(node))
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if path.startswith("compute/") and not path.startswith(("compute/call.py", "compute/worker/"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "release"
    ]


def cancel_way() -> list[str]:
    """The files that a cancel crosses in compute, from `Call.abandon` to a method that carries it out.

    A method of CANCEL's names is a step of the way if it passes the call on, alone, to another one of them. An object
    that the class has made of a class elsewhere is the class's own data, as a backlog is, and no step.
    """
    local = {node.name for _, node in classes("compute")}
    methods = [
        (path, f"{owner.name}.{method.name}", _passes_on(method, owner, local))
        for path, owner in classes("compute")
        for method in owner.body
        if isinstance(method, FUNCTIONS) and method.name in CANCEL
    ]
    assert "Call.abandon" in {name for _, name, _ in methods}
    steps = {path for path, name, passes_on in methods if name == "Call.abandon" or passes_on}
    ends = {path for path, _, passes_on in methods if not passes_on} - steps
    return [*sorted(steps), *sorted(ends)[:1]]


def lines(source: str) -> dict[str, int]:
    """How many lines of a module are code, docstring, comment alone, and blank."""
    kinds: dict[int, str] = {}
    docstrings = {line for node in ast.walk(ast.parse(source)) for line in _docstring_lines(node)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        for line in range(token.start[0], token.end[0] + 1):
            if token.type == tokenize.COMMENT:
                kinds.setdefault(line, "comment")
            elif token.type not in _SPACE:
                kinds[line] = "docstring" if line in docstrings else "code"
    total = source.count("\n")
    counted = {kind: sum(1 for each in kinds.values() if each == kind) for kind in ("code", "docstring", "comment")}
    return {**counted, "blank": total - sum(counted.values())}


def product_lines(root: Path = ROOT) -> dict[str, int]:
    """The lines of the product in this tree, without tests and generated code."""
    total: dict[str, int] = defaultdict(int)
    for folder in PRODUCT:
        for path in (root / folder).rglob("*.py"):
            if "_pb2" not in path.name:
                for kind, count in lines(path.read_text()).items():
                    total[kind] += count
    return dict(total)


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node
            waiting += ast.iter_child_nodes(node)


def _branches(node: ast.AST) -> int:
    branches = 0
    match node:
        case ast.If() | ast.IfExp():
            branches = 1
        case ast.For() | ast.AsyncFor() | ast.While():
            branches = 1 + bool(node.orelse)
        case ast.Try() | ast.TryStar():
            branches = len(node.handlers) + bool(node.orelse)
        case ast.BoolOp():
            branches = len(node.values) - 1
        case ast.comprehension():
            branches = 1 + len(node.ifs)
        case ast.Match():
            branches = sum(1 for case in node.cases if ast.unparse(case.pattern) != "_")
    return branches


def _passes_on(method: Function, owner: ast.ClassDef, local: set[str]) -> bool:
    """Whether a method that carries a cancel passes the call on to another such method of compute."""
    given = [argument.arg for argument in method.args.args[1:]]
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CANCEL
        and [ast.unparse(argument) for argument in node.args] == given
        and _class_of(node.func.value, owner) in {"", *local}
        for node in _own_nodes(method)
    )


def _class_of(attribute: ast.expr, owner: ast.ClassDef) -> str:
    """The class that a class's own attribute is made of where it is assigned; "" if that cannot be seen."""
    made = (node for node in ast.walk(owner) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call))
    for node in made:
        if ast.unparse(node.targets[0]) == ast.unparse(attribute):
            return ast.unparse(node.value).partition("(")[0].partition("[")[0]
    return ""


def _docstring_lines(node: ast.AST) -> range:
    if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or ast.get_docstring(node, clean=False) is None:
        return range(0)
    first = node.body[0]
    return range(first.lineno, (first.end_lineno or first.lineno) + 1)


def main(root: Path = ROOT) -> None:
    """Print every figure, and the places that it counts; the lines are those of the tree at `root`."""
    figures = complex_functions()
    print("import circle:", " -> ".join(import_circle()) or "none")
    print(f"\nfunctions: {len(figures)}, median complexity {figures[len(figures) // 2].figure}; over {MAX_COMPLEXITY}:")
    print(*(f"  {site}" for site in figures if site.figure > MAX_COMPLEXITY), sep="\n")
    print(f"\nProtocols: {len(implementations())}; with at most one implementation: {len(thin_protocols())}")
    print(*(f"  {site} <- {', '.join(found) or 'none'}" for site, found in implementations().items()), sep="\n")
    print("\nclass names used more than once:", len(repeated_class_names()))
    print(*(f"  {name}: {', '.join(map(str, sites))}" for name, sites in repeated_class_names().items()), sep="\n")
    print("\ncall.release() outside Call:", len(releases()))
    print(*(f"  {site}" for site in releases()), sep="\n")
    print("\nfiles on a cancel's way:", len(cancel_way()), *cancel_way())
    print("\nlines:", product_lines(root))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
