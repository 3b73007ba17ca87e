"""Grafana's boards: their queries, asked of a real Prometheus that has watched a mesh under load, and their making."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.deploy.monitoring.boards import DIRECTORY, FILES, Asked, Board, boards, fill, merged_units, metrics_of
from tests.deploy.monitoring.prometheus import Watched, promtool
from tests.deploy.monitoring.rule_cases import units
from tests.support.mesh import ROOT

BOARDS = boards()
COLUMNS = 24
every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def test_generating_the_boards_changes_nothing(tmp_path: Path) -> None:
    """`make dashboards` into an empty directory gives exactly the files that are here."""
    made = subprocess.run(
        ["make", "--no-print-directory", "dashboards", f"OUT={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert fresh.keys() == {path.name for path in FILES}
    for name, text in fresh.items():
        assert text == (DIRECTORY / name).read_text(), f"{name} is not what its code makes: run `make dashboards`"


def test_grafanas_sidecar_finds_every_board() -> None:
    """The component makes a ConfigMap of each file, with the label that the sidecar of Grafana's charts looks for."""
    component = yaml.safe_load((DIRECTORY.parent / "kustomization.yaml").read_text())
    made = component["configMapGenerator"]
    assert sorted(file for one in made for file in one["files"]) == [f"dashboards/{path.name}" for path in FILES]
    assert all(one["options"]["labels"] == {"grafana_dashboard": "1"} for one in made)


# Each board by itself.


def test_the_boards_are_those_that_alerts_and_readers_know() -> None:
    """Boards' uids are part of their addresses, and their files are named after them."""
    assert [board.uid for board in BOARDS] == ["unlatch-mesh", "unlatch-processes", "unlatch-tenants"]
    assert [path.stem for path in FILES] == [board.uid for board in BOARDS]


def lost(here: Any, read: Any, path: str = "") -> Iterator[str]:
    """Return the places that were not read, or were read as something else. Values beyond them are defaults."""
    if isinstance(here, dict) and isinstance(read, dict):
        for name, value in here.items():
            yield from lost(value, read.get(name), f"{path}/{name}")
    elif isinstance(here, list) and isinstance(read, list) and len(here) == len(read):
        for place, (one, other) in enumerate(zip(here, read, strict=True)):
            yield from lost(one, other, f"{path}/{place}")
    elif here != read:
        yield path


@every_board
def test_grafana_knows_every_field(board: Board) -> None:
    """The types made of Grafana's schemas read all of it: nothing is misspelt or misplaced."""
    register_default_plugins()
    read = Dashboard.from_json(dict(board.json))
    assert not list(lost(board.json, json.loads(json.dumps(read, cls=JSONEncoder))))


@every_board
def test_every_panel_has_a_number_of_its_own(board: Board) -> None:
    """Alerts and links name panels by number.

    A row's panels have the numbers of its ten, so that there is room for new ones.
    """
    numbers = [panel["id"] for panel in board.json["panels"]]
    assert len(set(numbers)) == len(numbers)
    row = 0
    for panel in board.json["panels"]:
        if panel["type"] == "row":
            row = panel["id"]
            assert row % 10 == 0
        elif row:
            assert row < panel["id"] < row + 10, panel["title"]


