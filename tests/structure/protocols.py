"""Which classes implement which Protocols, by the names of their members and of their methods' parameters.

Types are not compared: mypy does that where an object is passed for a Protocol.
"""

import ast
from dataclasses import dataclass, field
from functools import cache

from tests.structure.source import Function, Site, classes


@dataclass(slots=True)
class Shape:
    """The attributes that a class offers, and its methods with the names of their parameters."""

    attributes: set[str] = field(default_factory=set)
    methods: dict[str, Function] = field(default_factory=dict)

    def add(self, other: "Shape") -> None:
        """Take what a base class offers beside it."""
        self.attributes |= other.attributes
        self.methods = {**other.methods, **self.methods}

    def implements(self, protocol: "Shape") -> bool:
        """Whether a class of this shape can stand for a Protocol of the other."""
        named = self.attributes | self.methods.keys()
        return protocol.attributes <= named and all(
            name in self.attributes or (name in self.methods and _accepts(self.methods[name], wanted))
            for name, wanted in protocol.methods.items()
        )


@cache
def implementations() -> dict[Site, list[str]]:
    """The product's Protocols, and for each the classes of product and bench that implement it."""
    found = [*classes(), *classes("bench")]
    known = {node.name: node for _, node in found}
    protocols = {(path, node.name): node for path, node in classes() if _is_protocol(node)}
    concrete = [(path, node) for path, node in found if not _is_protocol(node)]
    shapes = [(f"{path}:{node.name}", _shape(node, known)) for path, node in concrete]
    return {
        Site(path, node.lineno, name): [where for where, shape in shapes if shape.implements(_shape(node, known))]
        for (path, name), node in protocols.items()
    }


def _is_protocol(node: ast.ClassDef) -> bool:
    return "Protocol" in map(_name, node.bases)


def _name(base: ast.expr) -> str:
    return ast.unparse(base).partition("[")[0].rpartition(".")[2]


def _shape(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> Shape:
    shape = Shape()
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                shape.attributes.add(name)
            case ast.Assign():
                shape.attributes |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if statement.decorator_list and "property" in ast.unparse(statement.decorator_list[0]):
                    shape.attributes.add(statement.name)
                else:
                    shape.methods[statement.name] = statement
                shape.attributes |= _assigned(statement)
    for base in map(_name, node.bases):
        if base in known and known[base] is not node:
            shape.add(_shape(known[base], known))
    return shape


def _assigned(function: Function) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def _accepts(method: Function, wanted: Function) -> bool:
    """Whether a method can be called as the Protocol's is: by as many positions, by the same keywords."""
    mine, theirs = method.args, wanted.args
    if isinstance(method, ast.AsyncFunctionDef) != isinstance(wanted, ast.AsyncFunctionDef):
        return False
    positions = len(mine.args) + len(mine.posonlyargs)
    asked = len(theirs.args) + len(theirs.posonlyargs)
    keywords = {argument.arg for argument in mine.kwonlyargs}
    needed = {a.arg for a, default in zip(mine.kwonlyargs, mine.kw_defaults, strict=True) if default is None}
    given = {argument.arg for argument in theirs.kwonlyargs}
    fits = positions - len(mine.defaults) <= asked <= positions or mine.vararg is not None
    return fits and (given <= keywords or mine.kwarg is not None) and needed <= given
