"""A board: its variables, its panels laid out row by row, and links to the other boards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog import builder as cogbuilder
from grafana_foundation_sdk.models.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardCursorSync,
    DashboardLink,
    DashboardLinkType,
    GridPos,
    Panel,
    RowPanel,
    VariableModel,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from deploy.dashboards.panels import DATASOURCE, WHOLE

TAG = "unlatch"
TITLES = {
    "unlatch-mesh": "Unlatch: mesh",
    "unlatch-processes": "Unlatch: processes",
    "unlatch-tenants": "Unlatch: tenants",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A choice for the reader: values of a label, by default all."""

    name: str
    title: str
    series: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A board. `top` holds the first panels; below them come rows, by title."""

    uid: str
    says: str
    variables: Sequence[Variable]
    top: Sequence[Panel]
    rows: Mapping[str, Sequence[Panel]]

    def build(self) -> Dashboard:
        """Build the board for Grafana."""
        made = (
            dashboard.Dashboard(TITLES[self.uid])
            .uid(self.uid)
            .description(self.says)
            .tags([TAG])
            .time("now-1h", "now")
            .refresh("30s")
            .timezone("browser")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .variables([_datasource(), *map(_chosen, self.variables)])
            .links([_to(uid) for uid in TITLES if uid != self.uid])
            .build()
        )
        made.annotations.list_val = [_ALERTS]
        made.panels, bottom = [*self.top], _lay_out(self.top, 0)
        for title, panels in self.rows.items():
            made.panels.append(_row(title, panels, bottom))
            made.panels += panels
            bottom = _lay_out(panels, bottom + 1)
        return made


def _lay_out(panels: Sequence[Panel], top: int) -> int:
    """Place panels from left to right and from top to bottom. Returns the first free line below them."""
    left, bottom = 0, top
    for panel in panels:
        assert panel.grid_pos is not None
        if left + panel.grid_pos.w > WHOLE:
            left, top = 0, bottom
        panel.grid_pos.x, panel.grid_pos.y = left, top
        left += panel.grid_pos.w
        bottom = max(bottom, top + panel.grid_pos.h)
    return bottom


def _row(title: str, panels: Sequence[Panel], top: int) -> RowPanel:
    """A row's headline. Its number is the first of the ten that its panels' numbers belong to."""
    first = panels[0].id_val
    assert first is not None
    return RowPanel(id_val=first - first % 10, title=title, grid_pos=GridPos(x=0, y=top, w=WHOLE, h=1))


def _chosen(variable: Variable) -> cogbuilder.Builder[VariableModel]:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.title)
        .datasource(DATASOURCE)
        .query({"query": f"label_values({variable.series}, {variable.label})", "refId": variable.name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NATURAL_ASC)
        .multi(multi=True)
        .include_all(include_all=True)
        # A pattern rather than a list of values: it also matches a missing label, and URLs stay short.
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _datasource() -> cogbuilder.Builder[VariableModel]:
    return dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _to(uid: str) -> cogbuilder.Builder[DashboardLink]:
    """A link to another board that keeps the time range and the choices that both boards have."""
    link = dashboard.DashboardLink(TITLES[uid]).type(DashboardLinkType.LINK).url(f"/d/{uid}")
    return link.keep_time(keep_time=True).include_vars(include_vars=True)


# All panels mark the time at which an alert began to fire.
_ALERTS = AnnotationQuery(
    name="Alerts",
    datasource=DATASOURCE,
    icon_color="red",
    expr='ALERTS{alertstate="firing", alertname=~"Unlatch.*"}',
)
