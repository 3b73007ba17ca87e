"""The rules: each alert fires when it should and is silent when it should, and every series that they read exists."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.monitoring.boards import merged_units
from tests.deploy.monitoring.prometheus import RULES, Watched, promtool
from tests.deploy.monitoring.rule_cases import CASES, Case
from tests.support.mesh import ROOT
from tests.support.watching import Scrape

pytestmark = pytest.mark.timeout(180)

OPERATORS_RULES = ROOT / "deploy" / "k8s" / "components" / "monitoring" / "prometheus-rule.yaml"
BOARDS = ROOT / "deploy" / "k8s" / "components" / "monitoring" / "dashboards"
RUNBOOKS = (ROOT / "docs" / "operations" / "runbooks.md").read_text()
GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
LOADED: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in LOADED if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in LOADED if "record" in rule}
# Labels that Prometheus itself adds to each target.
OF_PROMETHEUS = {"up"}


def looked_at(expression: Any) -> Iterator[Any]:
    """Return the parts of an alert's expression that must have values in a healthy mesh: it without its comparisons."""
    match expression:
        case promql_parser.ParenExpr():
            yield from looked_at(expression.expr)
        case promql_parser.BinaryExpr() if operator(expression) in {"and", "or", "unless"}:
            yield from looked_at(expression.lhs)
            yield from looked_at(expression.rhs)
        case promql_parser.BinaryExpr() if operator(expression) in {"==", "!=", ">", "<", ">=", "<="}:
            yield from looked_at(expression.lhs)
        case promql_parser.Call() if expression.func.name in {"absent", "label_replace"}:
            yield from looked_at(expression.args[0])
        case _:
            yield expression


def operator(expression: Any) -> str:
    """Return the operator of a binary expression as it is written: the parser has no other name for it."""
    return str(expression).removeprefix(str(expression.lhs)).split()[0]


def names(expression: Any) -> set[str]:
    """Return the metrics that an expression names."""
    found: set[str] = set()

    def visit(part: Any) -> bool:
        if isinstance(part, promql_parser.VectorSelector):
            assert part.name, f"a selector without a name in {expression}"
            found.add(part.name)
        return True

    promql_parser.walk(expression, visit)
    return found


def test_rules_are_sound() -> None:
    """Promtool finds nothing wrong with the rules."""
    assert f"{len(LOADED)} rules found" in promtool("check", "rules", "--lint-fatal", str(RULES))


def test_units_of_a_target_are_told_apart() -> None:
    """No rule adds up, or matches, workers or processes of the same name that are of different units."""
    for rule in LOADED:
        assert not list(merged_units(rule["expr"])), rule.get("alert") or rule["record"]


def test_operators_rules_are_the_same() -> None:
    """The operator's rules are those that `make rules` makes of the source."""
    made = yaml.safe_load(OPERATORS_RULES.read_text())
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load(RULES.read_text())


def rules_of(alert: str) -> list[dict[str, Any]]:
    """Return the groups of rules with this alert alone, and the recorded series that it reads, also through others.

    Promtool evaluates every rule at every step, so with all rules it takes ten times as long.
    """
    kept = {alert}
    read = names(promql_parser.parse(ALERTS[alert]["expr"]))
    while more := (read & RECORDED.keys()) - kept:
        kept |= more
        read = {name for record in more for name in names(promql_parser.parse(RECORDED[record]["expr"]))}
    return [
        {**group, "rules": [rule for rule in group["rules"] if rule.get("alert", rule.get("record")) in kept]}
        for group in GROUPS
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alert(case: Case, tmp_path: Path) -> None:
    """The alert fires with its labels, or is silent."""
    labels = {"alertname": case.alert, "alertstate": "firing", "severity": ALERTS[case.alert]["labels"]["severity"]}
    written = ",".join(f'{name}="{value}"' for name, value in {**labels, **(case.fires or {})}.items())
    test = {
        "interval": case.every,
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "promql_expr_test": [
            {
                "expr": f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}',
                "eval_time": case.at,
                "exp_samples": [] if case.fires is None else [{"labels": f"ALERTS{{{written}}}", "value": 1}],
            }
        ],
    }
    rules, file = tmp_path / "rules.yml", tmp_path / "test.yml"
    rules.write_text(json.dumps({"groups": rules_of(case.alert)}))
    file.write_text(
        json.dumps({"rule_files": [str(rules)], "evaluation_interval": case.evaluated or case.every, "tests": [test]})
    )
    promtool("test", "rules", str(file))