@every_board
def test_panels_lie_beside_and_below_one_another(board: Board) -> None:
    """No panel overlaps another or crosses the edge, and none is above a panel that comes before it."""
    places = [(panel["title"], panel["gridPos"]) for panel in board.json["panels"]]
    for title, at in places:
        assert 0 <= at["x"] < at["x"] + at["w"] <= COLUMNS, title
    for (title, one), (other, two) in combinations(places, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        below = one["y"] + one["h"] <= two["y"]
        assert (beside and one["y"] <= two["y"]) or below, (title, other)


@every_board
def test_every_panel_says_what_it_shows_and_what_to_do(board: Board) -> None:
    """Each panel has a unit, a description of at least a sentence, lettered queries, and the chosen data source."""
    titles = [panel["title"] for panel in board.panels]
    assert len(set(titles)) == len(titles)
    for panel in board.panels:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 60, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == sorted(set(refs))
        assert refs
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


@every_board
def test_limits_are_coloured_from_the_lowest_on(board: Board) -> None:
    """Thresholds rise, from a colour for everything below them. At least half of the figures have thresholds."""
    for panel in board.panels:
        values = [step["value"] for step in thresholds(panel)]
        assert values[:1] in ([], [None]), panel["title"]
        assert values[1:] == sorted(values[1:]), panel["title"]
    figures = [panel for panel in board.panels if panel["type"] == "stat"]
    assert sum(len(thresholds(panel)) > 1 for panel in figures) >= len(figures) / 2


def thresholds(panel: Mapping[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    return steps


@every_board
def test_the_first_screen_is_the_answer(board: Board) -> None:
    """At 1920 by 1080 about 24 of Grafana's rows are visible. The figures fill the first four, from the left."""
    figures = [panel["gridPos"] for panel in board.panels if panel["type"] == "stat"]
    assert {(at["y"], at["h"]) for at in figures} == {(0, 4)}
    assert sum(at["w"] for at in figures) == COLUMNS


def links(board: Board) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Return each panel's links to boards."""
    for panel in board.panels:
        defaults = panel["fieldConfig"]["defaults"].get("links", [])
        of_columns = [
            link
            for override in panel["fieldConfig"]["overrides"]
            for one in override["properties"]
            if one["id"] == "links"
            for link in one["value"]
        ]
        yield from ((panel, link["url"]) for link in [*defaults, *of_columns])


@every_board
def test_links_lead_to_boards_that_know_what_is_chosen(board: Board) -> None:
    """A panel's link sets a variable of the board that it leads to. Each board leads to the others."""
    known = {other.uid: other.variables for other in BOARDS}
    for panel, url in links(board):
        target = urlsplit(url)
        chosen = {name.removeprefix("var-") for name in parse_qs(target.query) if name.startswith("var-")}
        assert chosen, panel["title"]
        assert chosen <= known[target.path.removeprefix("/d/")].keys(), panel["title"]
    assert {link["url"].removeprefix("/d/") for link in board.json["links"]} == known.keys() - {board.uid}


@every_board
def test_every_query_is_promql_of_the_boards_variables(board: Board) -> None:
    """A parser reads each query, with the variables filled in. No query invents a value where there is none."""
    for asked in board.asks():
        assert metrics_of(fill(asked.expr, board.everything())), asked
        assert not re.search(r"\bvector\(|\babsent", asked.expr), asked
        assert "$namespace" in asked.expr, asked


@every_board
def test_units_of_a_target_are_told_apart(board: Board) -> None:
    """No query adds up, or matches, workers or processes of different units, and legends name units."""
    for asked in board.asks():
        assert not list(merged_units(fill(asked.expr, board.everything()))), asked
    for panel in board.panels:
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            assert "owner" in named or not named & {"process", "worker"}, panel["title"]


OF_POD = 'namespace="n",pod="p"'
WORKER = f'{{{OF_POD},worker="0"}}'
OF_WORKER = f'{{{OF_POD},process="worker-0"}}'


@pytest.mark.parametrize(
    ("board", "number", "labels", "one", "other"),
    [
        ("processes", 53, f'{OF_POD},worker="0"', 0.5, 0.25),
        ("processes", 24, f'{OF_POD},worker="0"', 0.75, 0.5),
        ("processes", 12, f'{OF_POD},process="worker-0"', 0.25, 0.25),
        ("mesh", 31, 'pod="p"', 1.0, 0.75),
        ("mesh", 34, f'__name__="unlatch_calls_in_flight",component="gateway",{OF_POD}', 3, 4),
    ],
)
def test_each_unit_has_its_series(
    board: str, number: int, labels: str, one: float, other: float, tmp_path: Path
) -> None:
    """Workers of two units have the same pod and number: they are two series, and `owner` has the unit's number."""
    (queries,) = [one for one in BOARDS if one.uid == f"unlatch-{board}"]
    (query,) = [asked.expr for asked in queries.asks() if asked.number == number]
    busy = f'unlatch_worker_busy_seconds_total{{component="compute",{OF_POD},worker="0"}}'
    always = {
        f'unlatch_process_cpu_seconds_total{{{OF_POD},process="worker-0",mode="user"}}': "0+0.25x20",
        f"unlatch_process_core_wait_seconds_total{OF_WORKER}": "0x20",
        f"unlatch_worker_memory_bytes{WORKER}": "50x20",
    }
    limit = f"unlatch_worker_memory_limit_bytes{{{OF_POD}}}"
    live = f'unlatch_calls_in_flight{{component="gateway",{OF_POD}}}'
    series = units(
        {**always, busy: "0+1x20", limit: "100x20", live: "3x20"},
        {**always, busy: "0+0.75x20", limit: "200x20", live: "4x20"},
    )
    told = [f'{{{labels},owner="p unit {unit}",unit=" unit {unit}"}}' for unit in range(2)]
    test = {
        "interval": "1s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": fill(query, queries.everything()),
                "eval_time": "15s",
                "exp_samples": [{"labels": told[0], "value": one}, {"labels": told[1], "value": other}],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [], "evaluation_interval": "1s", "tests": [test]}))
    promtool("test", "rules", str(file))


# Boards of a running mesh.


@pytest.mark.timeout(180)
@every_board
def test_variables_offer_what_there_is(watched: Watched, board: Board) -> None:
    """Namespaces, pods, kernels and tenants are those of the mesh."""
    choices = board.choices(watched.prometheus)
    assert choices["namespace"] == ["unlatch"]
    pods = {target.pod for target in watched.targets}
    expected = {
        "pod": pods,
        "gateway": {pod for pod in pods if "gateway" in pod},
        "kernel": {"identity", "simulate", "score", "gaussian_blur"},
        "tenant": {"research", "planning", "modest"},
    }
    for name, values in choices.items():
        assert expected.get(name, set()) <= set(values), name
    assert set(choices.get("pod", pods)) == pods


@pytest.mark.timeout(180)
@every_board
def test_every_query_names_what_is_exported(watched: Watched, board: Board) -> None:
    """Each panel, variable and annotation reads only series that the gateway or the dispatcher has."""
    exported = set(watched.prometheus.get("label/__name__/values", **{"match[]": '{job=~"unlatch.*"}'}))
    exported -= {name for name in exported if ":" in name}
    for asked in board.asks():
        assert metrics_of(fill(asked.expr, board.everything())) <= exported, asked
    for query in board.variables.values():
        series = re.sub(r"label_values\((.+), \w+\)", r"\1", query)
        assert metrics_of(fill(series, board.everything())) <= exported, query
    for annotation in board.json["annotations"]["list"]:
        # This series is Prometheus' own.
        assert metrics_of(annotation["expr"]) == {"ALERTS"}


@pytest.mark.timeout(180)
@every_board
@pytest.mark.parametrize("chosen", ["all", "each"])
def test_every_panel_has_data(watched: Watched, board: Board, chosen: str) -> None:
    """For the time under load each query returns data, whether nothing was chosen or each value was ticked."""
    values = board.everything() if chosen == "all" else board.chosen(watched.prometheus)
    empty: list[Asked] = []
    for asked in board.asks():
        query = fill(asked.expr, values)
        given = watched.prometheus.query_range(query, start=watched.began, end=watched.moment, step_seconds=1.0)
        # Values that are not numbers, a share of nothing for example, are not shown.
        if not any(value == value for one in given for _, value in one.points):  # noqa: PLR0124 (NaN is not itself)
            empty.append(asked)
    assert not empty, [str(asked) for asked in empty]


@pytest.mark.timeout(180)
@every_board
def test_series_have_the_labels_that_name_and_link_them(watched: Watched, board: Board) -> None:
    """Each label that a legend, a table's column or a link uses exists on its series."""
    for panel in board.panels:
        wanted = {
            label for _, url in links(board) if _ is panel for label in re.findall(r"__field\.labels\.(\w+)", url)
        }
        for target in panel["targets"]:
            named = wanted | set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            query = fill(target["expr"], board.everything())
            given = watched.prometheus.query_range(query, start=watched.began, end=watched.moment, step_seconds=1.0)
            for one in given:
                assert named <= one.labels.keys(), (panel["title"], dict(one.labels))
