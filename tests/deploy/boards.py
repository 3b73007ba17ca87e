"""Grafana's boards as a test reads them: what a panel asks, with its board's variables filled in as Grafana does."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser

from tests.deploy.prometheus import Prometheus
from tests.support.mesh import ROOT

DIRECTORY = ROOT / "deploy" / "k8s" / "components" / "monitoring" / "dashboards"
FILES = sorted(DIRECTORY.glob("*.json"))
_LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")
# What Grafana fills in of itself: here the least that it would at this fixture's scrape interval.
_GRAFANAS = {"__rate_interval": "4s"}
Values = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """One query of a panel."""

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
        """All but the headlines of rows."""
        return [panel for panel in self.json["panels"] if panel["type"] != "row"]

    @property
    def variables(self) -> dict[str, str]:
        """Those that Prometheus is asked for, in their order, with what it is asked."""
        asked = self.json["templating"]["list"]
        return {one["name"]: one["query"]["query"] for one in asked if one["type"] == "query"}

    def asks(self) -> Iterator[Asked]:
        """Every query of every panel."""
        for panel in self.panels:
            for target in panel["targets"]:
                yield Asked(self.uid, panel["id"], panel["title"], target["expr"])

    def everything(self) -> Values:
        """What stands for its variables while nothing has been chosen."""
        asked = self.json["templating"]["list"]
        return _GRAFANAS | {one["name"]: one["allValue"] for one in asked if one["type"] == "query"}

    def choices(self, prometheus: Prometheus) -> dict[str, list[str]]:
        """What its reader can choose of each variable, where all is chosen of those before it."""
        found: dict[str, list[str]] = {}
        for name, query in self.variables.items():
            asked = _LABEL_VALUES.fullmatch(fill(query, {name: _any(values) for name, values in found.items()}))
            assert asked is not None, query
            found[name] = prometheus.get(f"label/{asked['label']}/values", **{"match[]": asked["series"]})
        return found

    def chosen(self, prometheus: Prometheus) -> Values:
        """What stands for its variables when each value that there is has been ticked."""
        return _GRAFANAS | {name: _any(values) for name, values in self.choices(prometheus).items()}


def boards() -> list[Board]:
    """All that are there."""
    return [Board.read(path) for path in FILES]


def fill(text: str, values: Values) -> str:
    """What stands after a `$` replaced by its value. Fails where there is none."""
    return re.sub(r"\$([a-z_]\w*)", lambda found: values[found[1]], text)


def metrics_of(expr: str) -> set[str]:
    """The names of the series that a query reads. Raises ValueError where it is no PromQL."""
    names: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expr), look)
    return names


def _any(values: list[str]) -> str:
    """A regular expression in a PromQL string, so that what escapes is escaped itself."""
    escaped = [re.sub(r"([^\w -])", r"\\\\\1", value) for value in values]
    return f"({'|'.join(escaped)})"