def test_every_alert_is_tested_both_ways() -> None:
    """Each alert has a case in which it fires, and one in which it does not."""
    assert {case.alert for case in CASES if case.fires is not None} == set(ALERTS)
    assert {case.alert for case in CASES if case.fires is None} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS)
def test_alert_says_what_it_knows(alert: dict[str, Any]) -> None:
    """Each alert has a severity, a summary and a runbook, and uses no label that it does not have."""
    assert alert["labels"]["severity"] in {"critical", "warning"}
    annotations = alert["annotations"]
    assert annotations["summary"].endswith(".")
    assert annotations["description"].endswith(".")
    assert annotations["runbook_url"] == f"docs/operations/runbooks.md#{alert['alert'].lower()}"
    fires = [case.fires for case in CASES if case.alert == alert["alert"] and case.fires is not None]
    named = set(re.findall(r"\$labels\.(\w+)", str(annotations)))
    # Some labels are named only where a series has them.
    optional = set(re.findall(r"{{ with \$labels\.(\w+) }}", str(annotations)))
    assert all(named - optional <= labels.keys() for labels in fires), named
    assert all(any(label in labels for labels in fires) for label in optional), optional


def test_every_alert_leads_to_a_panel() -> None:
    """Grafana finds the board and the panel that its annotations name."""
    boards = [json.loads(file.read_text()) for file in BOARDS.glob("*.json")]
    panels = {(board["uid"], str(panel["id"])): panel for board in boards for panel in board["panels"]}
    for name, alert in ALERTS.items():
        led_to = panels[alert["annotations"]["__dashboardUid__"], alert["annotations"]["__panelId__"]]
        assert led_to["type"] != "row", name


def test_every_alert_has_its_runbook() -> None:
    """docs/operations/runbooks.md has a section for each alert, in the order of the rules, and for nothing else."""
    assert re.findall(r"^#+ (Unlatch\w+)$", RUNBOOKS, re.MULTILINE) == list(ALERTS)


def test_every_rule_looks_at_something(watched: Watched) -> None:
    """For a mesh under load every recorded series has values, and so has each part that an alert compares."""
    for name, rule in RECORDED.items():
        assert watched.ask(rule["expr"]), f"{name} would have no value"
        assert watched.ask(name), f"{name} was not recorded"
    for name, rule in ALERTS.items():
        for part in looked_at(promql_parser.parse(rule["expr"])):
            assert watched.ask(str(part)), f"{name} looks at nothing: {part}"


def test_rules_name_what_is_exported(watched: Watched) -> None:
    """The rules read metrics of the mesh, series that other rules record, and `up`."""
    exported = {name for target in watched.targets for name, _ in Scrape(target.address).samples}
    for rule in LOADED:
        unknown = names(promql_parser.parse(rule["expr"])) - exported - RECORDED.keys() - OF_PROMETHEUS
        assert not unknown, f"{rule.get('alert') or rule['record']} names {unknown}"


def test_rules_evaluate_without_a_fault(watched: Watched) -> None:
    """Prometheus has evaluated all rules and templates without an error, and no two results had the same labels."""
    told = watched.prometheus.get("rules")["groups"]
    assert sum(len(group["rules"]) for group in told) == len(LOADED)
    assert [rule["lastError"] for group in told for rule in group["rules"] if rule["health"] != "ok"] == []


def test_metrics_are_as_they_should_be(watched: Watched) -> None:
    """Promtool has no objection to the names, units and texts that each service exports."""
    for target in watched.targets:
        assert promtool("check", "metrics", fed=Scrape(target.address).text) == ""
