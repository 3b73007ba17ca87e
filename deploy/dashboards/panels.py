"""The kinds of panel on the boards, each with one look everywhere.

A panel has a number, to which alerts and links point; a title; a description of how to read it and what to do; a unit;
and queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    GridPos,
    Panel,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.dashboards import colours

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# Values from which on each colour applies.
Limits = Sequence[tuple[float, str]]
# Parts of a board's width of 24 columns. One unit of height is 38 pixels.
EIGHTH, SIXTH, THIRD, HALF, TWO_THIRDS, WHOLE = 3, 4, 8, 12, 16, 24
_FIGURE_HEIGHT, _HEIGHT = 4, 8


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression, and the names of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table: a query with one value for each row."""

    title: str
    expr: str
    unit: str
    limits: Limits = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The link of a series."""

    title: str
    url: str


def figure(
    at: int, title: str, says: str, unit: str, expr: str, *, limits: Limits = (), width: int = EIGHTH, none: str = "-"
) -> Panel:
    """The present value of one figure, with its history behind it. `none` is shown without data."""
    kind = (
        stat.Panel()
        .unit(unit)
        .thresholds(_thresholds(limits))
        .color_mode(looks.BigValueColorMode.BACKGROUND if limits else looks.BigValueColorMode.VALUE)
        .graph_mode(looks.BigValueGraphMode.AREA)
        .text_mode(looks.BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(none)
    )
    return _placed(kind.build(), at, title, says, (Query(expr, title),), width, _FIGURE_HEIGHT)


def lines(
    at: int,
    title: str,
    says: str,
    unit: str,
    *queries: Query,
    width: int = THIRD,
    height: int = _HEIGHT,
    coloured: colours.Colours | None = None,
    limits: Limits = (),
    most: float | None = None,
    stacked: bool = False,
    bars: bool = False,
    link: Link | None = None,
) -> Panel:
    """Values over time, from 0. `limits` are dashed lines; the axis reaches at least to `most`."""
    kind = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .thresholds(_thresholds(limits))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .line_width(1)
        .fill_opacity(60 if stacked else 5)
        .draw_style(looks.GraphDrawStyle.BARS if bars else looks.GraphDrawStyle.LINE)
        .show_points(looks.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(show_legend=True)
            .display_mode(looks.LegendDisplayMode.LIST)
            .placement(looks.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    )
    if limits:
        kind.thresholds_style(common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED))
    if stacked:
        kind.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if most is not None:
        kind.axis_soft_max(most)
    if link is not None:
        kind.data_links([dashboard.DashboardLink(link.title).url(link.url)])
    for pattern, colour in colours.overrides(coloured or {}):
        kind.override_by_regexp(pattern, [DynamicConfigValue("color", colour)])
    return _placed(kind.build(), at, title, says, queries, width, height)


def heat(
    at: int,
    title: str,
    says: str,
    unit: str,
    query: Query,
    *,
    most: float | None = None,
    buckets: bool = False,
    width: int = THIRD,
    height: int = _HEIGHT,
) -> Panel:
    """Values over time as colours: a row for each series, sorted by name, or for each bucket of a histogram.

    The darkest colour stands for `most`, or for the largest value. `unit` is that of the values, or of bucket bounds.
    """
    colour = (
        heatmap.HeatmapColorOptions()
        .mode(HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .scale(HeatmapColorScale.LINEAR)
        .steps(64)
        .min(0)
    )
    if most is not None:
        colour.max(most)
    axis = heatmap.YAxisConfig().axis_placement(looks.AxisPlacement.LEFT).reverse(reverse=not buckets)
    kind = (
        heatmap.Panel()
        .calculate(calculate=False)
        .color(colour)
        .cell_gap(0)
        .y_axis(axis.unit(unit) if buckets else axis)
        .cell_values(heatmap.CellValues().unit("reqps" if buckets else unit))
        .mode(looks.TooltipDisplayMode.SINGLE)
        .unit(unit)
        .max_data_points(240)
    )
    kept = PromQueryFormat.HEATMAP if buckets else PromQueryFormat.TIME_SERIES
    return _placed(kind.build(), at, title, says, (query,), width, height, kept)


def states(
    at: int, title: str, says: str, query: Query, names: Mapping[int, tuple[str, str]], *, width: int = THIRD
) -> Panel:
    """The state of each series over time. `names` gives each value's meaning and colour."""
    meanings = {str(value): ValueMappingResult(text=text, color=colour) for value, (text, colour) in names.items()}
    kind = (
        statetimeline.Panel()
        .unit("short")
        .mappings([ValueMap(meanings)])
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(()))
        .show_value(looks.VisibilityMode.NEVER)
    )
    return _placed(kind.build(), at, title, says, (query,), width, _HEIGHT)


def rows(at: int, title: str, says: str, by: Sequence[str], *columns: Column, link: Link | None = None) -> Panel:
    """A table of present values: a row for each value of the labels `by`, sorted by the first column, largest first."""
    kind = table.Panel().unit("short").thresholds(_thresholds(()))
    kind.transformations(
        [
            DataTransformerConfig("merge", options={}),
            DataTransformerConfig(
                "organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {label: place for place, label in enumerate(by)},
                    "renameByName": {
                        f"Value #{ref}": column.title for ref, column in zip(ascii_uppercase, columns, strict=False)
                    },
                },
            ),
        ]
    )
    kind.sort_by([common.TableSortByFieldState().display_name(columns[0].title).desc(desc=True)])
    for column in columns:
        properties = [DynamicConfigValue("unit", column.unit)]
        if column.limits:
            properties.append(DynamicConfigValue("thresholds", _thresholds(column.limits).build()))
            properties.append(DynamicConfigValue("custom.cellOptions", {"type": "color-text"}))
        kind.override_by_name(column.title, properties)
    if link is not None:
        kind.override_by_name(by[0], [DynamicConfigValue("links", [{"title": link.title, "url": link.url}])])
    asked = [Query(column.expr) for column in columns]
    return _placed(kind.build(), at, title, says, asked, WHOLE, _HEIGHT, PromQueryFormat.TABLE)


def _thresholds(limits: Limits) -> dashboard.ThresholdsConfig:
    steps = [Threshold(value=None, color="green"), *(Threshold(value=value, color=colour) for value, colour in limits)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _placed(
    panel: Panel,
    at: int,
    title: str,
    says: str,
    queries: Sequence[Query],
    width: int,
    height: int,
    kept: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Panel:
    """Add what every kind of panel has. The board sets the position."""
    panel.id_val, panel.title, panel.description = at, title, says
    panel.datasource = DATASOURCE
    panel.grid_pos = GridPos(w=width, h=height)
    panel.targets = []
    for ref, query in zip(ascii_uppercase, queries, strict=False):
        asked = prometheus.Dataquery().datasource(DATASOURCE).ref_id(ref).expr(query.expr).format(kept)
        asked = asked.instant() if kept is PromQueryFormat.TABLE else asked.range().legend_format(query.legend)
        panel.targets.append(asked.build())
    return panel
