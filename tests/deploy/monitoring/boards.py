"""Grafana's boards as tests read them: the queries of panels, with the board's variables filled in as in Grafana."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser

from tests.deploy.monitoring.prometheus import Prometheus
from tests.support.mesh import ROOT

DIRECTORY = ROOT / "deploy" / "k8s" / "components" / "monitoring" / "dashboards"
FILES = sorted(DIRECTORY.glob("*.json"))
_LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")
# Grafana fills these in by itself: here the smallest values that it would use at this fixture's scrape interval.
_GRAFANAS = {"__rate_interval": "4s"}
Values = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A query of a panel."""

    board: str
    number: int
    title: str
    expr: str

    def __str__(self) -> str:
        return f"{self.board} {self.number} {self.title!r}"


@dataclass(frozen=True, slots=True)
class Board:
    """A board's JSON."""

    json: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Board":
        return cls(json.loads(path.read_text()))

    @property
    def uid(self) -> str:
        return str(self.json["uid"])

    @property
    def panels(self) -> list[Mapping[str, Any]]:
        """All panels but the headlines of rows."""
        return [panel for panel in self.json["panels"] if panel["type"] != "row"]

    @property
    def variables(self) -> dict[str, str]:
        """The variables that Prometheus is asked for, in their order, with their queries."""
        asked = self.json["templating"]["list"]
        return {one["name"]: one["query"]["query"] for one in asked if one["type"] == "query"}

    def asks(self) -> Iterator[Asked]:
        """Every query of every panel."""
        for panel in self.panels:
            for target in panel["targets"]:
                yield Asked(self.uid, panel["id"], panel["title"], target["expr"])

    def everything(self) -> Values:
        """The value of each variable while nothing has been chosen."""
        asked = self.json["templating"]["list"]
        return _GRAFANAS | {one["name"]: one["allValue"] for one in asked if one["type"] == "query"}

    def choices(self, prometheus: Prometheus) -> dict[str, list[str]]:
        """The values of each variable that a reader can choose, where all is chosen of those before it."""
        found: dict[str, list[str]] = {}
        for name, query in self.variables.items():
            asked = _LABEL_VALUES.fullmatch(fill(query, {name: _any(values) for name, values in found.items()}))
            assert asked is not None, query
            found[name] = prometheus.get(f"label/{asked['label']}/values", **{"match[]": asked["series"]})
        return found

    def chosen(self, prometheus: Prometheus) -> Values:
        """The value of each variable when every value has been ticked."""
        return _GRAFANAS | {name: _any(values) for name, values in self.choices(prometheus).items()}


def boards() -> list[Board]:
    """Return all boards."""
    return [Board.read(path) for path in FILES]


def fill(text: str, values: Values) -> str:
    """Replace each variable after a `$` by its value. Fails where there is none."""
    return re.sub(r"\$([a-z_]\w*)", lambda found: values[found[1]], text)


def metrics_of(expr: str) -> set[str]:
    """Return the names of the series that a query reads. Raises ValueError where it is not PromQL."""
    names: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expr), look)
    return names


def merged_units(expr: str) -> Iterator[str]:
    """Return the parts of a query that take workers or processes of different units for the same one."""
    found: list[str] = []

    def look(node: Any) -> None:
        labels: set[str] = set()
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels = set(node.modifier.labels) if node.modifier.type == promql_parser.AggModifierType.By else set()
            labels -= set() if labels & {"process", "worker"} else labels
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None and node.modifier.matching:
            labels = set(node.modifier.matching.labels) & {"pod", "unit"}
        if labels and "unit" not in labels:
            found.append(str(node))

    promql_parser.walk(promql_parser.parse(expr), look)
    yield from found


def _any(values: list[str]) -> str:
    """Write a regular expression in a PromQL string, where a backslash is escaped too."""
    escaped = [re.sub(r"([^\w -])", r"\\\\\1", value) for value in values]
    return f"({'|'.join(escaped)})"
